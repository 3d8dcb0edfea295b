"""The queue: which calls start, which are queued for which stage, which are refused; fairness of callers and sizes.
A run that had its slot for a while gives it to a much smaller one, and goes on as if nothing was."""

import asyncio
import time
from typing import Any

import pytest

from colaserve.v1 import generation_pb2
from colaserve_services.coordinator import Call, Coordinator, CoordinatorLimits
from colaserve_services.coordinator.admission import Admission, Ticket, queue_for
from colaserve_services.coordinator.generation import generate
from colaserve_services.errors import DeadlineExceeded, Overloaded
from colaserve_services.rpc.metrics import Metrics
from tests.services.coordinator.conftest import counted, fakes, over
from tests.services.coordinator.stage_fakes import FakePrior
from tests.waiting import PATIENCE, eventually


def admission(capacity: int = 0, metrics: Metrics | None = None, **limits: Any) -> Admission:
    """`capacity`: sessions that the prior takes."""
    gate = Admission(CoordinatorLimits(**{"retry_seconds": 0.001} | limits), metrics or Metrics())
    gate.follow({"prior": capacity})
    return gate


class Worker:
    """A call that works until `end` is set."""

    def __init__(self, gate: Admission, call: Call | None = None, **slot: Any):
        self.working, self.end = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._work(gate, call or Call(), slot))

    async def _work(self, gate: Admission, call: Call, slot: dict[str, Any]) -> None:
        async with gate.slot(call, **slot):
            self.working.set()
            await self.end.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def end(*workers: Worker) -> None:
    for worker in workers:
        worker.end.set()
    await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)


def at_work(workers: list[Worker]) -> list[bool]:
    return [worker.working.is_set() for worker in workers]


@pytest.mark.parametrize("slot", [{}, {"stage": "prior"}])
async def test_calls_run_up_to_the_limit_wait_in_order_and_are_refused_beyond(slot: dict[str, str]):
    gate = admission(max_running=2, max_waiting=2)
    workers = [Worker(gate, **slot) for _ in range(4)]
    await settle()
    assert at_work(workers) == [True, True, False, False]
    for _ in range(100):  # each at once
        with pytest.raises(Overloaded) as caught:
            async with gate.slot(Call(), **slot):
                pass
    assert 0 < caught.value.retry_after <= 60
    await end(workers[0])
    await settle()
    assert at_work(workers) == [True, True, True, False]
    await end(*workers)
    assert (gate.running, gate.waiting) == (0, 0)


@pytest.mark.parametrize("given", [False, True])
async def test_a_call_that_goes_away_while_it_waits_takes_no_slot(given: bool):
    """`given`: in the moment in which its slot is given to it."""
    gate = admission(max_running=1, max_waiting=5)
    first, second, third = (Worker(gate) for _ in range(3))
    await settle()
    if given:
        first.end.set()
        await first.task
    second.task.cancel()
    await end(second, first)
    await settle()
    assert third.working.is_set()
    await end(third)
    assert (gate.running, gate.waiting) == (0, 0)


@pytest.mark.parametrize(("seconds", "error"), [(None, Overloaded), (0.001, DeadlineExceeded)])
async def test_a_call_waits_until_its_deadline_or_not_for_ever(seconds: float | None, error: type[Exception]):
    gate = admission(max_running=1, queue_seconds=0.05)
    first = Worker(gate)
    await settle()
    with pytest.raises(error):
        async with gate.slot(Call(None if seconds is None else time.monotonic() + seconds)):
            pass
    await end(first)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_one_caller_cannot_have_more_calls_than_its_share():
    gate = admission(max_running=10, max_per_key=2)
    greedy = [Worker(gate, Call(caller="a")) for _ in range(2)]
    await settle()
    with pytest.raises(Overloaded, match="of this client"):
        async with gate.slot(Call(caller="a")):
            pass
    async with gate.slot(Call(caller="b")):
        pass
    await end(*greedy)
    async with gate.slot(Call(caller="a")):
        pass


async def test_the_caller_with_the_fewest_calls_at_work_is_next():
    gate = admission(capacity=2)
    greedy = [Worker(gate, Call(caller="a"), stage="prior") for _ in range(6)]
    await settle()
    modest = [Worker(gate, Call(caller="b"), stage="prior") for _ in range(2)]
    await settle()
    await end(greedy[0])
    await settle()
    assert (at_work(greedy), at_work(modest)) == ([True, True] + [False] * 4, [True, False])
    await end(*greedy, *modest)


