"""A short form of `python -m tests.abuse`: the server refuses, serves the caller beside it, and is whole afterwards."""

import pytest

from tests.abuse.__main__ import run
from tests.abuse.server import OURS
from tests.abuse.target import ATTACKS


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_server_under_attack_serves_the_others_and_is_whole_afterwards(capfd):
    attacks = [attack for attack in ATTACKS if attack.short]
    holds = await run(OURS, attacks, answers=3, timed=False)
    table = capfd.readouterr().out
    assert holds, table
    assert table.count("\n") == len(attacks) + 2
