"""The short form of tests/stress.py."""

from tests.stress import stress


async def test_requests_that_make_networks_fail_harm_no_others() -> None:
    outcome = await stress(seconds=5, seed=1, hang=0.3)
    assert outcome.wrong == []
    innocent = sum(count for name, count in outcome.counts.items() if "as undisturbed" in name)
    guilty = sum(count for name, count in outcome.counts.items() if "StepFailed" in name or "Overloaded" in name)
    assert min(innocent, guilty) > 0
