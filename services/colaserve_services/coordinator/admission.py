"""The one queue of the system: calls wait here, in the coordinator, until a stage takes them.

An engine starts a session at its next step or refuses it at once, and then the session is queued here again. The first
in order is tried again as soon as one of our own sessions there has ended, and now and then, since those of other
coordinators end unseen; after 16 sessions a slot is left to those for a moment. A refusal may also mean that the KV
memory is short: smaller sessions are then tried before a large one, at most 16 times.
"""

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.limits import CoordinatorLimits
from colaserve_services.coordinator.stages import NAMES
from colaserve_services.errors import Overloaded, Unavailable
from colaserve_services.rpc import cancellation
from colaserve_services.rpc.metrics import Metrics

COORDINATOR: Final = "coordinator"  # the queue of calls that no stage is the bottleneck of
_LARGE_ANSWERS: Final = "large answers"  # the queue of those that each gather very many bytes: one at a time
_MANY_BYTES = 8 * 1024 * 1024

_PASSES: Final = 16  # later sessions that a stage may take before one that it refused
_SHARE: Final = 16  # sessions launched at a full stage, until a slot is left to other coordinators for a moment
_SHORTEST_HINT, _LONGEST_HINT = 0.1, 60.0  # seconds
_LONGEST_PAUSE = 40  # times `retry_seconds`, until a stage that refused is asked again
_RESUMED_SECONDS = 60.0  # that a run which has made progress waits for a full stage where it has no deadline
_WEIGHT = 0.1  # of the latest call in the running mean of the pace
_FIRST_ROUND = 8  # calls that may wait at least while nobody knows how long one takes
_UNREAD_LOOK = 0.2  # seconds between two looks whether anybody waits, at a stream that nobody reads
_MUCH_SMALLER = 4  # times, what a session that has had its slice is preempted for
_LARGE = 1024  # latents; larger sessions leave an eighth of a stage's slots to others

_log = logging.getLogger(__name__)


def queue_for(answer_bytes: int) -> str:
    """The queue of a call whose answer is of that size."""
    return _LARGE_ANSWERS if answer_bytes > _MANY_BYTES else COORDINATOR


@dataclass(eq=False)
class Ticket:
    """One session that a call wants to run at a stage: it waits with it, then holds it until `Admission.leave`."""

    call: Call
    stage: str
    size: int = 0  # latents that it needs there
    first: bool = False  # the call does nothing before it has this one, and is refused when it waits too long
    slow: bool = False  # its blocks take long, and it is preempted between them only
    resuming: bool = False  # its run has made progress
    granted: asyncio.Future[None] | None = None  # set while it waits; done once it is launched
    running: bool = False
    launched: float = 0.0  # latest; 0 before the first time
    at_work: bool = False  # its call is counted among those at work because of it
    taken: bool = False  # by the stage
    preempted: bool = False  # its session was ended for others, until it is launched again
    passed: int = 0  # later ones that the stage took since it refused this one
    waited: float = 0.0  # seconds, of all its waits

    @property
    def share(self) -> float:
        """Of the slots, what it and those with no greater share may hold at most, since others would wait for them."""
        return 1 / 2 if self.slow else 7 / 8 if self.size > _LARGE else 1.0

    @property
    def begins(self) -> bool:
        """Whether it adds its call to those at work."""
        return self.first and not self.at_work


