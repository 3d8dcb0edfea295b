"""Steps and the isolation of failures, common to the three engines."""

import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, TypeVar

import torch

from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.failures import NotFinite, brief, check_finite, lost_device, out_of_memory, traceback_of
from colaserve_services.engine.limits import EngineLimits, Load
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.passes import BETWEEN_LOOKS, Running, ScheduledSession, heavy_part
from colaserve_services.engine.session import Session
from colaserve_services.engine.sessions import Sessions
from colaserve_services.errors import AT_FAULT, ColaserveError, DeadlineExceeded, Overloaded, StepFailed, Unavailable
from colaserve_services.model.backend import Failed, Pass, Sizes
from colaserve_services.model.backend.pick import Picked, pick

S = TypeVar("S", bound=Session[Any])
T = TypeVar("T", bound=ScheduledSession)

_log = logging.getLogger(__name__)

# Heavy work is that of a session with more blocks to take in than writing one takes rows, or whose blocks attend to so
# much that they cost so many times those that attend to none.
_LONG, _MUCH = 32, 3.0
_NO_MEMORY = "the device has no memory left for this session"


class Engine(Generic[S, T]):
    """Sessions start at the next step or are refused at once, run together, and leave between steps.

    A pass that raises is run again in halves until one session alone fails. Then the warm-up row decides: the engine
    computes it, and that session ends as `StepFailed`; or it does not, and the engine is at fault: all its sessions end
    as `Unavailable`, and it takes no others until it computes the row again.

    While a pass runs, its thread is free for others. A second one may already be queued behind it, for sessions that
    need nothing of what it gives; whoever joins or leaves does so when none runs.
    """

    def __init__(
        self,
        stage: str,
        model: Any,
        shape: Any,
        device: DeviceThread,
        limits: EngineLimits,
        observer: EngineObserver | None,
        picked: Picked | None,
    ):
        """`shape`: a ModelShape; `picked`: another backend than the fastest for the model's device and dtype."""
        self.model, self.shape, self.picked = model, shape, picked or pick(model.device, model.dtype)
        sizes = Sizes(limits.kv_bytes, limits.max_running, shape.block_size, limits.max_context)
        self.backend: Any = getattr(self.picked, stage)(model, sizes)
        self.kv_blocks = self.backend.pages.count
        self.limits = limits.fitting(shape.block_size, self.kv_blocks, self.backend.page_bytes)
        self.observer = observer or EngineObserver()
        self._device = device
        self._sessions: Sessions[S] = Sessions(self.limits, self.backend.pages, self.observer.refused)
        self._slots = list(range(limits.max_running))  # without a session
        self._look_again: float | None = None  # when (time.monotonic) an engine at fault tries its warm-up row again
        self._passes, self._reported = 0, Load(0, 0)
        self._running: list[Running[T]] = []
        self.observer.load(0, 0, self.limits.kv_bytes)
        device.register(self)

    def chosen(self) -> dict[str, Any]:
        """What it computes with, and why; how many latents its KV cache holds."""
        kv = {"kv_latents": self.kv_blocks * self.shape.block_size, "kv_bytes": self.limits.kv_bytes}
        return {"backend": self.picked.name, "why": self.picked.why, **kv}

    @property
    def computes(self) -> bool:
        """Whether a pass runs."""
        return len(self._running) > 0

    def wake(self) -> None:
        """A session may have become ready."""
        self._device.wake()

    def load(self) -> Load:
        """How busy it is. Any thread."""
        return Load(len(self._sessions), self.backend.pages.held * self.backend.page_bytes)

    def check_computes(self) -> None:
        """Raise Unavailable while the engine is at fault."""
        if self._look_again is not None:
            raise Unavailable(AT_FAULT)

    @asynccontextmanager
    async def _admitted(self, session: S) -> AsyncIterator[S]:
        """Hold a session while inside; leaving frees it, however one leaves. Raises `Overloaded`."""
        self._sessions.add(session, self.check_computes)
        self._device.wake()
        try:
            yield session
        finally:
            session.cancel()
            self._device.wake()

    # What an engine adds; all on the device thread.

    def _schedule(self, ready: list[S]) -> list[T]:
        """What one pass does for the ready sessions; a long context takes several.

        `ready` begins with those that were served longest ago, of newcomers those with the shortest contexts: when a
        pass takes in as much as it can in this order, no context waits for the whole of another.
        """
        raise NotImplementedError

    def _begin(self, scheduled: list[T]) -> Pass:
        """Start one pass. It changes no session, so it can run again, for some of them too."""
        raise NotImplementedError

    def _ahead(self, running: Running[T]) -> list[S]:
        """Sessions for a pass behind the one that runs: those that need nothing of what it gives have moved on."""
        return []

    def _results(self, scheduled: list[T], found: Sequence[Any]) -> Sequence[Any]:
        """A result for each session, of those of a pass."""
        raise NotImplementedError

    def _take(self, scheduled: T, result: Any) -> None:
        """Hand its result to a session. Raises instead of handing over what is no number, or no latents."""
        raise NotImplementedError

    # The device thread's loop.

    def step(self, heavy: bool) -> bool:
        """Let sessions leave and join, then start one forward pass for those that are ready. False while one runs."""
        before = len(self._running)
        if not self._landed():
            return len(self._running) < before and self._launch(self._ahead(self._running[0]), heavy)
        self._release_ended()
        if not self._works_again():
            return False
        self._preempt_and_start()
        if not self._launch(self._grown(self._ready()), heavy):
            return False
        if self._landed():
            self._release_ended()
        else:
            self._launch(self._ahead(self._running[0]), heavy)
        return True

    def _launch(self, ready: list[S], heavy: bool) -> bool:
        """Start one forward pass for some of these; False if there are none."""
        long = {each for each in ready if each.remaining() > _LONG or self.backend.cost(each.cached) > _MUCH}
        if not (ready := [session for session in ready if heavy or session not in long]):
            return False
        started = time.monotonic()
        scheduled = self._schedule(sorted(ready, key=lambda session: (session.served, session.remaining())))
        part = heavy_part(scheduled, long, self.backend.cost)
        self._passes += 1
        for each in scheduled:
            each.session.served = self._passes
        if scheduled := [each for each in scheduled if not each.session.finished]:
            self._running.append(Running(scheduled, self._begun(scheduled), started, part))
        return True

    def next_deadline(self) -> float | None:
        """When a session's deadline passes, an engine at fault tries again, or a pass may be done."""
        if self._running:
            return time.monotonic() + BETWEEN_LOOKS
        due = [session.deadline for session in self._sessions.all if session.deadline is not None]
        return min(due if self._look_again is None else [*due, self._look_again], default=None)

    def _preempt_and_start(self) -> None:
        for session in self._sessions.all:
            if session.holds_kv and not session.reserves:
                self._preempt(session)
        self._sessions.reserve_again()
        for session in self._sessions.all:
            if session.reserves and not session.holds_kv and session.wanted:
                with self._alone(session):
                    self._start(session)
        self._release_ended()

    def _start(self, session: S) -> None:
        """Give a session its slot, and pages for what it has so far: those that hold its leading blocks, and others."""
        if session.slot < 0:
            if not self._slots:  # one that ended has it until the next step
                return
            session.slot = self._slots.pop()
            session.begin()
        if self._sessions.awaits_other(session):
            return
        keys, pages = session.keys, self.backend.pages
        found, beside = pages.find(keys)
        others = pages.reserve(max(0, session.claim - len(found)))
        if others is None:
            pages.free(found)
            session.reserves = False
            return
        session.pages.extend(found + others)
        session.holds_kv, session.holds_since = True, time.monotonic()
        session.started = session.started or session.holds_since
        self.looked_up(keys, len(found))
        session.remembered = len(found)
        session.start(len(found), beside)

    def looked_up(self, keys: Sequence[bytes], found: int) -> None:
        """A session begins with blocks of these keys, of which so many were known."""
        if keys:
            self.observer.prefix_cache(found, len(keys) - found, self.backend.pages.known * self.backend.page_bytes)

    def remember(self, keys: Sequence[bytes], pages: Sequence[int], beside: Sequence[Any] = ()) -> None:
        """Leading blocks of a session are complete: others may begin with them."""
        self.backend.pages.remember(keys, pages, beside)
        self.observer.prefix_cache(0, 0, self.backend.pages.known * self.backend.page_bytes)

    def _preempt(self, session: S) -> None:
        session.reserves = session.holds_kv = False
        session.holds_since = session.idle_since = math.inf
        self._free_pages(session)
        self.observer.preempted()
        with self._alone(session):
            session.preempt()

    def _free_pages(self, session: S) -> None:
        self.backend.pages.free(session.pages)
        del session.pages[:]

    def _grown(self, ready: list[S]) -> list[S]:
        """Those that have pages for their next pass. When there are none left, the youngest give theirs back."""
        for session in sorted(ready, key=lambda each: each.arrived):
            while session.holds_kv and (lacking := session.lacking()) > 0:
                if (pages := self.backend.pages.reserve(lacking)) is None:
                    self._preempt(self._sessions.to_preempt())
                else:
                    session.pages.extend(pages)
        return [session for session in ready if session.holds_kv and not session.finished]

    def _ready(self) -> list[S]:
        """The sessions that a pass would compute something for."""
        ready, now = [], time.monotonic()
        for session in self._sessions.all:
            if not session.holds_kv:
                continue
            if not session.ready():
                session.idle_since = min(session.idle_since, now)
                continue
            if session.idle_since < math.inf:
                session.idle_since = math.inf
                session.resumed()
            ready.append(session)
        return ready

    def _release_ended(self) -> None:
        now = time.monotonic()
        for session in self._sessions.all:
            if session.deadline is not None and now >= session.deadline and not session.finished:
                self._end(session, DeadlineExceeded("the deadline passed before the work was done"))
                self.observer.refused("deadline")
            if not session.wanted:
                self._release(session)
        self._report()

    def _release(self, session: S) -> None:
        self._sessions.remove(session)
        session.finished = True
        self._free_pages(session)
        self.backend.pages.free(session.free())
        if session.slot >= 0:
            self._slots.append(session.slot)

    def _report(self) -> None:
        if (load := self.load()) != self._reported:
            self._reported = load
            self.observer.load(load.running, load.kv_bytes_used, self.limits.kv_bytes)

    # The isolation of failures.

    def _landed(self) -> bool:
        """Whether no pass runs any more; hands over what those gave that are done."""
        while self._running and self._running[0].over():
            running = self._running.pop(0)
            self._hand_over(running.scheduled, running.run)
            seconds, rows, sessions = running.figures()
            self._device.took(seconds, running.heavy)
            self.observer.stepped(seconds, rows, sessions)
        return not self._running

    def _begun(self, scheduled: list[T]) -> Pass:
        self._device.expect((type(self), len(scheduled), sum(each.rows for each in scheduled)))
        try:
            return self._begin(scheduled)
        except Exception as error:
            return Failed(error)

    def _hand_over(self, scheduled: list[T], run: Pass) -> None:
        """The results of a pass; when it raised, its halves run again, until one session alone fails."""
        try:
            results = self._results(scheduled, run.results())
        except Exception as error:
            if len(scheduled) == 1 or lost_device(error):
                self._failed(scheduled[0].session, error)
                return
            if out_of_memory(error):
                self._free_memory()
            half = len(scheduled) // 2
            for some in (scheduled[:half], scheduled[half:]):
                if some := [each for each in some if not each.session.finished]:
                    self._hand_over(some, self._begun(some))
            return
        for each, result in zip(scheduled, results, strict=True):
            session = each.session
            if not session.finished:  # as all are when the engine turned out to be at fault
                with self._alone(session):
                    self._take(each, result)
                    if (complete := min(session.cached, len(session.keys))) > session.remembered:
                        self.remember(session.keys[:complete], session.pages)
                        session.remembered = complete

    @contextmanager
    def _alone(self, session: S) -> Iterator[None]:
        """What is raised inside ends this session and no other."""
        try:
            yield
        except Exception as error:
            self._failed(session, error)

    def _failed(self, session: S, error: Exception) -> None:
        """End a session that failed alone, or all when the warm-up row fails too. Raises when the device is lost."""
        if lost_device(error):
            raise error
        if out_of_memory(error):
            self._refuse(session)
            return
        if session.wanted:
            line = "a step failed with one session alone: %s"
            session.log(_log, logging.ERROR, line, brief(error), of=traceback_of(error))
        self.observer.step_failed()
        if isinstance(error, NotFinite):
            self.backend.pages.forget()  # what is kept of earlier results may be none either
        try:
            self._check_warm_up_row()
        except Exception as fault:
            if lost_device(fault):
                raise
            if out_of_memory(fault):
                self._refuse(session)
            else:
                self.fail(fault)
            return
        self._end(session, StepFailed(f"this request's step failed ({brief(error)}), and the engine computes others"))

    def _refuse(self, session: S) -> None:
        """There is no memory for a session; the others' state is whole."""
        _log.warning("%s; it is refused", _NO_MEMORY)
        self._free_memory()
        self._end(session, Overloaded(_NO_MEMORY, 1.0))
        self.observer.refused("kv")

    def _free_memory(self) -> None:
        """Give up what is only kept because it may be of use."""
        self.backend.pages.forget()
        self.observer.prefix_cache(0, 0, 0)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _check_warm_up_row(self) -> None:
        self._device.expect((type(self), "warm-up"))
        check_finite("the numbers of the warm-up row", *self.backend.warm())

    def fail(self, error: Exception) -> None:
        """The engine is at fault: end all sessions, whose state is unknown, and take no others until the warm-up row is
        computed again."""
        _log.critical("the engine is at fault: %s; neither ready nor alive", brief(error), exc_info=traceback_of(error))
        self._look_again = time.monotonic() + self.limits.look_again_seconds
        self.observer.failing(True)
        for session in self._sessions.all:  # no other is added any more
            self._end(session, Unavailable(f"the engine is at fault: {brief(error)}"))

    def _works_again(self) -> bool:
        """Whether an engine computes its warm-up row, if it was at fault; tried now and then."""
        now = time.monotonic()
        if self._look_again is None or now < self._look_again:
            return self._look_again is None
        try:
            self._check_warm_up_row()
        except Exception:
            self._look_again = now + self.limits.look_again_seconds
            return False
        self._look_again = None
        self.observer.failing(False)
        _log.warning("the engine computes its warm-up row again")
        return True

    def _end(self, session: S, error: ColaserveError) -> None:
        if not session.finished:
            session.outbox.fail(error)
        session.finished = True
