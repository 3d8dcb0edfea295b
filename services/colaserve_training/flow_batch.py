"""Stage 2's one pass: a clean copy of each row and several noisy blocks, with the masks that keep them apart.

A row of n latents becomes [clean 0 .. n-B) | noisy block | noisy block | ...]. Noisy block b sees the clean blocks
before b and itself; a clean block sees the clean blocks up to its own; copies never see each other. The last clean
block has no reader and is left out. Rotary positions are those that the latents have in the row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colaserve_services.model.dit import TIME_SCALE
from colaserve_training.config import FlowConfig
from colaserve_training.rows import Batch, Row, pad_rows


@dataclass(frozen=True)
class FlowBatch(Batch):
    """R rows of n latents, K noisy blocks of B latents each; all random draws of the pass are in it."""

    ids: Tensor  # (R, n * P) int64, padded to whole blocks
    block: Tensor  # (R, K) int64: which block a copy is of
    pinned: Tensor  # (R, K) int64: its first positions that are known, 0 .. B-1
    history: Tensor  # (R, K) bool: False trains the branch without history
    time: Tensor  # (R, K) float32, t in [0, 1]
    used: Tensor  # (R, K) bool: False for copies that only fill the tensor up
    noise: Tensor  # (R, K, B, d) float32
    history_noise: Tensor  # (R, n, d) float32, already scaled
    count: float  # open positions in the whole step: what the loss is divided by
    share: float = 1.0  # this batch's share of the step's passes, for means over latents


@dataclass(frozen=True)
class FlowInputs:
    """What the network is given and what it should answer; L = n - B + K * B tokens a row."""

    values: Tensor  # (R, L, d)
    timestep: Tensor  # (R, L) in 0 .. 1000; 0 for clean and pinned positions
    position: Tensor  # (R, L) int64, rotary positions
    mask: Tensor  # (R, L, L) bool, True where a query (row) sees a key (column)
    target: Tensor  # (R, K * B, d): the velocity z_1 - z_0 of the noisy part
    weight: Tensor  # (R, K * B): 1 where the loss counts, 0 at pinned and unused positions


def draw_batch(
    rows: Sequence[Row], block_size: int, dim: int, pad_id: int, flow: FlowConfig, seed: str, patch: int = 1
) -> FlowBatch:
    """Choose blocks, pins, times and noise for `rows`; a function of its arguments.

    A latent is `patch` tokens, and prompts are whole latents.
    """
    rng = random.Random(seed)
    plans = [_plan(-(-len(row.ids) // patch), row.prompt // patch, block_size, flow, rng) for row in rows]
    width = max(len(plan) for plan in plans)
    table = [[*plan, *[_Copy(plan[0].block, 0, True, 1.0, False)] * (width - len(plan))] for plan in plans]
    ids = pad_rows(rows, block_size * patch, pad_id)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    sigma = flow.history_noise * torch.rand(len(rows), 1, 1, generator=generator)
    return FlowBatch(
        ids=ids,
        block=torch.tensor([[copy.block for copy in plan] for plan in table]),
        pinned=torch.tensor([[copy.pinned for copy in plan] for plan in table]),
        history=torch.tensor([[copy.history for copy in plan] for plan in table]),
        time=torch.tensor([[copy.time for copy in plan] for plan in table]),
        used=torch.tensor([[copy.used for copy in plan] for plan in table]),
        noise=torch.randn(len(rows), width, block_size, dim, generator=generator),
        history_noise=sigma * torch.randn(len(rows), ids.shape[1] // patch, dim, generator=generator),
        count=float(sum(block_size - copy.pinned for plan in plans for copy in plan)),
    )


@dataclass(frozen=True)
class _Copy:
    block: int
    pinned: int
    history: bool
    time: float
    used: bool = True


def _plan(latents: int, prompt: int, block_size: int, flow: FlowConfig, rng: random.Random) -> list[_Copy]:
    """The copies of one row: its blocks from the one that holds the prompt's end, round robin from a random one."""
    first, last = prompt // block_size, (latents - 1) // block_size
    blocks = list(range(first, last + 1))
    count = min(max(flow.copies, len(blocks)), flow.max_copies)
    start = rng.randrange(len(blocks))
    return [_copy(blocks[(start + k) % len(blocks)], prompt, block_size, flow, rng) for k in range(count)]


def _copy(block: int, prompt: int, block_size: int, flow: FlowConfig, rng: random.Random) -> _Copy:
    pinned = max(0, prompt - block * block_size)
    if pinned == 0 and rng.random() < flow.pin:
        pinned = rng.randrange(1, block_size) if block_size > 1 else 0
    return _Copy(block, pinned, rng.random() >= flow.empty_history, draw_time(flow, rng))


def draw_time(flow: FlowConfig, rng: random.Random) -> float:
    """t in [0, 1]: exactly 1, uniform or logit-normal(loc, scale), by the shares of `flow`."""
    if rng.random() < flow.pure_noise:
        return 1.0
    if rng.random() < flow.uniform_time:
        return rng.random()
    return float(torch.sigmoid(torch.tensor(rng.gauss(flow.loc, flow.scale), dtype=torch.float64)))


def lay_out(latents: Tensor, history: Tensor, batch: FlowBatch) -> FlowInputs:
    """Build the pass: z_t = (1 - t) z_0 + t z_1 at open positions, z_0 with t = 0 at pinned ones (MODEL.md section 7).

    latents (R, n, d) are z_0 and carry gradients if they have any; `history` (R, n, d) is the clean copy.
    """
    rows, _, size, dim = batch.noise.shape
    clean = latents.shape[1] - size
    position = batch.block[..., None] * size + torch.arange(size, device=latents.device)  # (R, K, B)
    start = torch.gather(latents, 1, position.flatten(1)[..., None].expand(-1, -1, dim)).view_as(batch.noise)
    open_ = torch.arange(size, device=latents.device) >= batch.pinned[..., None]
    time = torch.where(open_, batch.time[..., None], 0.0)
    noisy = torch.lerp(start, batch.noise, time[..., None])
    zeros = time.new_zeros(rows, clean)
    return FlowInputs(
        values=torch.cat([(history + batch.history_noise)[:, :clean], noisy.flatten(1, 2)], dim=1),
        timestep=TIME_SCALE * torch.cat([zeros, time.flatten(1)], dim=1),
        position=torch.cat([torch.arange(clean, device=latents.device).expand(rows, -1), position.flatten(1)], dim=1),
        mask=clean_and_noisy_mask(clean, size, batch.block, batch.history),
        target=(batch.noise - start).flatten(1, 2),
        weight=(open_ & batch.used[..., None]).flatten(1).float(),
    )


def clean_and_noisy_mask(clean: int, size: int, block: Tensor, history: Tensor) -> Tensor:
    """(R, L, L) bool for `clean` clean positions and K copies of `size`; block and history are (R, K)."""
    rows, copies = block.shape
    device = block.device
    clean_block = torch.arange(clean, device=device) // size
    copy = torch.arange(copies, device=device).repeat_interleave(size)
    query_block = block.repeat_interleave(size, dim=1)  # (R, K * B)
    sees_clean = (clean_block < query_block[..., None]) & history.repeat_interleave(size, dim=1)[..., None]
    mask = torch.zeros(rows, clean + copies * size, clean + copies * size, dtype=torch.bool, device=device)
    mask[:, :clean, :clean] = clean_block <= clean_block[:, None]
    mask[:, clean:, :clean] = sees_clean
    mask[:, clean:, clean:] = copy == copy[:, None]
    return mask