@dataclass
class _Queue:
    """Those that wait for one stage, and how many of ours it takes."""

    capacity: int  # what its replicas say that they take
    limit: int  # the same, or what it took when it refused one
    shares: Counter[float] = field(default_factory=Counter)  # of those that run
    launched: int = 0  # since a slot was left to other coordinators
    waiting: list[Ticket] = field(default_factory=list)
    refused: list[Ticket] = field(default_factory=list)  # by the stage, and not taken since; some are tried again now
    too_large: float = math.inf  # the least size that was refused since the last session ended
    probe: Ticket | None = None  # a smaller one that is tried beyond the limit
    timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """How many run."""
        return self.shares.total()

    def start(self, ticket: Ticket) -> None:
        """It runs now."""
        ticket.running, ticket.launched = True, time.monotonic()
        self.launched += 1
        self.shares[ticket.share] += 1

    def stop(self, ticket: Ticket) -> None:
        """It runs no more."""
        ticket.running = False
        self.shares[ticket.share] -= 1
        self.probe = None if self.probe is ticket else self.probe

    def holds_back(self, ticket: Ticket, beside: Ticket | None = None) -> bool:
        """Whether it stays queued because its like hold all slots that they may. `beside`: one that would end."""
        held = sum(count for share, count in self.shares.items() if share <= ticket.share)
        held -= beside is not None and beside.share <= ticket.share
        return ticket.share < 1 and held >= max(math.ceil(ticket.share * self.limit), 1)

    def candidates(self) -> list[Ticket]:
        """Those that may be tried now."""
        if self.running >= self.limit and (self.too_large == math.inf or self.probe is not None):
            return []
        here = (each for each in self.refused if each.granted is not None or not each.preempted)
        # The first may be on its way to the queue.
        overdue = [each for each in here if each.passed >= _PASSES and not self.holds_back(each)][:1]
        found = [ticket for ticket in overdue or self.waiting if ticket.granted is not None and not ticket.running]
        return [ticket for ticket in found if ticket.size < self.too_large and not self.holds_back(ticket)]


