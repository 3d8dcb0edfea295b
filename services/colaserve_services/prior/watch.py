"""What is looked at while a block is written: previews, probes, and whether its remaining steps may be left out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from colaserve_services.model.backend import Denoised
from colaserve_services.model.flow import SamplerSettings, solve


@dataclass(frozen=True)
class Probes:
    """What can be seen of a written block; see types.proto. None where one does not exist."""

    norm: float
    distance: float | None
    drift: float | None
    disagreement: float | None


def rms(values: Tensor) -> float:
    """The root mean square of all elements, on the CPU."""
    elements = values.numpy().ravel()  # a few: numpy takes a tenth of torch's time
    return math.sqrt(float(elements @ elements) / elements.size)


def last_guided(settings: SamplerSettings) -> int:
    """The number of a block's last evaluation with guidance; -1: there is none."""
    return max((i for i, each in enumerate(solve(settings)) if settings.guided(each.t)), default=-1)


class Watch:
    """The evaluations of one block as they happen. Only what was asked for is copied from the device."""

    def __init__(self, settings: SamplerSettings, preview_every: int, probed: int | None, known: Tensor):
        """`probed`: for probes, the evaluation whose branches disagree; `known`: (B,) bool, the pinned positions."""
        self._settings, self._every, self._probed, self._open = settings, preview_every, probed, ~known
        self._evaluations = 0
        self.step = 0  # steps made
        self.clean: Tensor | None = None  # x0 after the last step, on the CPU, where it was looked at
        self.preview: Tensor | None = None  # the same, where it is to be shown
        self._seen = 0  # the step of `clean`
        self._moved: Tensor | None = None  # (open positions, d): the change of x0 over the step before that
        self._gap: Tensor | None = None  # v_c - v_u, on the device
        self._still = 0  # steps in a row that moved x0 by less than the distance

    @property
    def looks(self) -> bool:
        """Whether it may look at any evaluation."""
        return self._every > 0 or self._probed is not None or self._settings.stable_steps > 0

    def unseen(self, ends_step: bool) -> None:
        """Count the next evaluation, of a block at which nobody looks."""
        self._evaluations, self.step = self._evaluations + 1, self.step + ends_step

    @property
    def is_stable(self) -> bool:
        """Whether the remaining steps may be left out: the block ends as `clean`."""
        return 0 < self._settings.stable_steps <= self._still

    def evaluated(self, ends_step: bool, result: Denoised) -> None:
        """Look at the next evaluation."""
        stops = self._settings.stable_steps > 0
        if self._probed is not None and result.branches and (stops or self._evaluations == self._probed):
            conditional, unconditional = result.branches
            self._gap = conditional - unconditional
        self._evaluations, self.preview = self._evaluations + 1, None
        if ends_step:
            self.step += 1
            left = self._settings.steps - self.step
            shows = self._every > 0 and self.step % self._every == 0 and left > 0
            if stops or shows or (self._probed is not None and left <= 1):
                self._look(result.clean.to("cpu", torch.float32, copy=True))
            if shows and not self.is_stable:
                self.preview = self.clean

    def _look(self, clean: Tensor) -> None:
        self._moved = None
        if self.clean is not None and self._seen == self.step - 1:
            self._moved = (clean - self.clean)[self._open]
            distance = self._settings.stable_distance
            if distance is not None:
                moves = self._moved.square().mean(dim=-1).sqrt().max().item()
                self._still = self._still + 1 if moves < distance else 0
        self.clean, self._seen = clean, self.step

    def probes(self, latents: Tensor, previous: Tensor | None) -> Probes:
        """Of the written block and the one before, (B, d) each."""
        distance = None if previous is None else rms(latents - previous)
        drift = None if self._moved is None else rms(self._moved)
        gap = None if self._gap is None else rms(self._gap.cpu()[self._open])
        return Probes(rms(latents), distance, drift, gap)
