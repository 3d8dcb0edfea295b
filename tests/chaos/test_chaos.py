"""Short versions of the commands in this folder, on one fleet of real processes: nothing is lost, nothing is wrong."""

import pytest
import pytest_asyncio

from tests.chaos.checkpoints import ALL, PRIOR, change_under_load, of_the_checkpoint, of_the_prior, torn, varied
from tests.chaos.faults import hangs, harmed_fleet, under_harm
from tests.chaos.fleet import SMALL, STAGES, FleetSettings
from tests.chaos.kill import kill_under_load
from tests.chaos.load import jobs, undisturbed
from tests.chaos.proxy import Harm
from tests.chaos.soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
SOME = jobs(8, (12, 24, 48))
HARM = Harm(delay=0.01, cut=0.005, swallow=0.002, corrupt=0.005)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def harmed(tmp_path_factory):
    settings = FleetSettings(tmp_path_factory.mktemp("fleet"), sizes=SMALL, drain_seconds=4.0)
    async with harmed_fleet(settings) as fleet_and_proxies:
        yield fleet_and_proxies


async def test_no_request_is_lost_or_changed_when_replicas_are_killed(harmed):
    fleet, _ = harmed
    tally, killer = await kill_under_load(fleet, SOME, concurrency=6, period=2.0, kills=3)
    assert killer.killed.total() >= 3
    assert (tally.failed, tally.wrong) == ([], [])
    for replica in fleet.all:
        await replica.until_serving()


async def test_bad_connections_to_the_stages_make_no_hang_no_wrong_text_and_leak_nothing(harmed):
    fleet, proxies = harmed
    expected = await undisturbed(fleet, SOME)
    tally, done, free = await under_harm(fleet, proxies, HARM, SOME * 3, expected, 6, deadline=15.0)
    assert done.total() > 0
    assert (hangs(tally), tally.wrong) == (0, [])
    assert free
    assert all(replica.running for replica in fleet.all)  # without TLS, gRPC aborts at error codes it does not know


async def test_requests_that_are_left_or_run_late_leave_nothing_behind(harmed):
    fleet, _ = harmed
    seen: set[str] = set()
    for seed in range(1, 13):  # a slow machine gets few requests into one round, and one in five is left
        ended, watch, free = await soak(fleet, SOME, 4, seconds=4, seed=seed)
        seen |= set(ended)
        assert free
        if {"left", "whole"} <= seen:
            break
    assert {"left", "whole"} <= seen
    for name, files in watch.files.items():
        assert files[-1] <= files[0] + 12, name  # connections come and go; what leaks grows with the requests
    assert set(STAGES) <= {name.partition("-")[0] for name in watch.files}


async def test_a_fleet_changes_its_prior_and_then_its_checkpoint_and_no_text_is_of_both(harmed, tmp_path):
    """Replicas are drained and restarted in turn, and nobody asks twice. The last test: the fleet serves another
    checkpoint afterwards."""
    fleet, _ = harmed
    fine_tuned = varied(fleet.settings.model, tmp_path / "prior", PRIOR)
    tally, before, after = await change_under_load(fleet, SOME, 4, of_the_prior(fleet), fine_tuned, kill=True)
    assert (tally.failed, torn(tally, before, after)) == ([], [])
    assert before != after
    first, *rest = of_the_checkpoint(fleet)
    steps = [first, *rest[:2], [replica for step in rest[2:] for replica in step]]
    tally, before, after = await change_under_load(fleet, SOME, 4, steps, varied(fine_tuned, tmp_path / "all", ALL))
    assert (tally.failed, torn(tally, before, after)) == ([], [])
    assert before != after
    left_out = await fleet.metric("colaserve_stage_faults_total", ("coordinator",), 'kind="model"')
    assert sum(left_out.values()) > 0
