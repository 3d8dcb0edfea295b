"""A run that had its slot for a while gives it to a much smaller one that waits, and goes on as if nothing was."""

import asyncio

import pytest

from tests.waiting import eventually

LONG = {"prompt": "he looked", "max_new_tokens": 120, "ignore_end": True, "seed": {"base_seed": 3}}


async def finished_in_order(world, *requests):
    """The answers of requests that come one after the other while the prior stands still, and the order they end in."""
    order, tasks = [], []

    async def one(number, request):
        answer = await world.generate(**request)
        order.append(number)
        return answer

    world.prior.gate.clear()
    for number, request in enumerate(requests):
        tasks.append(asyncio.create_task(one(number, request)))
        await eventually(lambda: world.prior.running + world.coordinator.services.admission.waiting == len(tasks))
    world.prior.gate.set()
    return await asyncio.gather(*tasks), order


@pytest.mark.parametrize(
    ("tokens", "slice_seconds", "order"),
    [(4, 0.0, [1, 0]), (100, 0.0, [0, 1]), (4, 60.0, [0, 1])],
    ids=["much smaller", "not much smaller", "before the slice is over"],
)
async def test_a_run_is_preempted_for_a_much_smaller_one(make_world, tokens, slice_seconds, order):
    short = LONG | {"prompt": "he", "max_new_tokens": tokens}
    alone = await make_world(max_running=1)
    expected = [await alone.generate(**request) for request in (LONG, short)]
    world = await make_world(max_running=1, slice_seconds=slice_seconds)
    answers, ended = await finished_in_order(world, LONG, short)
    assert ended == order
    texts = [["".join(piece.text for piece in answer) for answer in run] for run in (answers, expected)]
    assert texts[0] == texts[1]
    assert len(world.prior.calls) == (3 if order == [1, 0] else 2)
    await eventually(lambda: world.prior.running == world.decoder.running == 0)


@pytest.mark.parametrize("sampler", [{"steps": 1000}, {"steps": 16, "resamples": 17}, {"steps": 129, "solver": 3}])
async def test_runs_whose_blocks_take_very_long_leave_room_for_others(make_world, sampler):
    world = await make_world(max_running=2)
    _, ended = await finished_in_order(world, *[LONG | {"sampler": sampler}] * 3, LONG | {"max_new_tokens": 4})
    assert ended[0] == 3


async def test_at_most_16_later_runs_are_started_before_a_preempted_one(make_world):
    world = await make_world(max_running=1, slice_seconds=0.0)
    short = LONG | {"prompt": "he", "max_new_tokens": 4}
    await world.generate(**short)  # so that it is known how long a call takes
    _, ended = await finished_in_order(world, LONG, *[short] * 40)
    assert ended.index(0) == 40
    began = [request.first_block for request in world.prior.calls[1:]]
    assert began[:20] == [0] + [0] * 16 + [1] + [0] * 2
