"""The solvers integrate what can be integrated in closed form; guidance and its interval are where they should be."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colaserve_services.bounds import block_seed
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.flow import SamplerSettings, guide, schedule, solve


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
