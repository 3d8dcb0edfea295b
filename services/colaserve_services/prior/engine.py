"""The prior's engine: one forward pass serves blocks of many runs, each at its own step, both guidance branches."""

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.engine import Engine
from colaserve_services.engine.failures import check_latents
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.session import Session, Timings
from colaserve_services.model import cpu_attention
from colaserve_services.model.attention import RaggedAttention, Segment
from colaserve_services.model.config import ModelShape
from colaserve_services.model.dit import DiT
from colaserve_services.model.flow import TIME_SCALE, schedule
from colaserve_services.model.kv_cache import KVCache, KVPool, KVShape
from colaserve_services.model.layers import Attend, to_device
from colaserve_services.model.modulation import ModulationTable
from colaserve_services.prior.sampling_run import Canvas, SampleJob, SamplingRun, check_job, context_blocks

# Rows of contexts in a pass that cost next to nothing. CUDA: by arithmetic alone, not run on a GPU; reading the weights
# takes an H100 as long as computing about 300 rows.
_LEAST_ROWS = {"cpu": 32, "cuda": 128}
_ALONE_ROWS = 128  # of a context in a pass where nobody samples, at least: fewer would be slow
_CONTEXT_SHARE = 0.9  # what contexts may cost in a pass beside sampling sessions, of what those cost
_ATTENTION_COST = 2.5  # of an operation of attention, in those of a product, which run at more of the peak
_COMPILED_COST = 1.3  # likewise, where attention is compiled


@dataclass(frozen=True)
class SampledBlock:
    """A written block: latents (B, d), float32, on the CPU."""

    index: int
    latents: Tensor
    timings: Timings


class PriorSession(Session[SampledBlock]):
    """A run, its KV cache, and the blocks that wait to be read; iterate over it for the blocks."""

    def __init__(self, engine: "PriorEngine", job: SampleJob, deadline: float | None):
        self._engine, self.job = engine, job
        B = engine.shape.block_size
        context = context_blocks(job, B)
        self._positions = B * (context + job.max_blocks)
        super().__init__(kv_bytes=engine.kv_bytes(self._positions), deadline=deadline, on_read=engine.wake)
        self.cache: KVCache | None = None
        self._begun = self._wrote = False  # whether it has ever started; whether it wrote a block since it did last
        self._since = self.arrived  # when work on the current block became possible

    def start(self) -> None:
        engine, B = self._engine, self._engine.shape.block_size
        if not self._begun:
            canvas = Canvas.of(self.job, B)
            self.run = SamplingRun(self.job, canvas, engine.kv_shape.device)
            blocks = (block.numpy().tobytes() for block in canvas.context)
            self._keys = engine.prefixes.keys(blocks, self.job.cache_salt)
            engine.table.prepare(schedule(self.job.sampler.steps))  # ends with the time of commits, 0
            engine.observer.tokens(canvas.context.shape[0] * B, 0)
            self._begun = True
        self._wrote, self._remembered = False, not self._keys
        self.cache = engine.kv_pool.take(B * len(self.run.uncommitted), self._positions)
        self.run.commit(engine.prefixes.restore(self._keys, self.cache)[0])
        self.deliver()

    def remaining(self) -> int:
        return len(self.run.uncommitted)

    def preemptible(self) -> bool:
        return self._wrote or not self.ready()

    def preempt(self) -> None:
        self.free()
        self.run.rewind()

    def grow(self, count: int) -> None:
        """Enlarge the cache by so many blocks."""
        assert self.cache is not None, "a session that is scheduled has started"
        B, held = self.run.block_size, self.run.committed
        cache = self._engine.kv_pool.grown(self.cache, B * held, B * (held + count))
        if cache is not self.cache:
            self.cache = cache
            self._engine.layout = None  # it may hold views of the other

    def free(self) -> None:
        if self.cache is not None:
            self._engine.kv_pool.give_back(self.cache)
            self._engine.layout = None  # it may hold views of the cache
        self.cache = None

    def ready(self) -> bool:
        return not self.finished and self.outbox.unread < self._engine.limits.run_ahead

    def resumed(self) -> None:
        self._since = time.monotonic()  # its reader had been away

    def remember_context(self) -> None:
        """Once the context is in the cache, keep a copy of it for the next run that begins with the same blocks."""
        if not self._remembered and self.run.committed >= len(self._keys) and self.cache is not None:
            self._engine.prefixes.remember(self._keys, self.cache)
            self._remembered = True

    def deliver(self) -> None:
        """Hand over completed blocks; given ones follow each other without a pass."""
        run = self.run
        while run.finished is not None:
            index = self.job.first_block + run.block
            latents = run.take_finished().to("cpu", torch.float32, copy=True)
            check_latents(f"the latents of block {index}", latents)
            now = time.monotonic()
            self._engine.observer.block(now - self._since, first=run.block == 1)
            self._engine.observer.tokens(0, len(latents))
            self.outbox.put(SampledBlock(index, latents, self.timings(self._since)))
            self._since, self._wrote = now, True
        if run.done:
            self.finished = True
            self.outbox.close()

    async def __aiter__(self) -> AsyncIterator[SampledBlock]:
        while (block := await self.outbox.get()) is not None:
            yield block


