"""Admission, steps and the isolation of failures, common to the three engines."""

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from colaserve_services.engine import kv_budget
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.failures import NotFinite, brief, check_finite, out_of_memory, traceback_of
from colaserve_services.engine.limits import EngineLimits, Load
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.prefix_cache import Prefixes
from colaserve_services.engine.session import Session
from colaserve_services.errors import AT_FAULT, ColaserveError, DeadlineExceeded, Overloaded, StepFailed, Unavailable


class Turn(Protocol):
    """What one session sends through a pass."""

    @property
    def session(self) -> Any: ...
    @property
    def rows(self) -> int: ...


S = TypeVar("S", bound=Session[Any])
T = TypeVar("T", bound=Turn)

_log = logging.getLogger(__name__)

_SMOOTHING = 0.1  # weight of a new step in the running estimate of the work rate
_NO_MEMORY = "the device has no memory left for this session"


class Engine(Generic[S, T]):
    """Sessions wait in order of arrival, run together while slots and KV memory last, and leave between steps.

    A pass that raises is run again in halves until one session alone fails. Then the warm-up row decides: the engine
    computes it, and that session ends as `StepFailed`; or it does not, and the engine is at fault: all its sessions end
    as `Unavailable`, and it takes no others until it computes the row again.
    """

    prefixes: Prefixes

    def __init__(self, device: DeviceThread, limits: EngineLimits, observer: EngineObserver):
        self.limits = limits
        self.observer = observer
        self._device = device
        self._lock = threading.Lock()  # guards the five below
        self._waiting: deque[S] = deque()
        self._running: list[S] = []
        self._kv_used = 0
        self._work_queued = 0.0
        self._look_again: float | None = None  # when (time.monotonic) an engine at fault tries its warm-up row again
        self._passes = 0
        self._work_rate = 0.0  # work units a second, running estimate
        device.register(self)

    def wake(self) -> None:
        """A session may have become ready."""
        self._device.wake()

    def load(self) -> Load:
        with self._lock:
            return Load(len(self._running), len(self._waiting), self._kv_used)

    def check_computes(self) -> None:
        """Raise Unavailable while the engine is at fault."""
        if self._look_again is not None:
            raise Unavailable(AT_FAULT)

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
            self.check_computes()
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
        if self._look_again is not None and not self._works_again():
            return False
        self._start_waiting()
        while self._waiting and (self._give_up_idle() or self._pause_large()):
            self._start_waiting()
        ready = self._ready()
        if not ready:
            return False
        started = time.monotonic()
        turns = self._turns(sorted(ready, key=lambda session: (session.served, session.remaining())))
        self._passes += 1
        for turn in turns:
            turn.session.served = self._passes
        self._run(turns)
        rows, seconds = sum(turn.rows for turn in turns), time.monotonic() - started
        self._record_rate(rows, seconds)
        self.observer.stepped(seconds, rows, len(turns))
        self._release_ended()
        return True

    def _turns(self, ready: list[S]) -> list[T]:
        """What one pass does for the ready sessions; a long context takes several.

        `ready` begins with those that were served longest ago, of newcomers those with the shortest contexts: when a
        pass takes in as much as it can in this order, no context waits for the whole of another.
        """
        raise NotImplementedError

    def _compute(self, turns: list[T]) -> Sequence[Any]:
        """One pass; a result for each turn. It changes no session, so it can run again, for some of the turns too."""
        raise NotImplementedError

    def _take(self, turn: T, result: Any) -> None:
        """Hand its result to a session. Raises instead of handing over what is no number, or no latents."""
        raise NotImplementedError

    def _warm_up_row(self) -> Sequence[Tensor | None]:
        """Compute one row, without a session; its numbers."""
        raise NotImplementedError

    def _run(self, turns: list[T]) -> None:
        """One pass; when it raises, its halves again, until one session alone fails."""
        turns = [turn for turn in turns if not turn.session.finished]
        if not turns:
            return
        self._device.expect((type(self), len(turns), sum(turn.rows for turn in turns)))
        try:
            results = self._compute(turns)
        except Exception as error:
            if len(turns) == 1:
                self._failed(turns[0].session, error)
                return
            if out_of_memory(error):
                self._free_memory()
            half = len(turns) // 2
            self._run(turns[:half])
            self._run(turns[half:])
            return
        for turn, result in zip(turns, results, strict=True):
            if not turn.session.finished:  # as all are when the engine turned out to be at fault
                with self._alone(turn.session):
                    self._take(turn, result)

    @contextmanager
    def _alone(self, session: S) -> Iterator[None]:
        """What is raised inside ends this session and no other."""
        try:
            yield
        except Exception as error:
            self._failed(session, error)

    def _failed(self, session: S, error: Exception) -> None:
        """End a session that failed alone, or all when the warm-up row fails too."""
        if out_of_memory(error):
            self._refuse(session)
            return
        if session.wanted:
            line = "a step failed with one session alone: %s"
            session.log(_log, logging.ERROR, line, brief(error), of=traceback_of(error))
        self.observer.step_failed()
        if isinstance(error, NotFinite):
            self._distrust_kept()
        try:
            self._check_warm_up_row()
        except Exception as fault:
            if out_of_memory(fault):
                self._refuse(session)
            else:
                self._at_fault(fault)
            return
        self._end(session, StepFailed(f"this request's step failed ({brief(error)}), and the engine computes others"))

    def _refuse(self, session: S) -> None:
        """There is no memory for a session; the others' state is whole."""
        _log.warning("%s; it is refused", _NO_MEMORY)
        self._free_memory()
        self._end(session, Overloaded(_NO_MEMORY, 1.0))
        self.observer.refused("kv")

    def _check_warm_up_row(self) -> None:
        self._device.expect((type(self), "warm-up"))
        check_finite("the numbers of the warm-up row", *self._warm_up_row())

    def _at_fault(self, error: Exception) -> None:
        """End all sessions, and take no others until the warm-up row is computed again."""
        _log.critical("the engine is at fault: %s; neither ready nor alive", brief(error), exc_info=traceback_of(error))
        with self._lock:  # no session comes in afterwards
            self._look_again = time.monotonic() + self.limits.look_again_seconds
        self.observer.failing(True)
        for session in self._sessions():
            self._end(session, Unavailable(f"the engine is at fault: {brief(error)}"))

    def _works_again(self) -> bool:
        """Whether an engine that was at fault computes its warm-up row; tried now and then."""
        now = time.monotonic()
        if self._look_again is None or now < self._look_again:
            return False
        try:
            self._check_warm_up_row()
        except Exception:
            self._look_again = now + self.limits.look_again_seconds
            return False
        self._look_again = None
        self.observer.failing(False)
        _log.warning("the engine computes its warm-up row again")
        return True

    def next_deadline(self) -> float | None:
        with self._lock:
            due = [s.deadline for s in (*self._waiting, *self._running) if s.deadline is not None]
            if self._waiting:
                due += [s.idle_since + self.limits.idle_seconds for s in self._running if s.idle_since < math.inf]
                now = time.monotonic()
                due += [at for s in self._running if (at := s.holds_since + kv_budget.HOLDS_AT_LEAST) > now]
        if self._look_again is not None:
            due.append(self._look_again)
        return min(due, default=None)

    def fail(self, error: Exception) -> None:
        """The engine itself failed, so the state of all its sessions is unknown."""
        self._at_fault(error)
        self._release_ended()

    def _end(self, session: S, error: ColaserveError) -> None:
        if not session.finished:
            session.outbox.fail(error)
        session.finished = True

    def _ready(self) -> list[S]:
        """The running sessions that a pass would bring on."""
        ready, now = [], time.monotonic()
        for session in self._running:
            if not session.ready():
                session.idle_since = min(session.idle_since, now)
                continue
            if session.idle_since < math.inf:
                session.idle_since = math.inf
                session.went_on()
            ready.append(session)
        return ready

    def _give_up_idle(self) -> bool:
        """End the session that has had nothing to compute for longest, if that is too long while others wait: its
        reader is away, or sends nothing. Its caller may go on with another one."""
        idle = [session for session in self._running if not session.ready()]
        session = min(idle, key=lambda session: session.idle_since, default=None)
        if session is None or time.monotonic() - session.idle_since < self.limits.idle_seconds:
            return False
        session.give_up(Unavailable(f"nothing to compute for {self.limits.idle_seconds:g} s while others wait"))
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
        try:
            session.free()
        except Exception:  # what it held is forgotten either way
            _log.exception("a session's memory could not be given back in good order")
        self._report()

    def _start_waiting(self) -> None:
        while (session := self._next_to_start()) is not None:
            session.holds_since = time.monotonic()
            session.started = session.started or session.holds_since
            with self._alone(session):
                session.start()
            if session.finished:
                self._release_ended()
            self._report()
        if self._waiting:  # they do not fit; whoever watches shall know, though nothing starts
            self._report()

    def _distrust_kept(self) -> None:
        """A result was no number, and so may be what earlier results left behind."""
        self.prefixes.forget()

    def _free_memory(self) -> None:
        """Give up what is only kept because it may be of use."""
        self.prefixes.forget()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _next_to_start(self) -> S | None:
        """First come, first served; but smaller ones pass a session that does not fit yet, at most 16 times."""
        with self._lock:
            if len(self._running) >= self.limits.max_running:
                return None
            session = kv_budget.first_to_fit(self._waiting, self.limits.kv_bytes - self._kv_used)
            if session is None:
                return None
            for earlier in itertools.takewhile(lambda other: other is not session, self._waiting):
                earlier.passed += 1
            session.passed = 0
            self._waiting.remove(session)
            self._running.append(session)
            self._kv_used += session.kv_bytes
            return session

    def _pause_large(self) -> bool:
        """Pause a session whose KV others need: it waits behind them, and is written again from its latents."""
        with self._lock:
            if len(self._running) >= self.limits.max_running:
                return False
            session = kv_budget.to_pause(self._running, self._waiting, self._kv_used, self.limits.kv_bytes)
            if session is None:
                return False
            self._running.remove(session)
            self._kv_used -= session.kv_bytes
            self._waiting.append(session)
        session.idle_since = math.inf
        with self._alone(session):
            session.pause()
        return True

    def _report(self) -> None:
        load = self.load()
        self.observer.queued(load.waiting, load.running)
        self.observer.kv(load.kv_bytes_used, self.limits.kv_bytes)

    def _record_rate(self, rows: int, seconds: float) -> None:
        rate = rows / max(seconds, 1e-6)
        self._work_rate += (rate - self._work_rate) * (_SMOOTHING if self._work_rate else 1.0)
