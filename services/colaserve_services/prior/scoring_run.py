"""One run of the prior that scores the open positions of a canvas instead of writing them."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from colaserve_services.bounds import SCORING, block_seed, check
from colaserve_services.engine.failures import check_finite
from colaserve_services.engine.session import Timings
from colaserve_services.model.backend import Denoise, Denoised, Row, Update
from colaserve_services.model.flow import SamplerSettings, solve
from colaserve_services.model.likelihood import Points, log_density
from colaserve_services.prior.engine import PriorEngine, PriorSession
from colaserve_services.prior.sampling_run import Canvas, Run, SampleJob

_MOST_ROWS: Final = 128  # positions of one session in a pass: more would be little faster
_STAY: Final = Update(1.0, 0.0)


def scoring_settings(steps: int, solver: str) -> SamplerSettings:
    """Of the integration, without guidance."""
    check(SCORING["steps"], "steps", steps)
    return SamplerSettings(steps, guidance_scale=1.0, solver=solver)


@dataclass(frozen=True)
class ScoreJob(SampleJob):
    """See PriorServiceScoreRequest in prior.proto. The latents are whole blocks; `max_blocks` are those after the
    context; `sampler` is of `scoring_settings`."""

    probes: int = SCORING["probes"].default

    def __post_init__(self) -> None:
        check(SCORING["probes"], "probes", self.probes)


@dataclass(frozen=True)
class ScoredBlock:
    """The log density of a block's open positions, in nats, with its standard error (0 of one probe)."""

    log_density: float
    standard_error: float
    evaluations: int
    timings: Timings


class ScoringRun(Run[Tensor]):
    """The state of a run between passes: the points of the current evaluation, and the velocities that came of some.

    Of a block come estimates of its log density, (K,)."""

    def __init__(self, job: ScoreJob, canvas: Canvas, most_rows: int):
        super().__init__(job, canvas)
        context, B, d = canvas.context.shape
        self._probes, self._most_rows = job.probes, most_rows
        self._data = job.latents.view(-1, B, d)[context:]
        self._points = Points(0.0, self._data[:0])
        self._velocities: list[Tensor] = []
        self._next_block()

    @property
    def blocks(self) -> int:
        """Pages: of what is complete, and one for each point of a pass, whose keys are its own."""
        return self.committed + len(self.uncommitted) + (0 if self.done else self._most_rows)

    @property
    def remaining(self) -> int:
        """Blocks to commit, and points of the current evaluation that no pass has seen yet, as many as one may see."""
        return len(self.uncommitted) + min(self._most_rows, len(self._points.latents) - len(self._velocities))

    def rows(self, slot: int, pages: "array[int]", more: int) -> list[Row]:
        """The next points, so many: each a sequence of its own behind the same blocks."""
        first, start = self.committed + len(self.uncommitted), len(self._velocities)
        denoise = Denoise(slot, _STAY, pinned=self.canvas.known[self.block])
        points = self._points.latents[start : start + more]
        return [
            Row(pages[:first] + pages[first + i : first + i + 1], first, latents, self._points.t, denoise)
            for i, latents in enumerate(points)
        ]

    def advance(self, results: Sequence[Denoised]) -> None:
        """Velocities of the next points; once all are there, the integration goes on."""
        self._velocities += torch.stack([each.velocity for each in results]).to("cpu", torch.float32)
        if len(self._velocities) == len(self._points.latents):
            velocities, self._velocities = torch.stack(self._velocities), []
            try:
                self._points = self._density.send(velocities)
            except StopIteration as end:
                self._complete(end.value)

    def _complete(self, estimates: Tensor) -> None:
        self.finished = estimates
        self._points = Points(0.0, self._data[:0])
        self.uncommitted.append(self._data[self.block])

    def _next_block(self) -> None:
        self.block += 1
        if self.done:
            return
        known = self.canvas.known[self.block]
        if known.all():
            self._complete(torch.zeros(self._probes, dtype=torch.float64))
            return
        assert self.job.base_seed is not None
        generator = torch.Generator().manual_seed(block_seed(self.job.base_seed, self.job.sample_id, self.block))
        self._density = log_density(self._data[self.block], known, self.settings, self._probes, generator)
        self._points = next(self._density)


class ScoringSession(PriorSession[ScoredBlock]):
    """A run that scores blocks."""

    job: ScoreJob
    run: ScoringRun

    def __init__(self, engine: PriorEngine, job: ScoreJob, deadline: float | None):
        super().__init__(engine, job, deadline)
        B = engine.shape.block_size
        spare = (engine.limits.max_context - len(job.latents)) // B  # pages that the pool has at least
        self._rows = min(1 + 2 * job.probes, max(1, _MOST_ROWS // B), 1 + spare)
        self.claim, self.most = self.claim + self._rows - 1, self.most + self._rows - 1

    def begun(self, canvas: Canvas) -> ScoringRun:
        return ScoringRun(self.job, canvas, self._rows)

    def completed(self, index: int) -> ScoredBlock:
        given, estimates = bool(self.run.canvas.known[index].all()), self.run.take_finished()
        check_finite(f"the log density of block {index}", estimates)
        error = estimates.std().item() / math.sqrt(len(estimates)) if len(estimates) > 1 else 0.0
        evaluations = 0 if given else len(solve(self.job.sampler, ascending=True)) * (1 + 2 * self.job.probes)
        return ScoredBlock(estimates.mean().item(), error, evaluations, self.timings(self._since))
