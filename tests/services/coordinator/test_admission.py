import asyncio
import time
from typing import Any

import pytest

from colaserve_services.coordinator import Call, CoordinatorLimits, CoordinatorObserver
from colaserve_services.coordinator.admission import Admission
from colaserve_services.coordinator.call import caller_name
from colaserve_services.errors import DeadlineExceeded, Overloaded


def admission(**limits: Any) -> Admission:
    return Admission(CoordinatorLimits(**limits), CoordinatorObserver())


class Worker:
    """A call that works until it is told to end."""

    def __init__(self, gate: Admission, call: Call | None = None):
        self.working, self.end = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._work(gate, call or Call()))

    async def _work(self, gate: Admission, call: Call) -> None:
        async with gate.slot(call):
            self.working.set()
            await self.end.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def end(*workers: Worker) -> None:
    for worker in workers:
        worker.end.set()
    await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)


async def test_calls_run_up_to_the_limit_wait_in_order_and_are_refused_beyond():
    gate = admission(max_running=2, max_waiting=2)
    workers = [Worker(gate) for _ in range(4)]
    await settle()
    assert [worker.working.is_set() for worker in workers] == [True, True, False, False]
    with pytest.raises(Overloaded):
        async with gate.slot(Call()):
            pass
    await end(workers[0])
    await settle()
    assert (workers[2].working.is_set(), workers[3].working.is_set()) == (True, False)
    await end(*workers)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_a_call_that_goes_away_while_it_waits_takes_no_place():
    gate = admission(max_running=1, max_waiting=5)
    first, second, third = (Worker(gate) for _ in range(3))
    await settle()
    second.task.cancel()
    await end(second, first)
    await settle()
    assert third.working.is_set()
    await end(third)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_a_place_given_to_a_call_that_goes_away_in_that_moment_is_passed_on():
    gate = admission(max_running=1, max_waiting=5)
    first, second, third = (Worker(gate) for _ in range(3))
    await settle()
    first.end.set()
    await first.task  # its place is second's now, which has not run yet
    second.task.cancel()
    await settle()
    assert third.working.is_set()
    await end(second, third)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_a_call_that_waited_too_long_is_refused():
    gate = admission(max_running=1, queue_seconds=0.05)
    first = Worker(gate)
    await settle()
    with pytest.raises(Overloaded, match=r"0\.05 s"):
        async with gate.slot(Call()):
            pass
    await end(first)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_a_deadline_ends_the_wait():
    gate = admission(max_running=1, queue_seconds=30)
    first = Worker(gate)
    await settle()
    with pytest.raises(DeadlineExceeded):
        async with gate.slot(Call(deadline=time.monotonic() + 0.05)):
            pass
    await end(first)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_one_key_cannot_take_all_places():
    gate = admission(max_running=10, max_per_key=2)
    greedy = [Worker(gate, Call(key="a")) for _ in range(2)]
    await settle()
    with pytest.raises(Overloaded, match="of this client"):
        async with gate.slot(Call(key="a")):
            pass
    async with gate.slot(Call(key="b")):
        pass
    await end(*greedy)
    async with gate.slot(Call(key="a")):
        pass
    assert not gate._by_key


async def test_the_hint_grows_with_the_queue():
    gate = admission(max_running=1, max_waiting=50)
    gate._pace = 2.0
    workers = [Worker(gate)]
    hints = []
    for _ in range(4):
        await settle()
        hints.append(gate.retry_after())
        workers.append(Worker(gate))
    await end(*workers)
    assert hints == [2, 4, 6, 8]


async def test_nobody_waits_in_vain_where_the_pace_is_known():
    gate = admission(max_running=2, max_waiting=1000, queue_seconds=20)
    gate._pace, gate._measured = 2.0, 10
    workers = [Worker(gate) for _ in range(100)]
    await settle()
    with pytest.raises(Overloaded, match="takes too long") as refusal:
        gate.check(Call())
    assert sum(not worker.task.done() for worker in workers) == 2 + 5  # at 2 s each these fit into half the patience
    assert refusal.value.retry_after == 12
    for worker in workers:
        worker.end.set()
    await end(*workers)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_before_the_first_call_has_ended_one_round_may_wait():
    gate = admission(max_running=10, max_waiting=1000)
    workers = [Worker(gate) for _ in range(30)]
    await settle()
    assert (gate.running, gate.waiting) == (10, 10)
    assert sum(worker.task.done() for worker in workers) == 10
    await end(*workers)


async def test_as_many_calls_work_as_the_prior_takes_without_letting_them_wait():
    gate = admission(max_running=64)
    gate.begin_with(4)
    workers = [Worker(gate) for _ in range(12)]
    await settle()
    assert (gate.running, gate.waiting) == (4, 8)
    for _ in range(3):
        gate.learned(0.0, time.monotonic())
    assert gate.running == 7
    gate.learned(5.0, time.monotonic())
    late = time.monotonic() - 1  # admitted before there were fewer places
    gate.learned(5.0, late)
    await end(workers[0])
    await settle()
    assert gate.running == 6
    await end(*workers)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_a_refusal_comes_at_once_and_harms_nobody():
    gate = admission(max_running=1, max_waiting=0)
    first = Worker(gate)
    await settle()
    for _ in range(100):
        with pytest.raises(Overloaded) as caught:
            async with gate.slot(Call()):
                pass
    assert caught.value.retry_after > 0
    assert first.working.is_set()
    await end(first)
    async with gate.slot(Call()):
        assert gate.running == 1


def test_a_keys_name_does_not_tell_the_key():
    name = caller_name("Bearer secret-key", "ipv4:10.0.0.1:555")
    assert "secret" not in name
    assert name == caller_name("Bearer secret-key", "ipv4:10.0.0.2:555") != caller_name("Bearer other", "")


@pytest.mark.parametrize(
    ("peer", "name"),
    [("ipv4:10.0.0.1:555", "ipv4:10.0.0.1"), ("ipv6:%5B::1%5D:555", "ipv6:%5B::1%5D"), ("in-process", "anonymous")],
)
def test_without_a_key_a_caller_is_known_by_its_address(peer: str, name: str):
    assert caller_name("", peer) == name
