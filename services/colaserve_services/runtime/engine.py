"""Admission and turn-taking, common to the three engines."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import torch

from colaserve_services.errors import ColaserveError, DeadlineExceeded, Overloaded, Unavailable
from colaserve_services.runtime.device import DeviceThread
from colaserve_services.runtime.limits import EngineLimits, Load
from colaserve_services.runtime.observer import EngineObserver
from colaserve_services.runtime.prefix_cache import Prefixes
from colaserve_services.runtime.session import Session

S = TypeVar("S", bound=Session[Any])

_log = logging.getLogger(__name__)

_SMOOTHING = 0.1  # weight of a new step in the running estimate of the work rate
_SUSPECT = 3  # failed steps in a row, after which it may be no session's fault


class Engine(Generic[S]):
    """Sessions wait in order of arrival, run together while slots and KV memory last, and leave between steps."""

    prefixes: Prefixes

    def __init__(self, device: DeviceThread, limits: EngineLimits, observer: EngineObserver):
        self.limits = limits
        self.observer = observer
        self._device = device
        self._lock = threading.Lock()  # guards the four below
        self._waiting: deque[S] = deque()
        self._running: list[S] = []
        self._kv_used = 0
        self._work_queued = 0.0
        self._work_rate = 0.0  # work units a second, running estimate
        self._failed = 0  # steps in a row
        device.register(self)

    def wake(self) -> None:
        """A session may have become ready."""
        self._device.wake()

    def load(self) -> Load:
        with self._lock:
            return Load(len(self._running), len(self._waiting), self._kv_used)

    # The caller's side: any event loop.

    @asynccontextmanager
    async def _admitted(self, session: S) -> AsyncIterator[S]:
        """Hold a session while inside; leaving frees it, however one leaves. Raises `Overloaded`."""
        async with self._all_admitted([session]):
            yield session

    @asynccontextmanager
    async def _all_admitted(self, sessions: list[S]) -> AsyncIterator[None]:
        """Hold the sessions of one call: they are let in together or not at all."""
        self._admit(sessions)
        try:
            yield
        finally:
            for session in sessions:
                session.cancel()
            self._device.wake()

    def _admit(self, sessions: list[S]) -> None:
        with self._lock:
            waiting = [session for session in self._waiting if session.wanted]
            present = len(waiting) + sum(session.wanted for session in self._running)
            work = self._share(waiting)
            many = present >= self.limits.max_running + self.limits.max_waiting
            large = bool(waiting) and work + self._share(sessions) > self.limits.max_waiting_work
            retry_after = self._retry_after()
            if not (many or large):
                self._waiting.extend(sessions)
                self._work_queued += sum(session.work for session in sessions)
        if many or large:
            self.observer.refused("queue")
            work_waits = f"{work:.0f} units of work (latents * steps * passes) wait already"
            raise Overloaded(f"{present} sessions run or wait already" if many else work_waits, retry_after)
        self._device.wake()

    def _share(self, sessions: list[S]) -> float:
        """What they take of the bound of waiting work: no session more than half, or one could keep out all others."""
        return sum(min(session.work, self.limits.max_waiting_work / 2) for session in sessions)

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free: the queue's work over the measured rate, a share."""
        if self._work_rate == 0:
            return 1.0
        places = max(1, len(self._waiting) + len(self._running))
        return min(60.0, max(0.1, self._work_queued / self._work_rate / places))

    # The device thread's side.

    def step(self) -> bool:
        """Let sessions leave and join, then bring those that are ready one forward pass on."""
        self._release_ended()
        self._start_waiting()
        while self._waiting and self._give_up_idle():
            self._start_waiting()
        ready = self._ready()
        if not ready:
            return False
        started = time.monotonic()
        rows, sessions = self._forward(ready)
        seconds = time.monotonic() - started
        self._record_rate(rows, seconds)
        self._failed = 0
        self.observer.stepped(seconds, rows, sessions)
        self._release_ended()
        return True

    def _forward(self, ready: list[S]) -> tuple[int, int]:
        """One pass for (a fair part of) the ready sessions; rows computed and sessions served."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        with self._lock:
            due = [s.deadline for s in (*self._waiting, *self._running) if s.deadline is not None]
            if self._waiting:
                due += [s.idle_since + self.limits.idle_seconds for s in self._running if s.idle_since < math.inf]
        return min(due, default=None)

    def fail(self, error: Exception) -> None:
        """End the running sessions: a step failed, so their state is unknown."""
        self._failed += 1
        if self._failed % _SUSPECT == 0:
            self.observer.failing()
        if isinstance(error, torch.OutOfMemoryError):
            self._free_memory()
        told = error if isinstance(error, ColaserveError) else Unavailable(f"the engine failed: {type(error).__name__}")
        for session in self._running:
            self._end(session, told)
        self._release_ended()

    def _end(self, session: S, error: ColaserveError) -> None:
        session.outbox.fail(error)
        session.finished = True

    def _ready(self) -> list[S]:
        """The running sessions that a pass would bring on."""
        ready, now = [], time.monotonic()
        for session in self._running:
            if session.ready():
                if session.idle_since < math.inf:
                    session.idle_since = math.inf
                    session.went_on()
                ready.append(session)
            else:
                session.idle_since = min(session.idle_since, now)
        return ready

    def _give_up_idle(self) -> bool:
        """End the session that has had nothing to compute for longest, if that is too long while others wait: its
        reader is away, or sends nothing. Its caller may go on with another one."""
        idle = [session for session in self._running if not session.ready()]
        session = min(idle, key=lambda session: session.idle_since, default=None)
        if session is None or time.monotonic() - session.idle_since < self.limits.idle_seconds:
            return False
        self._end(session, Unavailable(f"nothing to compute for {self.limits.idle_seconds:g} s while others wait"))
        self.observer.refused("idle")
        self._release(session)
        return True

    def _sessions(self) -> list[S]:
        with self._lock:
            return [*self._waiting, *self._running]

    def _release_ended(self) -> None:
        now = time.monotonic()
        for session in self._sessions():
            if session.deadline is not None and now >= session.deadline and not session.finished:
                self._end(session, DeadlineExceeded("the deadline passed before the work was done"))
                self.observer.refused("deadline")
            if session.cancelled or session.finished:
                self._release(session)

    def _release(self, session: S) -> None:
        with self._lock:
            self._work_queued = max(0.0, self._work_queued - session.work)
            if session in self._running:
                self._running.remove(session)
                self._kv_used -= session.kv_bytes
            else:
                self._waiting.remove(session)
        session.finished = True
        session.free()
        self._report()

    def _start_waiting(self) -> None:
        while (session := self._next_to_start()) is not None:
            session.started = time.monotonic()
            try:
                session.start()
            except torch.OutOfMemoryError:  # the others' state is whole
                _log.exception("no memory for a session's KV; it is refused")
                self._free_memory()
                self._end(session, Overloaded("the device has no memory left for this session", 1.0))
                self.observer.refused("kv")
                self._release(session)
            self._report()
        if self._waiting:  # they do not fit; whoever watches shall know, though nothing starts
            self._report()

    def _free_memory(self) -> None:
        """Give up what is only kept because it may be of use."""
        self.prefixes.forget()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _next_to_start(self) -> S | None:
        """First come, first served: a large session at the head waits for room rather than being overtaken for ever."""
        with self._lock:
            if not self._waiting or len(self._running) >= self.limits.max_running:
                return None
            session = self._waiting[0]
            if self._kv_used + session.kv_bytes > self.limits.kv_bytes:
                return None
            self._waiting.popleft()
            self._running.append(session)
            self._kv_used += session.kv_bytes
            return session

    def _report(self) -> None:
        load = self.load()
        self.observer.queued(load.waiting, load.running)
        self.observer.kv(load.kv_bytes_used, self.limits.kv_bytes)

    def _record_rate(self, rows: int, seconds: float) -> None:
        rate = rows / max(seconds, 1e-6)
        self._work_rate += (rate - self._work_rate) * (_SMOOTHING if self._work_rate else 1.0)
