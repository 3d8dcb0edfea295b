"""Flow matching: the schedule, the solvers and guidance (arXiv:2605.06548 section on sampling; MODEL.md section 4).

A solver is a list of evaluations: a time, and the coefficients of what its velocity does to the latents. It knows
neither the network nor the other samples of a batch, so any number of solvers, each at its own step of its own
schedule, share one forward pass and one update.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from colaserve_services.bounds import SAMPLER, check_all
from colaserve_services.model.backend import Update
from colaserve_services.model.dit import TIME_SCALE

_TIME_ROUNDING = 1e-6  # of t/T: bounds arrive as float32


class Evaluation(NamedTuple):
    """A time t in 0..1000 at which the velocity is wanted, and what it does to the latents."""

    t: float
    update: Update
    ends_step: bool = True  # whether the last of its step


class Steering(NamedTuple):
    """A probe whose gradient at x0 is added to the velocity where start >= t/T > end; see Steering in types.proto."""

    columns: Tensor  # (k, d + 2): as `Denoise.steering`
    start: float
    end: float


@dataclass(frozen=True)
class SamplerSettings:
    """How a block is denoised; the defaults are those of the wire contract's brackets."""

    steps: int = SAMPLER["steps"].default
    guidance_scale: float = SAMPLER["guidance_scale"].default
    solver: str = SAMPLER["solver"].default
    guidance_start: float = SAMPLER["guidance_start"].default
    guidance_end: float = SAMPLER["guidance_end"].default
    resamples: int = SAMPLER["resamples"].default
    stable_steps: int = SAMPLER["stable_steps"].default
    stable_distance: float | None = None
    steering: tuple[Steering, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_all(SAMPLER, "sampler.", vars(self))

    def guided(self, t: float) -> bool:
        """Whether the unconditional branch is needed at time t (0..1000)."""
        return self.guidance_scale != 1 and _within(t, self.guidance_start, self.guidance_end)

    def steered(self, t: float) -> Tensor | None:
        """The columns of all probes that steer at time t (0..1000); None if there are none."""
        found = [each.columns for each in self.steering if _within(t, each.start, each.end)]
        return torch.cat(found) if found else None

    def evaluations(self) -> int:
        """Velocities that one block takes."""
        return len(solve(self))


def _within(t: float, start: float, end: float) -> bool:
    return start + _TIME_ROUNDING >= t / TIME_SCALE > end + _TIME_ROUNDING


def schedule(steps: int) -> list[float]:
    """t_k = T (1 - k / S) for k = 0..S."""
    return [TIME_SCALE * (steps - k) / steps for k in range(steps + 1)]


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: v_u + g (v_c - v_u)."""
    return torch.lerp(unconditional, conditional, scale)


def steer(clean: Tensor, columns: Tensor) -> Tensor:
    """What probes add to the velocities of rows whose x0 is `clean` (E, B, d); columns (E, k, d + 2)."""
    directions, bias, scale = columns[..., :-2], columns[:, None, :, -2], columns[:, None, :, -1]
    return -(torch.sigmoid(-(clean @ directions.mT + bias)) * scale) @ directions


@lru_cache(maxsize=16)
def solve(settings: SamplerSettings, ascending: bool = False) -> tuple[Evaluation, ...]:
    """The evaluations of a block by Euler's rule, z <- z + (t_next - t) v / T, or another slope instead of v; from
    noise to latents, or the other way.

    Adams and Bashforth's is 3/2 v - 1/2 v_previous (times are evenly spaced; the first step is Euler's). Heun's is the
    mean of v at both ends of the step, of which the first is v_previous then (the last step, to t = 0, is Euler's).
    A step that is run again begins with RePaint's way back from t_next to t (arXiv:2201.09865, here for
    z_t = (1 - t) z_0 + t z_1): z <- a z + sqrt(u^2 - (a w)^2) eps with u = t/T, w = t_next/T, a = (1 - u) / (1 - w).
    """
    found: list[Evaluation] = []
    times = schedule(settings.steps)
    for k, (t, t_next) in enumerate(pairwise(times[::-1] if ascending else times)):
        dt = (t_next - t) / TIME_SCALE
        u, w = t / TIME_SCALE, t_next / TIME_SCALE
        a = (1 - u) / (1 - w) if w < 1 else 1.0
        for repeat in range(settings.resamples):
            last = repeat == settings.resamples - 1
            back, noise = (1.0, 0.0) if last else (a, max(u * u - (a * w) ** 2, 0.0) ** 0.5)
            if settings.solver == "heun" and t_next > 0:
                found.append(Evaluation(t, Update(1.0, dt, keeps=True), ends_step=False))
                found.append(Evaluation(t_next, Update(back, back * dt / 2, -back * dt / 2, noise), last))
            elif settings.solver == "ab2":
                v, previous = (1.5, -0.5) if k else (1.0, 0.0)
                found.append(Evaluation(t, Update(back, back * dt * v, back * dt * previous, noise, keeps=last), last))
            else:
                found.append(Evaluation(t, Update(back, back * dt, noise=noise), last))
    return tuple(found)
