"""What engines may count on, whatever computes: results of a row, forks over shared pages, steps that fail."""

from array import array
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colaserve_services.model.backend import Denoise, Denoised, Row, Sizes, Update, ops
from colaserve_services.model.backend.pick import Picked, pick, plain
from colaserve_services.model.backend.self_check import disagreement
from colaserve_services.model.backend.streams import Stream
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.dit import DiT
from colaserve_services.model.loading import load
from tests.conftest import Golden
from tests.services.engines.faults import MARK_LATENT, Broken, Network, marked_latents, raises
from tests.services.kernel_references import on_cpu, references

CPU, B, D = torch.device("cpu"), 4, 16


@pytest.fixture(
    params=[lambda: pick(CPU, torch.float32), lambda: plain(""), on_cpu], ids=["fastest", "reference", "cuda"]
)
def prior(request: pytest.FixtureRequest, tiny: Golden):
    picked: Picked = request.param()
    model = load(Checkpoint.open(tiny.directory), "prior", CPU, torch.float32)
    with torch.inference_mode():
        yield picked.prior(model, Sizes(1 << 20, 4, B, 64))


def draw(seed: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def run(prior, *rows: Row) -> list[Denoised | None]:
    return list(prior.run(prior.plan(rows)).results())


def test_a_row_tells_its_velocity_and_where_it_leads(prior) -> None:
    pages, z, probe = array("i", prior.pages.reserve(1)), draw(0), torch.cat((draw(1)[:2], torch.ones(2, 2)), dim=1)
    (plain_,) = run(prior, Row(pages, 0, z, 800.0, Denoise(0, Update(1.0, -0.1))))
    (steered,) = run(prior, Row(pages, 0, z, 800.0, Denoise(1, Update(1.0, -0.1), steering=probe)))
    torch.testing.assert_close(plain_.latents, z - 0.1 * plain_.velocity)
    torch.testing.assert_close(plain_.clean, z - 0.8 * plain_.velocity)
    away = torch.sigmoid(-(plain_.clean @ probe[:, :D].T + 1))
    torch.testing.assert_close(steered.velocity, plain_.velocity - away @ probe[:, :D])


def test_branches_that_share_the_pages_of_a_prefix_go_on_as_if_each_had_its_own(prior) -> None:
    def branch(pages: Callable[[], list[int]], seed: int, slot: int) -> Tensor:
        row = Row(array("i", pages()), 2, draw(seed), 1000.0, Denoise(slot, Update(1.0, -0.5), guidance=3.0))
        (found,) = run(prior, row)
        return found.latents

    def written() -> list[int]:
        pages = array("i", prior.pages.reserve(2))
        assert run(prior, *(Row(pages, i, draw(i)) for i in range(2))) == [None, None]
        return list(pages)

    prefix = written()
    alone = [branch(lambda: written() + prior.pages.reserve(1), seed, 0) for seed in (5, 6)]
    held = prior.pages.held
    for slot, seed in enumerate((5, 6)):
        prior.pages.share(prefix)
        torch.testing.assert_close(branch(lambda: prefix + prior.pages.reserve(1), seed, slot), alone[slot])
    assert prior.pages.held == held + 2  # a page of its own each


@pytest.fixture
def checked(tiny: Golden):
    return load(Checkpoint.open(tiny.directory), "prior", CPU, torch.float32)


def test_a_pass_of_several_pieces_that_raises_has_changed_no_slot(checked: DiT) -> None:
    prior = on_cpu().prior(Network(checked, {MARK_LATENT: raises}), Sizes(1 << 22, 4, B, 128))
    with torch.inference_mode():
        pages, others = (array("i", prior.pages.reserve(20)) for _ in range(2))
        step = Denoise(0, Update(1.0, -0.25, -0.25, keeps=True))
        context = [Row(others, i, draw(i)) for i in range(20)]
        found = []
        for marked in (False, True):
            run(prior, Row(pages, 0, draw(9), 1000.0, step))
            if marked:
                with pytest.raises(Broken):
                    run(prior, Row(pages, 0, None, 900.0, step), *context, Row(others, 19, marked_latents(draw(1))))
            found += run(prior, Row(pages, 0, None, 900.0, step))
        torch.testing.assert_close(found[0].latents, found[1].latents)


@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_are_not_chosen_where_they_compute_something_else(wrong: bool) -> None:
    kernels = references()
    if wrong:
        kernels.adaln = lambda x, y, gate, scale, *rest: ops.adaln(x, y, gate, 1.01 * scale, *rest)
    found = disagreement(kernels, Stream(CPU), torch.float32)
    assert (found is not None and "velocities" in found) if wrong else found is None


def test_a_pass_that_raises_has_changed_no_slot(prior) -> None:
    pages = array("i", prior.pages.reserve(1))
    step = Denoise(0, Update(1.0, -0.25, -0.25, keeps=True))
    first, second = (Row(pages, 0, z, 1000.0, step) for z in (draw(0), None))
    run(prior, first)
    (expected,) = run(prior, second)
    run(prior, first)
    with pytest.raises((RuntimeError, ValueError)):
        run(prior, second, Row(pages, 0, torch.zeros(B, D + 1), 1000.0, step._replace(slot=1)))
    (got,) = run(prior, second)
    torch.testing.assert_close(got.latents, expected.latents)
