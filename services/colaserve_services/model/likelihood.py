"""The log density of latents: the probability-flow ODE with the instantaneous change of variables (arXiv:1806.07366,
theorem 1; arXiv:2011.13456, equation 39) and Hutchinson's estimate of the divergence (arXiv:1810.01367).

It knows neither the network nor the other rows of a pass: it says where it wants velocities, and is sent them.
"""

import math
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from colaserve_services.model.flow import SamplerSettings, solve

DISTANCE = 0.01  # h, along a probe: rounding and curvature of a float32 network both stay below 1e-3 of a derivative


class Points(NamedTuple):
    """Where velocities are wanted."""

    t: float  # 0..1000
    latents: Tensor  # (1 + 2K, B, d) float32: z, then z + h e of each probe e, then z - h e


def log_density(
    latents: Tensor, known: Tensor, settings: SamplerSettings, probes: int, generator: torch.Generator
) -> Generator[Points, Tensor, Tensor]:
    """Estimates of log p(z_0) in nats, (K,) float64, one of each of K probes: independent, each without bias.

    log p(z_0) = log N(z_1; 0, I) + integral over u = t/T from 0 to 1 of div v(z_u, u). The divergence by a probe e,
    whose elements are 1 or -1 and drawn anew at each evaluation, is e . (v(z + h e) - v(z - h e)) / 2h.

    latents (B, d) are z_0; positions that are `known`, (B,) bool, stay as they are and have no part in the density.
    Yields `Points` and is sent their velocities, (1 + 2K, B, d).
    """
    open_ = (~known)[:, None].double()
    z, gained = latents.double(), torch.zeros(probes, dtype=torch.float64)
    previous = z.new_zeros(()), gained  # velocity and divergence
    for t, update, _ in solve(settings, ascending=True):
        signs = torch.randint(0, 2, (probes, *z.shape), generator=generator).double().mul_(2).sub_(1) * open_
        found = yield Points(t, torch.cat((z[None], z + DISTANCE * signs, z - DISTANCE * signs)).float())
        velocity, ahead, behind = found.double().split((1, probes, probes))
        now = velocity[0] * open_, ((ahead - behind) * signs).sum(dim=(1, 2)) / (2 * DISTANCE)
        z = z + update.velocity * now[0] + update.previous * previous[0]
        gained = gained + update.velocity * now[1] + update.previous * previous[1]
        previous = now if update.keeps else previous
    gaussian = -0.5 * (z.square() + math.log(2 * math.pi)).mul(open_).sum()
    return gaussian + gained
