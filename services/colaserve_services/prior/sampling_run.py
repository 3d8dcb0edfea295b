"""One run of the prior over a canvas: which latents are context, which block is at which step, what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from colaserve_services.bounds import SAMPLE_ID, SEED_END, block_seed, check
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.session import Timings
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.backend import Denoise, Denoised, Row
from colaserve_services.model.config import ModelShape
from colaserve_services.model.flow import SamplerSettings, solve
from colaserve_services.prior.watch import Probes, Watch, last_guided

F = TypeVar("F")


@dataclass(frozen=True)
class SampleJob:
    """What a caller asks for; see SampleRequest in prior.proto for the meaning of each field."""

    latents: Tensor  # (n, d) float32: the canvas
    max_blocks: int
    open: Sequence[tuple[int, int]] = ()
    first_block: int = 0
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    base_seed: int | None = None
    sample_id: int = 0
    noise: Tensor | None = None  # (max_blocks, B, d) float32, instead of base_seed
    cache_salt: str = ""  # leading blocks are shared with runs of the same salt
    preview_every: int = 0
    with_probes: bool = False


@dataclass(frozen=True)
class Canvas:
    """A job's canvas cut into blocks of B."""

    context: Tensor  # (blocks, B, d): the leading blocks without an open position
    values: Tensor  # (max_blocks, B, d): known latents of the blocks to write, 0 where open
    known: Tensor  # (max_blocks, B) bool

    @classmethod
    def of(cls, job: SampleJob, block_size: int) -> "Canvas":
        """Cut the canvas of a job that `check_job` has passed."""
        n, d = job.latents.shape
        context = context_blocks(job, block_size)
        known = torch.zeros((context + job.max_blocks) * block_size, dtype=torch.bool)
        known[:n] = True
        for start, end in job.open:
            known[start:end] = False
        values = torch.zeros(len(known), d)
        values[:n] = job.latents
        values.masked_fill_(~known[:, None], 0.0)
        values, known = values.view(-1, block_size, d), known.view(-1, block_size)
        return cls(values[:context], values[context:], known[context:])


def context_blocks(job: SampleJob, block_size: int) -> int:
    """The leading blocks without an open position."""
    known = job.open[0][0] if job.open else len(job.latents)
    return known // block_size


def check_job(job: SampleJob, shape: ModelShape, limits: EngineLimits) -> None:
    """Raise `InvalidRequest` naming the field of a job that this model and these limits cannot do."""
    B, d = shape.block_size, shape.latent_dim
    if job.latents.ndim != 2 or job.latents.shape[1] != d:
        raise InvalidRequest("canvas.latents", f"got shape {list(job.latents.shape)}, expected (n, {d})")
    if not 1 <= job.max_blocks <= limits.max_context // B:
        raise InvalidRequest("max_blocks", f"got {job.max_blocks}, expected 1 to {limits.max_context // B}")
    _check_spans(job.open, len(job.latents))
    _check_extent(job, B, limits.max_context)
    if job.noise is not None:
        _check_noise(job, (job.max_blocks, B, d))
    else:
        _check_seed(job)


def _check_spans(spans: Sequence[tuple[int, int]], n: int) -> None:
    last = 0
    for start, end in spans:
        if not last <= start < end <= n:
            raise InvalidRequest(
                "canvas.open",
                f"got [{start}, {end}), expected ascending, disjoint, non-empty spans within {n} positions",
            )
        last = end


def _check_extent(job: SampleJob, block_size: int, max_context: int) -> None:
    n, context = len(job.latents), context_blocks(job, block_size)
    if job.first_block > context:
        raise InvalidRequest("first_block", f"got {job.first_block}, but the canvas begins with {context} known blocks")
    positions = (context + job.max_blocks) * block_size
    if n > positions:
        raise InvalidRequest(
            "max_blocks", f"{n} given positions do not fit {context} context blocks and {job.max_blocks} to write"
        )
    if positions > max_context:
        raise InvalidRequest(
            "max_blocks",
            f"{context} context blocks and {job.max_blocks} to write are {positions} latent positions; "
            f"max_context is {max_context}",
        )


def _check_noise(job: SampleJob, expected: tuple[int, int, int]) -> None:
    assert job.noise is not None
    if job.noise.shape != expected:
        raise InvalidRequest(
            "noise", f"got shape {list(job.noise.shape)}, expected {list(expected)} (max_blocks, B, latent_dim)"
        )
    if job.sampler.resamples > 1:
        raise InvalidRequest("sampler.resamples", f"got {job.sampler.resamples}; above 1 it needs a seed, not noise")


def _check_seed(job: SampleJob) -> None:
    if job.base_seed is None:
        raise InvalidRequest("noise_source", "neither seed nor noise is set")
    check(SAMPLE_ID, "seed.sample_id", job.sample_id)
    highest = block_seed(job.base_seed, job.sample_id, job.first_block + job.max_blocks - 1)
    if not 0 <= job.base_seed <= highest < SEED_END:
        raise InvalidRequest(
            "seed.base_seed", f"got {job.base_seed}; with sample_id and block added it must stay below 2^63"
        )


@dataclass(frozen=True)
class SampledBlock:
    """A written block, or a preview of the one under way."""

    latents: Tensor  # (B, d) float32, on the CPU
    step: int = 0  # steps of the block that were made; 0: it was given
    steps_saved: int = 0
    probes: Probes | None = None
    index: int = 0
    timings: Timings | None = None  # None: a preview


