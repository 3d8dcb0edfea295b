"""What is seen of a block while it forms changes nothing; what stops or steers it does as types.proto says."""

import asyncio
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from colaserve_services.engine.session import Outbox
from colaserve_services.model.backend import Denoised, Row, Sizes
from colaserve_services.model.backend.pick import pick
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.dit import DiT
from colaserve_services.model.flow import SamplerSettings, Steering, schedule
from colaserve_services.model.loading import load
from colaserve_services.prior.sampling_run import Canvas, SampledBlock, SampleJob, SamplingRun
from colaserve_services.prior.watch import Watch
from tests.conftest import Golden
from tests.services.engines.conftest import CPU, engines
from tests.services.engines.runs import EMPTY, job, noise, sample

SOLVERS: list[dict[str, Any]] = [
    {}, {"solver": "ab2"}, {"solver": "heun"}, {"resamples": 2}, {"solver": "heun", "resamples": 2},
]  # fmt: skip


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


class Preview(NamedTuple):
    """x0 of the block of that index after so many of its steps."""

    index: int
    step: int
    latents: Tensor


@pytest.fixture
def prior(tiny: Golden) -> Iterator[Any]:
    with torch.inference_mode():
        yield pick(CPU, torch.float32).prior(
            load(Checkpoint.open(tiny.directory), "prior", CPU, torch.float32), Sizes(1 << 20, 1, 4, 64)
        )


def watched(prior: Any, wanted: SampleJob, every: int = 1) -> tuple[list[SampledBlock], list[Preview]]:
    """A run that is looked at, pass by pass: its blocks, and all previews."""
    wanted = replace(wanted, preview_every=every, with_probes=True)
    run, pages = SamplingRun(wanted, Canvas.of(wanted, 4)), array("i", prior.pages.reserve(8))
    blocks, previews = list[SampledBlock](), list[Preview]()
    prior.prepare(schedule(wanted.sampler.steps))
    while True:
        while run.finished:
            blocks.append(run.take_finished())
        if run.done:
            return blocks, previews
        commits = [Row(pages, run.committed + i, block) for i, block in enumerate(run.uncommitted)]
        *_, result = prior.run(prior.plan([*commits, *run.rows(0, pages, 1)])).results()
        run.commit(len(commits))
        run.advance(result)
        if run.watch.preview is not None:
            previews.append(Preview(run.block, run.watch.step, run.watch.preview))


@pytest.mark.parametrize("sampler", SOLVERS, ids=str)
async def test_looking_at_a_run_changes_no_byte_of_it(tiny: Golden, prior: Any, sampler: dict[str, Any]) -> None:
    wanted = job(steps=5, blocks=3, **sampler)
    looked_at = replace(wanted, preview_every=2, with_probes=True)
    with engines(tiny.directory) as stages:
        await sample(stages, wanted)  # its context is cached from here on
        plain = await sample(stages, wanted)
        found = await sample(stages, looked_at)
    blocks, seen = [each for each in found if each.timings], [each for each in found if not each.timings]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(plain, blocks, strict=True))
    assert [(each.step, each.steps_saved, each.probes is None) for each in plain] == [(5, 0, True)] * 3
    _, previews = watched(prior, looked_at, every=2)
    shown = [(each.index, each.step) for each in previews]
    assert shown == [(0, 2), (0, 4), (1, 2), (1, 4), (2, 2), (2, 4)]
    assert {(each.index, each.step) for each in seen} <= {*shown}  # the reader may have been late
    assert all(torch.equal(each.latents[:2], noise(6)[4:]) for each in previews[:2])  # what is known


def test_a_preview_is_where_the_block_would_end_in_one_more_step(prior: Any) -> None:
    """After the first of many steps of Euler's rule that is what a single step gives."""
    _, [first, *_] = watched(prior, job(steps=5, blocks=1))
    [whole], _ = watched(prior, job(steps=1, blocks=1))
    torch.testing.assert_close(first.latents, whole.latents)


async def test_a_late_reader_gets_every_block_and_the_newest_preview_only() -> None:
    outbox: Outbox[str] = Outbox()
    for preview in ("of 0", "newer of 0"):
        outbox.show(preview)
    assert await outbox.get() == "newer of 0"
    outbox.show("newest of 0")
    outbox.put("0")
    outbox.show("of 1")
    outbox.show("newer of 1")
    assert outbox.unread == 1
    assert [await outbox.get(), await outbox.get()] == ["0", "newer of 1"]
    outbox.show("newest of 1")
    outbox.close()
    assert await outbox.get() is None


def test_probes_are_what_their_comments_say(prior: Any) -> None:
    [first, second], previews = watched(prior, job(steps=4))
    [[single], _], [[other], _] = (watched(prior, job(steps=1, blocks=1, guidance_scale=scale)) for scale in (2.0, 3.0))
    given = SampleJob(noise(8), 2, open=((0, 2),), sampler=SamplerSettings(guidance_scale=1.0), base_seed=1)
    [open_, known], _ = watched(prior, given, every=0)
    probes = first.probes
    assert probes.norm == pytest.approx(rms(first.latents), rel=1e-4)
    assert probes.distance == pytest.approx(rms(first.latents - noise(6)[:4]), rel=1e-4)
    assert second.probes.distance == pytest.approx(rms(second.latents - first.latents), rel=1e-4)
    assert probes.drift == pytest.approx(rms((first.latents - previews[2].latents)[2:]), rel=1e-3)
    assert single.probes.drift is None
    assert single.probes.disagreement == pytest.approx(rms((single.latents - other.latents)[2:]), rel=1e-3)
    assert (open_.probes.distance, open_.probes.disagreement, known.probes.drift) == (None, None, None)
    assert known.step == 0