@dataclass(frozen=True)
class _ScheduledSession:
    """What one session sends through a pass: blocks to commit, then, once all are in, its current point."""

    session: PriorSession
    commits: list[Tensor]  # uncommitted blocks, (B, d) each
    committing: Segment
    point: Tensor | None  # (B, d): where the velocity is wanted
    evaluated: Segment  # behind all that is in the cache then
    guided: bool

    @property
    def rows(self) -> int:
        return self.committing.rows + self.evaluated.rows * ((self.point is not None) + self.guided)

    @classmethod
    def of(cls, session: PriorSession, count: int) -> "_ScheduledSession":
        session.grow(count)
        run, cache = session.run, session.cache
        B, complete = run.block_size, count == len(run.uncommitted)
        committing = Segment(B * count, B * run.committed, cache)
        evaluated = Segment(B, B * (run.committed + count), cache, passing=True)
        point = run.current_latents() if complete else None
        return cls(session, run.uncommitted[:count], committing, point, evaluated, complete and run.guided)

    def slot_order(self) -> tuple[int, int]:
        """Orders a pass so that sessions which one product can serve are neighbours."""
        cache = self.session.cache
        assert cache is not None, "a session that is scheduled has started"
        return cache.slab.number, cache.slot


@dataclass(frozen=True)
class _Layout:
    """What all layers of a pass share."""

    segments: list[Segment]
    rotary: Tensor
    attend: Attend