class Run(Generic[F]):
    """The blocks of a run that are complete, each with an F that came of it.

    `uncommitted` blocks have final latents that are not in the KV cache yet: the context at first, later the block
    written last. They go into the cache with the next pass, which is how a commit costs no pass of its own.
    """

    def __init__(self, job: SampleJob, canvas: Canvas):
        self.job, self.settings, self.canvas = job, job.sampler, canvas
        self.uncommitted: list[Tensor] = list(canvas.context)
        self.committed = 0  # blocks in the KV cache
        self._kept: list[Tensor] = []  # their latents
        self.block = -1  # row of the canvas that is under way
        self.finished: F | None = None  # of the block just completed, until taken

    @property
    def done(self) -> bool:
        return self.block >= self.job.max_blocks

    def commit(self, count: int) -> None:
        """The first `count` uncommitted blocks are in the cache now."""
        self._kept += self.uncommitted[:count]
        del self.uncommitted[:count]
        self.committed += count

    def rewind(self) -> None:
        """Nothing is in the cache any more: all blocks are to be committed again."""
        self.uncommitted[:0] = self._kept
        self._kept, self.committed = [], 0

    def take_finished(self) -> F:
        """What came of the block just completed; the next one has begun."""
        finished, self.finished = self.finished, None
        assert finished is not None
        self._next_block()
        return finished

    def _next_block(self) -> None:
        raise NotImplementedError


class SamplingRun(Run[SampledBlock]):
    """The state of a run between forward passes, but for the latents of the block under way: the backend has them."""

    def __init__(self, job: SampleJob, canvas: Canvas):
        super().__init__(job, canvas)
        self._pinned_blocks = canvas.known.any(dim=1).tolist()
        self._given_blocks = canvas.known.all(dim=1).tolist()
        self._evaluations, self._step = solve(job.sampler), 0
        self._probed = last_guided(job.sampler) if job.with_probes else None
        self._initial: Tensor | None = None  # latents of the block's first point, which the backend has not got yet
        self._fresh: Tensor | None = None  # noise that the current point's update adds
        self._next_block()

    @property
    def blocks(self) -> int:
        """That the KV cache holds once all is committed, and the one under way."""
        return self.committed + len(self.uncommitted) + (not self.done)

    @property
    def remaining(self) -> int:
        """Blocks to commit before the current point."""
        return len(self.uncommitted)

    @property
    def pinned(self) -> Tensor | None:
        """(B,) bool: known positions of the current block; None if there are none."""
        return self.canvas.known[self.block] if self._pinned_blocks[self.block] else None

    def rows(self, slot: int, pages: Sequence[int], more: int) -> list[Row]:
        """The current point: where the velocity is wanted, and what it does to the latents."""
        t, update, _ = self._evaluations[self._step]
        # Without history both branches are the same.
        guided = self.committed + len(self.uncommitted) > 0 and self.settings.guided(t)
        guidance = self.settings.guidance_scale if guided else None
        denoise = Denoise(slot, update, guidance, self.pinned, self._fresh, self.settings.steered(t))
        return [Row(pages, self.committed + len(self.uncommitted), self._initial, t, denoise)]

    def advance(self, result: Denoised) -> None:
        """The current point's velocity has done to the latents what it had to; move on to the next."""
        watch = self.watch
        watch.evaluated(self._evaluations[self._step].ends_step, result)
        self._step, self._initial = self._step + 1, None
        if self._step == len(self._evaluations):
            self._complete(result.latents.to("cpu", torch.float32, copy=True))
        elif watch.is_stable:
            assert watch.clean is not None
            self._complete(watch.clean)
        else:
            self._draw_fresh()

    def skip(self) -> bool:
        """Move on to the next point of an unwatched block before the current velocity is known; False at the last."""
        if self._step + 1 == len(self._evaluations):
            return False
        self.watch.unseen(self._evaluations[self._step].ends_step)
        self._step, self._initial = self._step + 1, None
        self._draw_fresh()
        return True

    def _complete(self, latents: Tensor) -> None:
        previous = next(reversed(self.uncommitted or self._kept), None)
        probes = self.watch.probes(latents, previous) if self.job.with_probes else None
        made = self.watch.step
        self.finished = SampledBlock(latents, made, self.settings.steps - made if made else 0, probes)
        self.uncommitted.append(latents)

    def _next_block(self) -> None:
        self.block += 1
        if self.done:
            return
        self.watch = Watch(self.settings, self.job.preview_every, self._probed, self.canvas.known[self.block])
        if self._given_blocks[self.block]:
            self._complete(self.canvas.values[self.block])
            return
        self._step, noise = 0, self._noise()
        known = self.pinned
        self._initial = noise if known is None else torch.where(known[:, None], self.canvas.values[self.block], noise)
        self._draw_fresh()

    def _noise(self) -> Tensor:
        """The block's initial noise, (B, d); more comes from the same generator: always drawn on the CPU."""
        job = self.job
        if job.noise is not None:
            return job.noise[self.block]
        assert job.base_seed is not None
        seed = block_seed(job.base_seed, job.sample_id, job.first_block + self.block)
        self._generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.canvas.values.shape[1:], generator=self._generator)

    def _draw_fresh(self) -> None:
        adds = self._evaluations[self._step].update.noise != 0
        self._fresh = torch.randn(self.canvas.values.shape[1:], generator=self._generator) if adds else None
