"""The solvers integrate what can be integrated in closed form; guidance and its interval are where they should be."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colaserve_services.bounds import block_seed
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.flow import SamplerSettings, guide, schedule, solve
from colaserve_services.model.likelihood import Points, log_density


def run(
    field: Callable[[Tensor, float], Tensor],
    settings: SamplerSettings,
    z: Tensor,
    noise: Callable[[], Tensor] = lambda: torch.zeros(()),
) -> tuple[Tensor, list[float]]:
    """Integrate the velocity field(z, t/T) by the updates of a solver; the times it asked for."""
    previous, times = torch.full_like(z, math.nan), []
    for t, update, _ in solve(settings):
        v = field(z, t / 1000)
        z = update.latents * z + update.velocity * v + (update.previous * previous if update.previous else 0)
        z = z + update.noise * noise() if update.noise else z
        previous = v if update.keeps else previous
        times.append(t)
    return z, times


@pytest.mark.parametrize("solver", ["euler", "ab2", "heun"])
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_constant_velocity_is_integrated_exactly(solver: str, steps: int) -> None:
    z = torch.randn(4, 16, dtype=torch.float64)
    end, _ = run(lambda z, t: torch.full_like(z, 3.0), SamplerSettings(steps=steps, solver=solver), z)  # type: ignore[arg-type]
    torch.testing.assert_close(end, z - 3.0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("heun", 2)])
def test_error_falls_with_the_order_of_the_solver(solver: str, order: int) -> None:
    z, exact = torch.ones(1, 1, dtype=torch.float64), math.exp(-1)

    def error(steps: int) -> float:
        end, _ = run(lambda z, t: z, SamplerSettings(steps=steps, solver=solver), z)  # type: ignore[arg-type]
        return abs(end.item() - exact)

    observed = math.log2(error(64) / error(128))
    assert observed == pytest.approx(order, abs=0.15)


def test_schedule_runs_evenly_from_noise_to_latents() -> None:
    assert schedule(4) == [1000.0, 750.0, 500.0, 250.0, 0.0]
    assert run(lambda z, t: z, SamplerSettings(steps=4), torch.ones(1, 1))[1] == [1000.0, 750.0, 500.0, 250.0]


@pytest.mark.parametrize(("solver", "resamples"), [("euler", 1), ("heun", 1), ("ab2", 3), ("heun", 2)])
def test_evaluations_are_counted_as_they_happen(solver: str, resamples: int) -> None:
    settings = SamplerSettings(steps=5, solver=solver, resamples=resamples)  # type: ignore[arg-type]
    assert len(run(lambda z, t: z, settings, torch.ones(1, 1))[1]) == settings.evaluations()


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(conditional, unconditional, 7.0).item() == pytest.approx(15.0)
    assert guide(conditional, unconditional, 1.0).item() == 3.0
    assert guide(conditional, unconditional, 0.0).item() == 1.0


def test_guidance_is_on_within_its_interval_only() -> None:
    settings = SamplerSettings(steps=10, guidance_start=0.8, guidance_end=0.3)
    assert [t for t in schedule(10) if settings.guided(t)] == pytest.approx([800.0, 700.0, 600.0, 500.0, 400.0])
    assert not any(SamplerSettings(guidance_scale=1.0).guided(t) for t in schedule(16))


def test_noise_added_back_restores_the_variance_of_the_earlier_time() -> None:
    """Each step runs twice; with the exact velocity of z_t = (1 - t) z_0 + t z_1 the end is z_0 all the same."""
    clean, start = (torch.randn(200_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    fresh, seen = torch.Generator().manual_seed(2), list[tuple[float, Tensor]]()

    def field(z: Tensor, t: float) -> Tensor:
        seen.append((t, z))
        return (z - clean) / t

    settings = SamplerSettings(steps=5, resamples=2)
    end, _ = run(field, settings, start, lambda: torch.randn(200_000, generator=fresh))
    torch.testing.assert_close(end, clean, rtol=0, atol=1e-5)
    for t, z in seen:
        assert (z * clean).mean().item() == pytest.approx(1 - t, abs=0.01)
        assert z.var().item() == pytest.approx((1 - t) ** 2 + t**2, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"guidance_scale": math.nan}, {"solver": "rk4"}, {"guidance_end": 0.3, "guidance_start": 0.2}],
)
def test_impossible_settings_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(InvalidRequest, match=f"sampler.{next(iter(settings))}"):
        SamplerSettings(**settings)


def test_seeds_of_blocks_and_samples_do_not_meet() -> None:
    seeds = {block_seed(7, sample, block) for sample in range(0, 10_000, 97) for block in range(50)}
    assert len(seeds) == len(range(0, 10_000, 97)) * 50
    assert block_seed(7, 2, 3) == 7 + 2_000 + 30_000_000


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
