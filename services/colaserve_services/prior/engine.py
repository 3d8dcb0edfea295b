"""The prior's engine: one forward pass serves blocks of many runs, each at its own step, both guidance branches."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.engine import Engine
from colaserve_services.engine.failures import NotFinite, OutOfBounds, check_latents
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.passes import Running
from colaserve_services.engine.session import Session
from colaserve_services.model.backend import Denoised, Pass, Row
from colaserve_services.model.backend.pages import chain_keys
from colaserve_services.model.backend.pick import Picked
from colaserve_services.model.config import ModelShape
from colaserve_services.model.dit import DiT
from colaserve_services.model.flow import schedule
from colaserve_services.prior.sampling_run import (
    Canvas,
    SampledBlock,
    SampleJob,
    SamplingRun,
    check_job,
    context_blocks,
)

B = TypeVar("B")
J = TypeVar("J", bound=SampleJob)
S = TypeVar("S", bound="PriorSession[Any]")

_ALONE_ROWS = 128  # of a context in a pass where nobody samples, at least: fewer would be slow
_CONTEXT_SHARE = 0.9  # what contexts may cost in a pass beside sampling sessions, of what those cost


class PriorSession(Session[B]):
    """A run, and what of its blocks waits to be read; iterate over it for that."""

    run: Any  # what `begun` gave

    def __init__(self, engine: "PriorEngine", job: SampleJob, deadline: float | None):
        self._engine, self.job = engine, job
        context = context_blocks(job, engine.shape.block_size)
        super().__init__(claim=context + 1, most=context + job.max_blocks, deadline=deadline, on_read=engine.wake)
        if engine.limits.share_prefixes:
            known = job.latents[: context * engine.shape.block_size].numpy()
            self.keys = chain_keys(known, context, job.cache_salt)
        self._wrote = False  # whether it wrote a block since it started last
        self._since = self.arrived  # when work on the current block became possible

    @property
    def cached(self) -> int:
        return self.run.committed

    def begin(self) -> None:
        canvas = Canvas.of(self.job, self._engine.shape.block_size)
        self.run = self.begun(canvas)
        self._engine.observer.tokens(canvas.context.shape[0] * canvas.context.shape[1], 0)

    def begun(self, canvas: Canvas) -> Any:
        """The run, a `Run` with its points."""
        raise NotImplementedError

    def steady(self) -> bool:
        """Whether it moves on without results but for a block's last."""
        return False

    def advance(self, results: list[Denoised]) -> None:
        """What came of the current points."""
        self.run.advance(results)
        self.deliver()

    def deliver(self) -> None:
        """Hand over completed blocks; given ones follow each other without a pass."""
        while self.run.finished is not None:
            self.outbox.put(self.completed(self.job.first_block + self.run.block))
            self._since, self._wrote = time.monotonic(), True
        if self.run.done:
            self.finished = True
            self.outbox.close()

    def completed(self, index: int) -> B:
        """What its reader gets of the block just completed, taken from the run."""
        raise NotImplementedError

    def start(self, known: int, beside: Sequence[Any]) -> None:
        self._engine.backend.prepare(schedule(self.job.sampler.steps))  # ends with the time of commits, 0
        self._wrote = False
        self.run.commit(known)
        self.deliver()

    def lacking(self) -> int:
        return self.run.blocks - len(self.pages)

    def remaining(self) -> int:
        return int(self.run.remaining)

    def preemptible(self) -> bool:
        return self._wrote or not self.ready()

    def preempt(self) -> None:
        self.run.rewind()
        self.claim = self.run.blocks

    def ready(self) -> bool:
        return not self.finished and self.outbox.unread < self._engine.limits.run_ahead

    def resumed(self) -> None:
        self._since = time.monotonic()  # its reader had been away

    async def __aiter__(self) -> AsyncIterator[B]:
        while (block := await self.outbox.get()) is not None:
            yield block


class SamplingSession(PriorSession[SampledBlock]):
    """A run that writes blocks."""

    run: SamplingRun

    def begun(self, canvas: Canvas) -> SamplingRun:
        return SamplingRun(self.job, canvas)

    def advance(self, results: list[Denoised]) -> None:
        [result] = results
        self.run.advance(result)
        self.show()
        self.deliver()

    def steady(self) -> bool:
        return not self.run.watch.looks

    def completed(self, index: int) -> SampledBlock:
        written = self.run.take_finished()
        check_latents(f"the latents of block {index}", written.latents)
        self._engine.observer.block(time.monotonic() - self._since, first=self.run.block == 1)
        self._engine.observer.tokens(0, len(written.latents))
        return replace(written, index=index, timings=self.timings(self._since))

    def show(self) -> None:
        """Hand over a preview, if there is one that another stage would take."""
        watch = self.run.watch
        if watch.preview is not None:
            with suppress(NotFinite, OutOfBounds):
                check_latents("a preview", watch.preview)
                self.outbox.show(SampledBlock(watch.preview, watch.step, index=self.job.first_block + self.run.block))


