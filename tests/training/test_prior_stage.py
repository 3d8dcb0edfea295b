"""Flow matching against closed forms: latents of two blocks are jointly Gaussian, so every velocity is known.

Block 0 is drawn from N(m, C); block 1 is m + A (block 0 - m) + noise of covariance C - A C A', so that it has the same
distribution when nothing is known of block 0 (rotary positions being relative, the network could not tell the two
apart). A tiny DiT learns all situations at once: without history, after one, and with the first position pinned.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import masked_attention
from colaserve_training.config import FlowConfig, OptimizerConfig
from colaserve_training.optim import rate_at
from colaserve_training.prior_stage import FlowBatch, attention, draw_batch, draw_time, flow_loss
from colaserve_training.release import new_dit
from colaserve_training.rows import Row
from tests.training.conftest import dit_config

SIZE, DIM, ROWS, STEPS = 2, 2, 96, 450
MEAN = torch.tensor([0.8, -0.5, 0.2, 0.6])
MIX = torch.tensor([[0.9, 0, 0, 0], [0.5, 0.4, 0, 0], [0.7, 0, 0.3, 0], [0, 0.7, 0, 0.3]])
C = MIX @ MIX.T
A = 0.75 * torch.eye(4)
N = C - A @ C @ A.T


def latents(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4, 2): two blocks of two positions of two channels."""
    first = MEAN + torch.randn(count, 4, generator=generator) @ MIX.T
    noise = torch.randn(count, 4, generator=generator) @ torch.linalg.cholesky(N).T
    return torch.cat([first, MEAN + (first - MEAN) @ A.T + noise], dim=1).view(count, 4, DIM)


TEXTS = [Row(tuple(range(3, 10)), prompt=3), Row(tuple(range(3, 15))), Row((5, 6), prompt=1)]
FLOW = FlowConfig(copies=4, empty_history=0.25, history_noise=0, pin=0.5, pure_noise=0.05)


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dit = new_dit(dit_config(dim=32, layers=2, latent_dim=DIM, block_size=SIZE))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=8e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    rows = [Row((3, 4, 5, 6), prompt=SIZE)] * ROWS  # block 0 is given: only empty histories train a block alone
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * rate_at(step, STEPS, OptimizerConfig(warmup=20))
        batch = draw_batch(rows, SIZE, DIM, 2, FLOW, f"toy:{step}")
        z = latents(ROWS, generator)
        optimizer.zero_grad()
        flow_loss(dit, z, z, batch).backward()
        optimizer.step()
    return dit.eval()


def exact(z: Tensor, t: float, mean: Tensor, cov: Tensor) -> Tensor:
    """E[z_1 - z_0 | z_t] for z_0 ~ N(mean, cov), z_1 ~ N(0, I): z and mean are (count, k)."""
    eye = torch.eye(cov.shape[0])
    total = (1 - t) ** 2 * cov + t**2 * eye
    rest = torch.linalg.solve(total, (z - (1 - t) * mean).T)
    return (t * rest).T - (mean + ((1 - t) * cov @ rest).T)


@dataclass(frozen=True)
class Situation:
    """A block to write, what came before it and how many of its positions are pinned."""

    block: int
    history: bool
    pinned: int

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (count, open * 2) and covariance of the open positions of `z` (count, 4, 2), given the rest."""
        before, inside = z[:, :2].flatten(1), z[:, 2:].flatten(1) if self.block else z[:, :2].flatten(1)
        mean, cov = MEAN.expand_as(before), C
        if self.block and self.history:
            mean, cov = MEAN + (before - MEAN) @ A.T, N
        k = self.pinned * DIM
        gain = cov[k:, :k] @ torch.linalg.inv(cov[:k, :k]) if k else cov.new_zeros(4, 0)
        return mean[:, k:] + (inside[:, :k] - mean[:, :k]) @ gain.T, cov[k:, k:] - gain @ cov[:k, k:]

    def answer(self, dit: DiT, z: Tensor, noisy: Tensor, t: float) -> Tensor:
        """The network's velocity at the open positions, (count, open * 2)."""
        count = len(z)
        past = z[:, :2] if self.block and self.history else z[:, :0]
        held = z[:, 2 * self.block : 2 * self.block + self.pinned]
        values = torch.cat([past, held, noisy.view(count, -1, DIM)], dim=1)
        known = past.shape[1] + self.pinned
        timestep = torch.full(values.shape[:2], 1000 * t)
        timestep[:, :known] = 0
        position = torch.arange(values.shape[1]).expand(count, -1) + (2 * self.block - past.shape[1])
        blocks = torch.arange(values.shape[1]) // SIZE
        mask = (blocks <= blocks[:, None]).expand(count, -1, -1)
        with torch.no_grad():
            return dit(values, timestep, position, attention(mask))[:, known:].flatten(1)


SITUATIONS = {
    "alone": Situation(0, False, 0),
    "after a history": Situation(1, True, 0),
    "a later block without history": Situation(1, False, 0),
    "pinned": Situation(0, False, 1),
    "pinned after a history": Situation(1, True, 1),
}
BOUND = 0.12  # mean squared difference to the exact velocity, over its variance