class Admission:
    """Decides which calls start now, which are queued, and which are refused."""

    def __init__(self, limits: CoordinatorLimits, metrics: Metrics, shared: bool = True):
        """`shared`: other coordinators may call the same stages."""
        self._limits, self._refusals, self._shared = limits, metrics.refused, shared
        self._queues = {name: _Queue(limits.max_running, limits.max_running) for name in (*NAMES, COORDINATOR)}
        self._queues[_LARGE_ANSWERS] = _Queue(1, 1)
        self._present: Counter[str] = Counter()  # calls by caller, waiting ones included
        self._working: Counter[str] = Counter()  # those that have begun
        self._pace = 1.0  # seconds between two calls that end, were all slots taken; running mean
        self._measured = 0  # calls it is the mean of
        self._depths = {name: metrics.queue_depth.labels(name) for name in (*NAMES, COORDINATOR)}
        self._gauge = metrics.running.labels(COORDINATOR)

    @property
    def running(self) -> int:
        """Calls at work."""
        return self._working.total()

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return sum(len(queue.waiting) for queue in self._queues.values())

    def follow(self, capacities: Mapping[str, int]) -> None:
        """How many sessions the replicas of each stage take together; 0: they do not say."""
        for name, reported in capacities.items():
            queue, capacity = self._queues[name], reported or self._limits.max_running
            if queue.capacity != capacity:
                queue.limit = min(queue.limit + max(capacity - queue.capacity, 0), capacity)
                queue.capacity = capacity
        self._dispatch()

    @asynccontextmanager
    async def slot(
        self, call: Call, stage: str = COORDINATOR, size: int = 0, brief: bool = False, slow: bool = False
    ) -> AsyncIterator[Ticket]:
        """Work inside, with the ticket for a session of that size at the stage. Raises Overloaded at once when the
        queue is full or the caller has too many calls, and after waiting too long; DeadlineExceeded when the call's
        deadline comes first. `brief`: the call tells nothing of how long others take. `slow`: see `Ticket`."""
        self.check(call, stage)
        self._present[call.caller] += 1
        ticket = Ticket(call, stage, size, first=True, slow=slow)
        try:
            await self.enter(ticket)
            started, beside = time.monotonic(), self.running
            yield ticket
            if not brief:
                self._learn_pace((time.monotonic() - started) / ((beside + self.running) / 2))
        finally:
            self._present -= Counter([call.caller])
            self._rest(ticket)
            self.leave(ticket)

    async def enter(self, ticket: Ticket) -> None:
        """Wait until it may be tried at its stage; at once while it is."""
        if ticket.running:
            return
        since, ticket.granted = time.monotonic(), asyncio.get_running_loop().create_future()
        self._queues[ticket.stage].waiting.append(ticket)
        self._dispatch()
        try:
            await asyncio.wait([ticket.granted], timeout=self._patience(ticket))
            if not ticket.running:
                ticket.call.left()
                raise self._refusal("wait", f"{ticket.stage}: no slot was free in time", ticket.stage)
        except BaseException:
            self.leave(ticket)
            raise
        finally:
            ticket.granted, waited = None, time.monotonic() - since
            ticket.waited += waited
            ticket.call.waited += waited

    def leave(self, ticket: Ticket) -> None:
        """It waits no more, or its session has ended."""
        queue = self._queues[ticket.stage]
        if ticket.running:
            queue.too_large = math.inf
            queue.stop(ticket)
            if self._shared and queue.waiting and queue.launched >= _SHARE:
                queue.launched, queue.limit = 0, queue.running
                self._try_later(queue, 2 * self._limits.retry_seconds)
        elif ticket in queue.waiting:
            queue.waiting.remove(ticket)
        queue.refused = [other for other in queue.refused if other is not ticket]
        self._dispatch()

    def outlasts(self, ticket: Ticket) -> bool:
        """Whether a session should be preempted: it has had its slice, and a much smaller one waits for a slot."""
        if time.monotonic() - ticket.launched < self._limits.slice_seconds * min(ticket.size / _LARGE, 1):
            return False  # a small one is soon where it was
        queue = self._queues[ticket.stage]
        waiting = (other for other in queue.waiting if not (other.preempted or queue.holds_back(other, ticket)))
        return any(_MUCH_SMALLER * other.size <= ticket.size for other in waiting)

    def preempt(self, ticket: Ticket) -> None:
        """Its session has ended so that others get its slot; `enter` waits for another one. At most 16 later sessions
        are launched before it."""
        ticket.preempted, ticket.taken, ticket.passed = True, False, 0
        self._rest(ticket)
        self.leave(ticket)
        self._queues[ticket.stage].refused.append(ticket)

    def taken(self, ticket: Ticket) -> None:
        """The stage took it, as its first answer tells."""
        if ticket.taken or not ticket.running:
            return
        ticket.taken, queue = True, self._queues[ticket.stage]
        queue.refused = [other for other in queue.refused if other is not ticket]
        for other in queue.refused:
            other.passed += other.call.arrived < ticket.call.arrived
        if queue.probe is ticket:
            queue.probe, queue.limit = None, max(queue.limit, queue.running)
        self._dispatch()

    def refused(self, ticket: Ticket, retry_after: float) -> None:
        """All replicas of the stage refused it; `enter` waits until it is tried again."""
        queue = self._queues[ticket.stage]
        ticket.taken = False
        queue.stop(ticket)
        queue.limit, queue.too_large = queue.running, min(queue.too_large, ticket.size)
        if ticket not in queue.refused:
            queue.refused.append(ticket)
        shortest = self._limits.retry_seconds
        self._try_later(queue, min(max(retry_after, shortest), shortest * _LONGEST_PAUSE))
        self._dispatch()

    def _try_later(self, queue: _Queue, pause: float) -> None:
        if queue.timer is not None:
            queue.timer.cancel()
        seconds = pause * random.uniform(0.5, 1.0)
        queue.timer = asyncio.get_running_loop().call_later(seconds, self._try_again, queue, pause)

    def _try_again(self, queue: _Queue, pause: float) -> None:
        """Sessions of other coordinators may have ended: one more is tried at a time, until the stage is full again."""
        queue.timer, queue.too_large = None, math.inf
        queue.limit = min(max(queue.limit, queue.running + 1), queue.capacity) if queue.waiting else queue.capacity
        if queue.limit < queue.capacity:
            self._try_later(queue, pause)
        self._dispatch()

    def _dispatch(self) -> None:
        while ticket := self._next():
            queue = self._queues[ticket.stage]
            queue.waiting.remove(ticket)
            if queue.running >= queue.limit:
                queue.probe = ticket
            if ticket.preempted:  # others need not wait until the stage takes it
                queue.refused.remove(ticket)
            queue.start(ticket)
            if ticket.begins:
                self._working[ticket.call.caller] += 1
            ticket.at_work, ticket.preempted = ticket.first, False
            assert ticket.granted is not None, "a ticket that waits has a future"
            ticket.granted.set_result(None)
        self._report()

    def _rest(self, ticket: Ticket) -> None:
        """Its call is not at work any more."""
        if ticket.at_work:
            ticket.at_work = False
            self._working -= Counter([ticket.call.caller])

    def _next(self) -> Ticket | None:
        """The one that is tried now, of all queues: of the callers with the fewest calls at work the first to come."""

        def order(ticket: Ticket) -> tuple[bool, bool, int, float]:
            calls = self._working[ticket.call.caller] if ticket.begins else 0
            return not ticket.resuming or ticket.preempted, ticket.preempted, calls, ticket.call.arrived

        may_begin = self.running < self._limits.max_running
        found = (ticket for queue in self._queues.values() for ticket in queue.candidates())
        return min((ticket for ticket in found if may_begin or not ticket.begins), key=order, default=None)

    def _report(self) -> None:
        waiting = {name: len(queue.waiting) for name, queue in self._queues.items()}
        waiting[COORDINATOR] += waiting.pop(_LARGE_ANSWERS)
        if self.running >= self._limits.max_running:  # more coordinators are lacking, not more of a stage
            for name in NAMES:
                begins = sum(ticket.begins for ticket in self._queues[name].waiting)
                waiting[name] -= begins
                waiting[COORDINATOR] += begins
        for name, count in waiting.items():
            self._depths[name].set(count)
        self._gauge.set(self.running)

    def _patience(self, ticket: Ticket) -> float | None:
        left = ticket.call.left()
        if ticket.call.admitted:
            return left
        if ticket.resuming:
            return _RESUMED_SECONDS if left is None and not ticket.preempted else left
        patience = max(self._limits.queue_seconds - ticket.waited, 0.0)
        return patience if left is None else min(left, patience)

    async def read_in_time(self, call: Call, reading: asyncio.Future[None]) -> None:
        """Wait until a response of the call is read. While it is not and others wait, its sessions are preempted; once
        that has lasted for `idle_seconds` this raises Unavailable, and the call ends."""
        seconds, since, preempted = self._limits.idle_seconds, time.monotonic(), False
        while not (await asyncio.wait([reading], timeout=min(_UNREAD_LOOK, seconds)))[0]:
            if self.waiting:
                preempted = True
                call.preempt(reading)  # at each look: it may have been given a slot again
            if preempted and time.monotonic() - since >= seconds:
                error = Unavailable(f"not read for {seconds:g} s while others waited")
                self._refusals.labels(COORDINATOR, "idle").inc()
                cancellation.end_call(error)
                raise error

    def check(self, call: Call, stage: str = COORDINATOR) -> None:
        """Raise Overloaded when queue or caller are full. `slot` does it too; this is for before the first work."""
        limits, queue = self._limits, self._queues[stage]
        if limits.max_per_key and self._present[call.caller] >= limits.max_per_key and not call.admitted:
            raise self._refusal("key", f"{limits.max_per_key} calls of this client are under way, its limit", stage)
        if call.admitted or (queue.running < queue.limit and self.running < limits.max_running):
            return
        counts = f"{self.running} calls run and {self.waiting} wait"
        if self.waiting + 1 > limits.max_waiting:
            raise self._refusal("queue", f"{counts}, the limits", stage)
        if self._too_long(queue):
            raise self._refusal("queue", f"{counts}, which takes too long", stage)

    def left_to(self, call: Call, most: int) -> int:
        """How many of `most` calls its caller may have beside those under way; one at least, which may be refused."""
        bound = self._limits.max_per_key
        return max(min(most, bound - self._present[call.caller]), 1) if bound else most

    def _too_long(self, queue: _Queue) -> bool:
        """Whether one more call would likely wait in vain. Estimates err, so half the patience counts; before the first
        call has ended there is none, and one round may wait."""
        if not self._measured:
            return len(queue.waiting) >= max(queue.limit, _FIRST_ROUND)
        return bool(queue.waiting) and self._wait(queue) > self._limits.queue_seconds / 2

    def _wait(self, queue: _Queue) -> float:
        """Seconds that one more call would wait: the queue before it, at the mean pace so far."""
        return (len(queue.waiting) + 1) * self._pace

    def _refusal(self, reason: str, message: str, stage: str) -> Overloaded:
        self._refusals.labels(COORDINATOR, reason).inc()
        _log.debug("refused: %s; %s; one ends each %.2f s", reason, message, self._pace)
        return Overloaded(message, min(max(self._wait(self._queues[stage]), _SHORTEST_HINT), _LONGEST_HINT))

    def _learn_pace(self, seconds: float) -> None:
        """A call ended well, its time shared among those that ran beside it. One that was left early tells nothing."""
        self._measured += 1
        self._pace += max(_WEIGHT, 1 / self._measured) * (seconds - self._pace)