class PriorEngine(Engine[PriorSession, _ScheduledSession]):
    """Continuous batching over `SamplingRun`s: sessions join and leave between steps, rows are at any step."""

    def __init__(
        self,
        model: DiT,
        shape: ModelShape,
        device: DeviceThread,
        limits: EngineLimits,
        observer: EngineObserver | None = None,
    ):
        config = model.config
        self.kv_shape = KVShape(
            config.num_layers, config.heads, config.head_dim, model.dtype, model.device, shape.block_size
        )
        self.kv_pool = KVPool(self.kv_shape)
        super().__init__(shape.block_size, self.kv_bytes, device, limits, observer)
        self.model, self.shape = model, shape
        self.layout: _Layout | None = None  # of the last pass
        compiled = cpu_attention.takes(model.device, model.dtype, config.head_dim)
        cost = _COMPILED_COST if compiled else _ATTENTION_COST
        keys_cost = cost * 2 * config.heads * config.head_dim / config.layer_weights
        self._key_cost = shape.block_size * keys_cost  # of attending to a block, beside a row's own products
        self.table = ModulationTable(model, model.device, limits.max_running + 1)

    def kv_bytes(self, positions: int) -> int:
        """Of a session with so many latents."""
        return self.kv_shape.nbytes(self.kv_pool.room(positions))

    def session(self, job: SampleJob, *, deadline: float | None = None) -> AbstractAsyncContextManager[PriorSession]:
        """Hold a run while inside the context. Raises `InvalidRequest` at once, `Overloaded` on entering."""
        check_job(job, self.shape, self.limits)
        return self._admitted(PriorSession(self, job, deadline))

    def _compute(self, scheduled: list[_ScheduledSession]) -> list[tuple[Tensor | None, Tensor | None]]:
        """The heartbeat: one pass for what every session needs next; its velocities, conditional and not."""
        velocities = self._velocities(scheduled)
        evaluated = sum(each.point is not None for each in scheduled)
        conditional, unconditional = iter(velocities[:evaluated]), iter(velocities[evaluated:])
        return [
            (None if each.point is None else next(conditional), next(unconditional) if each.guided else None)
            for each in scheduled
        ]

    def _take(self, scheduled: _ScheduledSession, result: tuple[Tensor | None, Tensor | None]) -> None:
        session, (conditional, unconditional) = scheduled.session, result
        session.run.commit(len(scheduled.commits))
        session.remember_context()
        if conditional is not None:
            session.run.advance(conditional, unconditional)
            session.deliver()

    def _distrust_kept(self) -> None:
        super()._distrust_kept()
        self.table.forget()

    def _warm_up_row(self) -> tuple[Tensor, ...]:
        B, d, model = self.shape.block_size, self.shape.latent_dim, self.model
        z, t = torch.zeros(B, d, device=model.device), torch.full((B,), TIME_SCALE, device=model.device)
        attend = RaggedAttention([Segment(B)], B, model.device)
        return (model(z, t, torch.arange(B, device=model.device), attend),)

    def _schedule(self, ready: list[PriorSession]) -> list[_ScheduledSession]:
        """Every sampling session; contexts share the budget that a pass has for them, in the order of `ready`.

        While sessions sample, contexts may cost so little, attention included, that a pass takes less than twice its
        time. The unit is a block of rows over no keys; each context gets a block at least while some budget is left.
        """
        sampling, B = sum(len(session.run.uncommitted) <= 1 for session in ready), self.shape.block_size
        least = _LEAST_ROWS[self.model.device.type] / B
        budget = max(_CONTEXT_SHARE * 2 * sampling, least) if sampling else self.limits.prefill_chunk / B
        fewest = 1 if sampling else max(1, min(_ALONE_ROWS, self.limits.prefill_chunk) // B)
        scheduled = []
        for session in ready:
            count = len(session.run.uncommitted)
            if count > 1:
                cost = 1 + session.run.committed * self._key_cost
                count = min(count, max(fewest, int(budget / cost))) if budget > 0 else 0
                budget -= count * cost
            if count or not session.run.uncommitted:
                with self._alone(session):  # it may need more memory
                    scheduled.append(_ScheduledSession.of(session, count))
        return sorted(scheduled, key=_ScheduledSession.slot_order)

    def _velocities(self, scheduled: list[_ScheduledSession]) -> Tensor:
        """One pass. Block rows: all commits, all points, the unconditional ones again. (points, B, d), float32."""
        model, B = self.model, self.shape.block_size
        committing = sorted((each for each in scheduled if each.commits), key=lambda each: len(each.commits))
        commits = [block for each in committing for block in each.commits]
        evaluated = [each for each in scheduled if each.point is not None]
        alone = [each for each in evaluated if each.guided]
        points = [each.point for each in (*evaluated, *alone) if each.point is not None]
        segments = [each.committing for each in committing] + [each.evaluated for each in evaluated]
        layout = self._laid_out(segments + [Segment(B)] * len(alone))
        index = self._times(len(commits), [each.session.run for each in (*evaluated, *alone)])

        x = model.txt_in(torch.stack(commits + points)).float()
        for block, modulation in zip(model.blocks, self.table.layers(index), strict=True):
            x = block(x, modulation, layout.rotary, layout.attend)
        return model.velocity(x[len(commits) :], self.table.output(index if len(index) == 1 else index[len(commits) :]))

    def _laid_out(self, segments: list[Segment]) -> _Layout:
        """Kept for the next pass: most steps of a block have the same segments."""
        if self.layout is None or self.layout.segments != segments:
            B, device = self.shape.block_size, self.model.device
            starts = [segment.start + i for segment in segments for i in range(0, segment.rows, B)]
            positions = to_device(torch.tensor(starts)[:, None] + torch.arange(B), device)
            attend = RaggedAttention(segments, B, device)
            self.layout = _Layout(segments, self.model.rotary_of_heads(positions), attend)
        return self.layout

    def _times(self, commits: int, runs: list[SamplingRun]) -> Tensor:
        """Modulation rows of every block row: commits, which are at t = 0, then each run's point. (rows, 1).

        (1, 1) if all block rows are at one time, (rows, B) if any position is pinned.
        """
        B, device = self.shape.block_size, self.model.device
        zero, *rows = self.table.rows([0.0, *(run.time for run in runs)])
        rows = [zero] * commits + rows
        index = to_device(torch.tensor(rows), device)[:, None]
        if any(run.pinned is not None for run in runs):
            never = torch.zeros(B, dtype=torch.bool, device=device)
            pinned = [never] * commits + [never if run.pinned is None else run.pinned for run in runs]
            return torch.where(torch.stack(pinned), zero, index)
        return index[:1] if len(set(rows)) == 1 else index