async def test_sessions_that_are_not_preempted_in_good_time_leave_half_of_the_slots_to_others():
    gate = admission(4)
    slow = [Worker(gate, stage="prior", slow=True) for _ in range(4)]
    await settle()
    assert at_work(slow) == [True, True, False, False]
    others = [Worker(gate, stage="prior") for _ in range(3)]
    await settle()
    assert at_work(others) == [True, True, False]
    await end(others[0])
    await settle()
    assert (at_work(slow)[2:], others[2].working.is_set()) == ([False, False], True)
    await end(slow[0])
    await settle()
    assert at_work(slow) == [True, True, True, False]
    await end(*slow, *others)


async def test_large_sessions_leave_an_eighth_of_the_slots_to_others():
    gate = admission(8)
    large = [Worker(gate, stage="prior", size=6000) for _ in range(9)]
    small = [Worker(gate, stage="prior", size=64) for _ in range(2)]
    await settle()
    assert (at_work(large), at_work(small)) == ([True] * 7 + [False] * 2, [True, False])
    await end(small[0])
    await settle()
    assert (at_work(large)[7:], at_work(small)) == ([False] * 2, [True, True])
    await end(large[0])
    await settle()
    assert at_work(large)[7:] == [True, False]
    await end(*large, *small)


async def test_others_start_beside_a_preempted_run_before_the_stage_has_taken_it_again():
    gate = admission(2)
    async with gate.slot(Call(), "prior") as preempted:
        gate.preempt(preempted)
        for _ in range(16):
            async with gate.slot(Call(), "prior") as later:
                gate.taken(later)
        await gate.enter(preempted)
        async with asyncio.timeout(PATIENCE), gate.slot(Call(), "prior"):
            assert preempted.running


async def test_answers_of_many_megabytes_are_gathered_one_at_a_time():
    gate = admission()
    workers = [Worker(gate, stage=queue_for(size << 20)) for size in (9, 9, 1)]
    await settle()
    assert (at_work(workers), gate.waiting) == ([True, False, True], 1)
    await end(workers[0])
    await workers[1].working.wait()
    await end(*workers)


async def test_no_run_is_preempted_for_one_that_its_like_keep_waiting():
    gate = admission(2, slice_seconds=0.0)
    async with gate.slot(Call(), "prior", 100) as large, gate.slot(Call(), "prior", 4, slow=True) as slow:
        waiting = Worker(gate, stage="prior", size=1, slow=True)
        await settle()
        assert (gate.outlasts(large), gate.outlasts(slow)) == (False, True)
        gate.leave(slow)
        await settle()
        assert waiting.working.is_set()
        await end(waiting)


async def test_the_hint_and_the_refusals_follow_the_pace_of_the_calls_that_ended():
    gate = admission(max_running=2, max_waiting=1000, queue_seconds=0.8)
    for _ in range(20):
        slow = [Worker(gate) for _ in range(2)]
        await asyncio.sleep(0.02)
        await end(*slow)
    workers = [Worker(gate) for _ in range(100)]
    await settle()
    with pytest.raises(Overloaded, match="takes too long") as refusal:
        gate.check(Call())
    assert 4 <= gate.waiting < 60  # some 0.01 s each, of half the patience
    assert 0.1 <= refusal.value.retry_after < 2
    await end(*workers)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_before_the_first_call_has_ended_one_round_may_wait():
    gate = admission(max_running=10, max_waiting=1000)
    workers = [Worker(gate) for _ in range(30)]
    await settle()
    assert (gate.running, gate.waiting) == (10, 10)
    assert sum(worker.task.done() for worker in workers) == 10
    await end(*workers)


