"""The density of latents under a flow whose velocity is known in closed form: a Gaussian with a full covariance."""

import math

import torch
from torch import Tensor

from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.likelihood import Points, log_density

B, D = 3, 2
NONE = torch.zeros(B, dtype=torch.bool)


class Gaussian:
    """z_0 ~ N(mean, covariance), z_u = (1 - u) z_0 + u z_1 with z_1 ~ N(0, I): v(z, u) = E[z_1 - z_0 | z_u = z]."""

    def __init__(self, covariance: Tensor, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.covariance, self.eye = covariance, torch.eye(len(covariance)).double()
        self.mean = torch.randn(len(covariance), generator=self.generator).double()

    def draw(self) -> Tensor:
        noise = torch.randn(len(self.mean), generator=self.generator).double()
        return (self.mean + torch.linalg.cholesky(self.covariance) @ noise).view(B, D)

    def velocity(self, points: Points) -> Tensor:
        u, z = points.t / 1000, points.latents.double().flatten(1)
        total = (1 - u) ** 2 * self.covariance + u**2 * self.eye
        rest = torch.linalg.solve(total, (z - (1 - u) * self.mean).T)
        change = (u * self.eye - (1 - u) * self.covariance) @ rest
        return (change.T - self.mean).view(-1, B, D).float()

    def log_density(self, z: Tensor) -> float:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance).log_prob(z.flatten()).item()


def full_covariance() -> Tensor:
    root = torch.randn(B * D, B * D, generator=torch.Generator().manual_seed(5)).double()
    return root @ root.T / (B * D) + 0.3 * torch.eye(B * D)


def estimates(
    flow: Gaussian, z: Tensor, probes: int, steps: int, known: Tensor = NONE, solver: str = "heun", seed: int = 1
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    settings = SamplerSettings(steps=steps, guidance_scale=1.0, solver=solver)  # type: ignore[arg-type]
    run = log_density(z, known, settings, probes, generator)
    points = next(run)
    while True:
        try:
            points = run.send(flow.velocity(points))
        except StopIteration as end:
            found: Tensor = end.value
            return found


def test_the_density_of_a_gaussian_with_a_full_covariance_is_within_its_standard_error() -> None:
    flow, steps = Gaussian(full_covariance()), 64
    # Rotated to its own axes the covariance is diagonal, every probe gives the divergence itself, and what is left of
    # the error is that of the steps: they are linear in z, so rotation does not change it.
    axes = Gaussian(torch.diag(torch.linalg.eigvalsh(flow.covariance)))
    still = axes.draw()
    step_error = abs(estimates(axes, still, 2, steps).mean().item() - axes.log_density(still))
    errors, said = dict[int, Tensor](), dict[int, Tensor]()
    draws = [flow.draw() for _ in range(8)]
    found = [estimates(flow, z, 512, steps, seed=seed) - flow.log_density(z) for seed, z in enumerate(draws)]
    for probes in (16, 64):  # as many estimates of so many probes as these 512 hold
        runs = torch.cat(found).view(-1, probes)
        errors[probes], said[probes] = runs.mean(1), runs.std(1) / math.sqrt(probes)
        misses = errors[probes] / said[probes]
        assert misses.abs().max() < 5
        assert 0.8 < misses.square().mean().sqrt() < 1.25
    assert step_error < 0.1 * said[64].min()
    for each in (errors, said):
        ratio = (each[64].square().mean() / each[16].square().mean()).sqrt()
        assert abs(ratio - 0.5) < 0.1


def test_known_positions_have_no_part_in_the_density_and_stay() -> None:
    flow = Gaussian(torch.diag(torch.tensor([0.5, 2.0, 1.5, 0.7, 3.0, 0.2]).double()))
    z, known = flow.draw(), torch.tensor([True, False, False])
    kept = torch.distributions.Normal(flow.mean[2:], flow.covariance.diag()[2:].sqrt())
    expected = kept.log_prob(z.flatten()[2:]).sum().item()
    assert abs(estimates(flow, z, 1, 256, known).item() - expected) < 1e-3
    settings = SamplerSettings(steps=2, guidance_scale=1.0)
    run = log_density(z, known, settings, 2, torch.Generator().manual_seed(0))
    points = next(run)
    for each in (points, run.send(flow.velocity(points))):
        assert (each.latents[:, 0] == z[0].float()).all()


def test_every_solver_comes_to_the_density() -> None:
    flow = Gaussian(torch.diag(torch.tensor([0.5, 2.0, 1.5, 0.7, 3.0, 0.2]).double()))
    z = flow.draw()
    for solver, within in (("euler", 0.1), ("ab2", 1e-3), ("heun", 1e-3)):
        assert abs(estimates(flow, z, 1, 256, solver=solver).item() - flow.log_density(z)) < within, solver
