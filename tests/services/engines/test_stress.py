"""The short form of tests/stress.py."""

import pytest

from tests.stress import stress


@pytest.mark.parametrize("seed", [1, 2])
async def test_requests_that_make_networks_fail_harm_no_others(seed: int) -> None:
    outcome = await stress(seconds=6, seed=seed, hang=0.3)
    assert outcome.wrong == []
    innocent = sum(count for name, count in outcome.counts.items() if "as undisturbed" in name)
    guilty = sum(count for name, count in outcome.counts.items() if "StepFailed" in name or "Overloaded" in name)
    assert min(innocent, guilty) > 0
