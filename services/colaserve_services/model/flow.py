"""Flow matching: the schedule, the solvers and guidance (arXiv:2605.06548 section on sampling; MODEL.md section 4).

A solver is a generator: it yields the points where it wants the velocity, gets the velocity there, and returns the
latents at t = 0. It knows neither the network nor the other samples of a batch, so any number of solvers, each at its
own step of its own schedule, can share one forward pass.
"""

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from colaserve_services.bounds import SAMPLER, check_all
from colaserve_services.model.dit import TIME_SCALE

_TIME_ROUNDING = 1e-6  # of t/T: bounds arrive as float32


@dataclass(frozen=True)
class Evaluation:
    """A point (z, t) where the velocity is wanted; z: (B, d), t in 0..1000."""

    z: Tensor
    t: float


Solver = Generator[Evaluation, Tensor, Tensor]
Renoise = Callable[[], Tensor]  # draws (B, d) standard normal values


@dataclass(frozen=True)
class SamplerSettings:
    """How a block is denoised; the defaults are those of the wire contract's brackets."""

    steps: int = SAMPLER["steps"].default
    guidance_scale: float = SAMPLER["guidance_scale"].default
    solver: str = SAMPLER["solver"].default
    guidance_start: float = SAMPLER["guidance_start"].default
    guidance_end: float = SAMPLER["guidance_end"].default
    resamples: int = SAMPLER["resamples"].default

    def __post_init__(self) -> None:
        check_all(SAMPLER, "sampler.", vars(self))

    def guided(self, t: float) -> bool:
        """Whether the unconditional branch is needed at time t (0..1000)."""
        u = t / TIME_SCALE
        inside = self.guidance_start + _TIME_ROUNDING >= u > self.guidance_end + _TIME_ROUNDING
        return self.guidance_scale != 1 and inside

    def evaluations(self) -> int:
        """Velocities that one block takes."""
        per_step = 2 if self.solver == "heun" else 1
        return self.resamples * (per_step * self.steps - (per_step - 1))


def schedule(steps: int) -> list[float]:
    """t_k = T (1 - k / S) for k = 0..S."""
    return [TIME_SCALE * (steps - k) / steps for k in range(steps + 1)]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_u + g (v_c - v_u)."""
    return torch.lerp(unconditional, conditional, scale)


def solve(noise: Tensor, settings: SamplerSettings, renoise: Renoise | None = None) -> Solver:
    """Euler's rule, z <- z + (t_next - t) v / T; of second order with another slope instead of v.

    Adams and Bashforth's is 3/2 v - 1/2 v_previous (times are evenly spaced; the first step is Euler's). Heun's is the
    mean of v at both ends of the step (the last step, to t = 0, is Euler's).
    """
    z, previous = noise, None
    for t, t_next in itertools.pairwise(schedule(settings.steps)):
        dt = (t_next - t) / TIME_SCALE
        for repeat in range(settings.resamples):
            slope = v = yield Evaluation(z, t)
            if settings.solver == "ab2" and previous is not None:
                slope = 1.5 * v - 0.5 * previous
            elif settings.solver == "heun" and t_next > 0:
                slope = (v + (yield Evaluation(z + dt * v, t_next))) / 2
            z = z + dt * slope
            if repeat < settings.resamples - 1:
                z = add_noise(z, t, t_next, renoise)
        previous = v
    return z


def add_noise(z: Tensor, t: float, t_next: float, renoise: Renoise | None) -> Tensor:
    """RePaint's way back from t_next to t (arXiv:2201.09865, here for z_t = (1 - t) z_0 + t z_1).

    a z + sqrt(u^2 - (a w)^2) eps with u = t/T, w = t_next/T, a = (1 - u) / (1 - w).
    """
    assert renoise is not None, "resamples above 1 need a source of noise"
    u, w = t / TIME_SCALE, t_next / TIME_SCALE
    a = (1 - u) / (1 - w)
    return a * z + max(u * u - (a * w) ** 2, 0.0) ** 0.5 * renoise()