def movement(previews: list[Preview]) -> list[float]:
    """By how much each step from the second on moved the open position that it moved most."""
    ends = [each.latents[2:] for each in previews]
    return [(b - a).square().mean(dim=1).sqrt().max().item() for a, b in pairwise(ends)]


@pytest.mark.parametrize("sampler", SOLVERS, ids=str)
async def test_a_block_ends_after_steps_that_hardly_move_it_and_resumes_the_same(tiny, prior, sampler):
    wanted = job(steps=12, **sampler)
    _, previews = watched(prior, replace(wanted, max_blocks=1))
    moved = movement(previews)
    pairs = [max(pair) for pair in pairwise(moved)]  # of steps 2 and 3, and on
    distance = min(pairs) * 1.001
    stop = next(step for step, pair in enumerate(pairs, 3) if pair < distance)
    stopping = replace(wanted.sampler, stable_steps=2, stable_distance=distance)
    with engines(tiny.directory) as stages:
        blocks = await sample(stages, replace(wanted, sampler=stopping))
        context = torch.cat((noise(6)[:4], blocks[0].latents))
        resumed = await sample(stages, SampleJob(context, 1, first_block=1, sampler=stopping, base_seed=0))
        together = await asyncio.gather(*(sample(stages, replace(wanted, sampler=stopping)) for _ in range(3)))
    assert (blocks[0].step, blocks[0].steps_saved) == (stop, 12 - stop)
    torch.testing.assert_close(blocks[0].latents, previews[stop - 1].latents, rtol=1e-4, atol=1e-4)
    for again in (resumed[0], together[1][1]):
        torch.testing.assert_close(again.latents, blocks[1].latents, rtol=1e-4, atol=1e-4)
        assert again.step == blocks[1].step


def test_only_steps_in_a_row_count_and_only_open_positions() -> None:
    settings = SamplerSettings(steps=7, stable_steps=2, stable_distance=0.5)
    watch, stable = Watch(settings, 0, probed=None, known=torch.tensor([True, False])), []
    for known, open_ in ((0.0, 0.0), (9.0, 0.1), (0.0, 2.0), (9.0, 2.2), (0.0, 2.4)):
        clean = torch.tensor([[known] * 4, [open_] * 4])
        watch.evaluated(True, Denoised(clean, clean, clean))
        stable.append(watch.is_stable)
    assert stable == [False, False, False, False, True]


class Ones(torch.nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.ones(*h.shape[:-1], 16)


def constant(network: Any) -> Any:
    """The velocity is the same everywhere."""
    if isinstance(network, DiT):
        network.txt_out = Ones()
    return network


def steering(*rows: list[float], start: float = 1.0, end: float = 0.0) -> Steering:
    return Steering(torch.tensor(rows), start, end)


@pytest.mark.parametrize("sampler", SOLVERS[:3], ids=str)
async def test_a_linear_probe_moves_latents_by_its_scale_and_interval(tiny: Golden, sampler: dict[str, Any]) -> None:
    one, other = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    probes = (
        steering([*one.tolist(), -torch.inf, 0.5], [*other.tolist(), -torch.inf, 0.5]),
        steering([*other.tolist(), -torch.inf, -3.0], start=0.75, end=0.25),
    )
    plain, steered = job(steps=8, blocks=1, **sampler), job(steps=8, blocks=1, steering=probes, **sampler)
    with engines(tiny.directory, network=constant) as stages:
        [straight] = await sample(stages, plain)
        [moved], beside = await asyncio.gather(sample(stages, steered), sample(stages, plain))
    expected = 0.5 * (one + other) - 3.0 * (0.75 - 0.25) * other
    torch.testing.assert_close((moved.latents - straight.latents)[2:], expected.expand(2, 16))
    assert torch.equal(moved.latents[:2], straight.latents[:2])
    torch.testing.assert_close(beside[0].latents, straight.latents, rtol=1e-4, atol=1e-4)


async def test_a_logistic_probe_moves_the_expected_end_by_the_gradient_of_its_log_likelihood(tiny: Golden) -> None:
    drawn = torch.randn(3, 17, generator=torch.Generator().manual_seed(4))
    direction, bias = drawn[:, :16], drawn[:, 16]
    probe = steering(*torch.cat((drawn, torch.full((3, 1), 0.7)), dim=1).tolist())
    with engines(tiny.directory) as stages:
        [plain] = await sample(stages, job(steps=1, blocks=1))
        [steered] = await sample(stages, job(steps=1, blocks=1, steering=(probe,)))
        [late] = await sample(stages, job(steps=1, blocks=1, steering=(probe._replace(start=0.5),)))
    end = plain.latents[2:].clone().requires_grad_()
    torch.nn.functional.logsigmoid(end @ direction.T + bias).sum().backward()
    torch.testing.assert_close(steered.latents[2:] - plain.latents[2:], 0.7 * end.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(late.latents, plain.latents)


async def test_numbers_that_no_stage_takes_are_no_preview(tiny: Golden) -> None:
    probe = steering([10_000.0] * 16 + [-torch.inf, 2.0], start=1, end=0.6)
    back = steering([10_000.0] * 16 + [-torch.inf, -4.0], start=0.6, end=0.4)
    wanted = SampleJob(EMPTY, 1, sampler=SamplerSettings(steps=5, steering=(probe, back)), base_seed=1, preview_every=1)
    with engines(tiny.directory, network=constant) as stages:
        found = await sample(stages, wanted)
    assert all(each.latents.abs().max() <= 10_000 for each in found)
    assert found[-1].timings