def distance(dit: DiT, case: Situation) -> float:
    """Relative squared distance to the exact velocity, over times where z_t is drawn from its own distribution."""
    generator, errors = torch.Generator().manual_seed(5), []
    for t in (0.15, 0.4, 0.65, 0.9, 1.0):
        z = latents(800, generator)
        mean, cov = case.posterior(z)
        start = mean + torch.randn(mean.shape, generator=generator) @ torch.linalg.cholesky(cov).T
        noisy = (1 - t) * start + t * torch.randn(mean.shape, generator=generator)
        wanted = exact(noisy, t, mean, cov)
        errors.append((case.answer(dit, z, noisy, t) - wanted).square().mean() / wanted.var())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_learned_velocity_is_close_to_the_closed_form(dit, name):
    assert distance(dit, SITUATIONS[name]) < BOUND


def test_one_steps_loss_is_the_equation_written_out():
    """Every noisy block by itself after its own clean history, through the network's plain forward."""
    torch.manual_seed(3)
    dit = new_dit(dit_config(latent_dim=DIM, block_size=SIZE))
    torch.nn.init.normal_(dit.txt_out.proj.weight)
    rows = [Row((3, 4, 5, 6, 7), prompt=3), Row((3, 4)), Row((3, 4, 5, 6, 7, 8))]
    batch = drawn(rows, FlowConfig(copies=6, history_noise=0, empty_history=0.4, pin=0.5), "hand")
    kinds = set(zip(batch.block[batch.used].tolist(), batch.history[batch.used].tolist(), strict=True))
    assert {(1, True), (1, False), (2, True), (2, False)} <= kinds
    z = torch.randn(3, 6, DIM)
    errors = [each for at in batch.used.nonzero().tolist() for each in _errors_by_hand(dit, z, batch, *at)]
    assert len(errors) == batch.count
    assert flow_loss(dit, z, z, batch).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def _errors_by_hand(dit: DiT, z: Tensor, batch: FlowBatch, row: int, copy: int) -> list[float]:
    """Squared velocity errors of the open positions of one noisy block."""
    block, pinned, t = int(batch.block[row, copy]), int(batch.pinned[row, copy]), float(batch.time[row, copy])
    past = block * SIZE if batch.history[row, copy] else 0
    start, noise = z[row, block * SIZE : (block + 1) * SIZE], batch.noise[row, copy]
    noisy = torch.cat([start[:pinned], ((1 - t) * start + t * noise)[pinned:]])
    values = torch.cat([z[row, :past], noisy])[None]
    time = torch.tensor([[0.0] * (past + pinned) + [1000 * t] * (SIZE - pinned)])
    position = torch.cat([torch.arange(past), block * SIZE + torch.arange(SIZE)])[None]
    blocks = position // SIZE
    with torch.no_grad():
        v = dit(values, time, position, masked_attention((blocks[:, None] <= blocks[..., None])[:, None]))[0, past:]
    return (v - (noise - start))[pinned:].square().mean(-1).tolist()


def drawn(rows=TEXTS, flow=FLOW, seed="s"):
    return draw_batch(rows, SIZE, DIM, 2, flow, seed)


def test_a_row_trains_the_blocks_from_its_prompts_end_which_is_pinned_in_the_block_that_holds_it():
    batch = drawn(flow=FlowConfig(copies=8, pin=0))
    found = [
        {int(block): int(count) for block, count, used in zip(*row, strict=True) if used}
        for row in zip(batch.block, batch.pinned, batch.used, strict=True)
    ]
    assert found == [{1: 1, 2: 0, 3: 0}, dict.fromkeys(range(6), 0), {0: 1}]


def test_shares_of_empty_history_and_pins_are_those_asked_for():
    batch = draw_batch(
        [Row(tuple(range(3, 35)))] * 200, 4, DIM, 2, FlowConfig(copies=8, empty_history=0.25, pin=0.4), "s"
    )
    assert abs((~batch.history).float().mean() - 0.25) < 0.04
    assert abs((batch.pinned > 0).float().mean() - 0.4) < 0.04
    assert set(batch.pinned.unique().tolist()) == {0, 1, 2, 3}


def test_times_are_logit_normal_uniform_and_sometimes_exactly_one():
    rng = random.Random(0)
    normal = torch.logit(torch.tensor([draw_time(FlowConfig(uniform_time=0, pure_noise=0), rng) for _ in range(4000)]))
    uniform = torch.tensor([draw_time(FlowConfig(uniform_time=1, pure_noise=0), rng) for _ in range(4000)])
    found = [normal.mean(), normal.std(), uniform.mean(), uniform.std()]
    torch.testing.assert_close(torch.stack(found), torch.tensor([1, 1, 0.5, 12**-0.5]), rtol=0, atol=0.06)
    ones = [draw_time(FlowConfig(pure_noise=0.2), rng) == 1 for _ in range(4000)]
    assert abs(sum(ones) / 4000 - 0.2) < 0.03


def test_a_batch_is_a_function_of_its_seed_and_processes_share_its_rows_out():
    one, again, other = drawn(seed="a"), drawn(seed="a"), drawn(seed="b")
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.time, again.time)
    assert not torch.equal(one.noise, other.noise)
    parts = [one.part(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([parts[0].noise, parts[1].noise])[[0, 2, 1]], one.noise)
    assert parts[0].count == one.count