async def test_calls_are_counted_at_the_stage_that_they_wait_for():
    metrics = Metrics()
    gate = admission(2, metrics, max_running=3)
    writing = [Worker(gate, stage="prior") for _ in range(4)]
    await settle()
    assert counted(metrics, "engine_queue_depth") == {("prior",): 2}
    others = [Worker(gate) for _ in range(2)]
    await settle()  # all that this coordinator may work on is under way: another stage would not help
    assert counted(metrics, "engine_queue_depth") == {("coordinator",): 3}
    gate.follow({"prior": 4})
    await end(others[0])
    await settle()
    assert counted(metrics, "engine_queue_depth") == {("coordinator",): 2}
    assert counted(metrics, "engine_running") == {("coordinator",): 3}
    await end(*writing, others[1])
    assert counted(metrics, "engine_queue_depth") == counted(metrics, "engine_running") == {}


class Memory:
    """What a stage's sessions share."""

    def __init__(self, free: int):
        self.free, self.taken = free, list[str]()

    async def run(self, gate: Admission, name: str, size: int, leave: asyncio.Event) -> None:
        """A session from its wait to its end."""
        ticket = Ticket(Call(), "prior", size)
        await gate.enter(ticket)
        while size > self.free:
            gate.refused(ticket, 0.01)
            await gate.enter(ticket)
        self.free -= size
        self.taken.append(name)
        gate.taken(ticket)
        await leave.wait()
        self.free += size
        gate.leave(ticket)


async def test_small_ones_pass_a_large_one_that_does_not_fit_and_only_so_often():
    gate, memory, leave, ends = admission(), Memory(10), asyncio.Event(), asyncio.Event()
    leave.set()
    runs = [asyncio.create_task(memory.run(gate, "holds", 5, ends))]
    await settle()
    runs.append(asyncio.create_task(memory.run(gate, "large", 8, leave)))
    for number in range(20):
        await settle()
        runs.append(asyncio.create_task(memory.run(gate, f"small {number}", 1, leave)))
    await eventually(lambda: len(memory.taken) == 1 + 16)
    await asyncio.sleep(0.1)  # in which others would be tried
    assert len(memory.taken) == 1 + 16
    ends.set()
    await asyncio.gather(*runs)
    assert memory.taken[17] == "large"
    assert gate.waiting == 0


class Virtual(asyncio.SelectorEventLoop):
    """Time passes only while everybody sleeps, and then at once."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def test_a_coordinator_that_holds_all_slots_of_a_stage_leaves_some_to_a_later_one():
    free, done = [8], [0, 0]

    async def call(gate: Admission, number: int) -> None:
        while True:
            ticket = Ticket(Call(), "prior", 1)
            await gate.enter(ticket)
            while not free[0]:
                gate.refused(ticket, 0.1)
                await gate.enter(ticket)
            free[0] -= 1
            gate.taken(ticket)
            await asyncio.sleep(0.2)
            free[0] += 1
            done[number] += 1
            gate.leave(ticket)

    async def both() -> None:
        gates = [Admission(CoordinatorLimits(), Metrics()) for _ in done]
        tasks = [asyncio.create_task(call(gates[0], 0)) for _ in range(16)]
        await asyncio.sleep(1)
        tasks += [asyncio.create_task(call(gates[1], 1)) for _ in range(16)]
        await asyncio.sleep(20)
        for task in tasks:
            task.cancel()

    with asyncio.Runner(loop_factory=Virtual) as runner:
        runner.run(both())
    assert min(done) > max(done) / 3
    assert sum(done) > 0.95 * 8 * 20 / 0.2


async def test_coordinators_in_front_of_one_full_stage_keep_their_calls_and_fail_none(tokenizer):
    stages = fakes() | {"prior": FakePrior(max_running=3)}
    coordinators = [over(stages, tokenizer) for _ in range(2)]
    for coordinator in coordinators:
        await coordinator.connect()

    async def ask(coordinator: Coordinator) -> Any:
        request = generation_pb2.GenerateRequest(prompt="he looked", max_new_tokens=8, ignore_end=True)
        return [response async for [response] in generate(coordinator.services, request, Call())][-1]

    stages["prior"].gate.clear()
    asked = [asyncio.create_task(ask(coordinator)) for _ in range(8) for coordinator in coordinators]
    waiting = [coordinator.services.admission for coordinator in coordinators]
    await eventually(lambda: sum(gate.waiting for gate in waiting) == 13)
    stages["prior"].gate.set()
    assert all(last.usage.completion_tokens == 8 for last in await asyncio.gather(*asked))
    for coordinator in coordinators:
        assert counted(coordinator.services.metrics, "engine_queue_depth") == {}


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