@dataclass
class _ScheduledSession:
    """What one session sends through a pass: blocks to commit, then, once all are in, its current points."""

    session: PriorSession[Any]
    rows_of: list[Row]
    commits: int
    rows: int  # positions
    moved_on: bool = False  # whether the session needs nothing of what comes of them any more

    @classmethod
    def of(cls, session: PriorSession[Any], count: int) -> "_ScheduledSession":
        run, B = session.run, session.run.canvas.values.shape[1]
        rows = [Row(session.pages, run.committed + i, block) for i, block in enumerate(run.uncommitted[:count])]
        commits = len(rows)
        if commits == len(run.uncommitted):
            rows += run.rows(session.slot, session.pages, count - commits)
        guided = rows[-1].guided
        return cls(session, rows, commits, B * (len(rows) + guided))

    def move_on(self) -> bool:
        """Do what can be done before the results are known; False if that is nothing."""
        run = self.session.run
        self.moved_on = self.commits == len(self.rows_of) or run.skip()
        if self.moved_on:
            run.commit(self.commits)
        return self.moved_on


class PriorEngine(Engine[PriorSession[Any], _ScheduledSession]):
    """Continuous batching of runs: sessions join and leave between steps, rows are at any step."""

    def __init__(
        self,
        model: DiT,
        shape: ModelShape,
        device: DeviceThread,
        limits: EngineLimits,
        observer: EngineObserver | None = None,
        picked: Picked | None = None,
    ):
        super().__init__("prior", model, shape, device, limits, observer, picked)
        self._least = self.picked.least_rows / shape.block_size

    def session(self, job: SampleJob, *, deadline: float | None = None) -> AbstractAsyncContextManager[SamplingSession]:
        """Hold a run while inside the context. Raises `InvalidRequest` at once, `Overloaded` on entering."""
        return self.held(SamplingSession, job, deadline)

    def held(
        self, kind: "Callable[[PriorEngine, J, float | None], S]", job: J, deadline: float | None = None
    ) -> AbstractAsyncContextManager[S]:
        """As `session`, of any kind."""
        check_job(job, self.shape, self.limits)
        return self._admitted(kind(self, job, deadline))  # type: ignore[return-value]

    def _begin(self, scheduled: list[_ScheduledSession]) -> Pass:
        """The heartbeat: one pass for what every session needs next."""
        return self.backend.run(self.backend.plan([row for each in scheduled for row in each.rows_of]))

    def _ahead(self, running: Running[_ScheduledSession]) -> list[PriorSession[Any]]:
        """None while somebody joins or leaves, or needs results all the time: leaving such ones out of each second pass
        would slow them down. What a session lacks at a block's end it gets one pass later."""
        sessions, now = self._sessions.all, time.monotonic()
        stay = all(each.wanted and each.reserves and each.holds_kv for each in sessions)
        late = any(each.deadline is not None and each.deadline <= now for each in sessions)
        if not stay or late or running.run.done() or not all(each.session.steady() for each in running.scheduled):
            return []
        waiting = {id(each.session) for each in running.scheduled if not each.move_on()}
        ready = [session for session in self._ready() if id(session) not in waiting]
        lacking = sum(max(0, session.lacking()) for session in ready)
        return self._grown(ready) if lacking <= self.backend.pages.available else []

    def _results(self, scheduled: list[_ScheduledSession], found: Sequence[Denoised | None]) -> list[list[Denoised]]:
        """What came of each session's current points."""
        results = iter(found)
        each = [[next(results) for _ in session.rows_of] for session in scheduled]
        return [[one for one in some if one is not None] for some in each]

    def _take(self, scheduled: _ScheduledSession, result: list[Denoised]) -> None:
        if scheduled.moved_on:
            return
        session = scheduled.session
        session.run.commit(scheduled.commits)
        if result:
            session.advance(result)

    def _schedule(self, ready: list[PriorSession[Any]]) -> list[_ScheduledSession]:
        """Every sampling session; contexts, and the points of sessions that score, share the budget that a pass has for
        them, in the order of `ready`.

        While sessions sample, contexts may cost so little, attention included, that a pass takes less than twice its
        time. The unit is a block of rows over no keys; each context gets a block at least while some budget is left.
        """
        B, sampling = self.shape.block_size, sum(session.remaining() <= 1 for session in ready)
        budget = max(_CONTEXT_SHARE * 2 * sampling, self._least) if sampling else self.limits.prefill_chunk / B
        fewest, scheduled = 1 if sampling else max(1, min(_ALONE_ROWS, self.limits.prefill_chunk) // B), []
        for session in ready:
            wanted = count = session.remaining()
            if count > 1:
                cost = self.backend.cost(session.run.committed)
                count = min(count, max(fewest, int(budget / cost))) if budget > 0 else 0
                budget -= count * cost
            if count or not wanted:
                scheduled.append(_ScheduledSession.of(session, count))
        return scheduled
