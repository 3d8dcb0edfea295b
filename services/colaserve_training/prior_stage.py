"""Stage 2, the prior: block-causal flow matching on the VAE's latents (arXiv:2605.06548; MODEL.md section 7).

    L = E || v(z_t, t; z_<b) - (z_1 - z_0) ||^2,   z_t = (1 - t) z_0 + t z_1,   z_1 ~ N(0, I)

The mean runs over the open positions of noisy blocks. One pass has a clean copy of each row and several noisy blocks: a
row of n latents becomes [clean 0 .. n-B) | noisy block | noisy block | ...]. Noisy block b sees the clean blocks before
b and itself; a clean block sees the clean blocks up to its own; copies never see each other. The last clean block has
no reader and is left out. Rotary positions are those that the latents have in the row.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colaserve_services.model.dit import TIME_SCALE, DiT
from colaserve_services.model.layers import Attend
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.config import FLOW, JOINT, FlowConfig, JointConfig
from colaserve_training.parallel import Objective
from colaserve_training.rows import Batch, Row, pad_rows, with_whole_patches
from colaserve_training.vae_stage import VaeBatch, VaeObjective, kl_to_standard_normal


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
    count: float  # open positions: what the loss is divided by
    rows: float  # sequences: what a mean over all latents is divided by
    text: VaeBatch | None = None  # of the same rows, where the VAE is trained along


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
    noise = torch.randn(len(rows), width, block_size, dim, generator=generator)
    history_noise = sigma * torch.randn(len(rows), ids.shape[1] // patch, dim, generator=generator)
    count = sum(block_size - copy.pinned for plan in plans for copy in plan)
    columns: Any = zip(*(zip(*plan, strict=True) for plan in table), strict=True)
    copies: dict[str, Any] = dict(zip(_Copy._fields, map(torch.tensor, columns), strict=True))
    return FlowBatch(
        ids=ids, **copies, noise=noise, history_noise=history_noise, count=float(count), rows=float(len(rows))
    )


class _Copy(NamedTuple):
    """A noisy block: fields of a `FlowBatch`, in its order."""

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
    start, copies = rng.randrange(len(blocks)), []
    for k in range(count):
        block = blocks[(start + k) % len(blocks)]
        pinned = max(0, prompt - block * block_size)
        if pinned == 0 and rng.random() < flow.pin:
            pinned = rng.randrange(1, block_size) if block_size > 1 else 0
        copies.append(_Copy(block, pinned, rng.random() >= flow.empty_history, draw_time(flow, rng)))
    return copies


def draw_time(flow: FlowConfig, rng: random.Random) -> float:
    """t in [0, 1]: exactly 1, uniform or logit-normal(loc, scale), by the shares of `flow`."""
    if rng.random() < flow.pure_noise:
        return 1.0
    if rng.random() < flow.uniform_time:
        return rng.random()
    return float(torch.sigmoid(torch.tensor(rng.gauss(flow.loc, flow.scale), dtype=torch.float64)))


def flow_loss(dit: DiT, latents: Tensor, history: Tensor, batch: FlowBatch) -> Tensor:
    """The step's mean squared velocity error, this batch's share of it; see the module's equation.

    z_t = (1 - t) z_0 + t z_1 at open positions, z_0 with t = 0 at pinned ones (MODEL.md section 7). latents (R, n, d)
    are z_0 and carry gradients if they have any; `history` (R, n, d) is the clean copy. A row of the pass has
    L = n - B + K * B tokens.
    """
    rows, _, size, dim = batch.noise.shape
    clean = latents.shape[1] - size
    position = batch.block[..., None] * size + torch.arange(size, device=latents.device)  # (R, K, B)
    start = torch.gather(latents, 1, position.flatten(1)[..., None].expand(-1, -1, dim)).view_as(batch.noise)
    open_ = torch.arange(size, device=latents.device) >= batch.pinned[..., None]
    time = torch.where(open_, batch.time[..., None], 0.0)
    noisy = torch.lerp(start, batch.noise, time[..., None])
    answer = dit(
        torch.cat([(history + batch.history_noise)[:, :clean], noisy.flatten(1, 2)], dim=1),  # (R, L, d)
        TIME_SCALE * torch.cat([time.new_zeros(rows, clean), time.flatten(1)], dim=1),  # (R, L)
        torch.cat([torch.arange(clean, device=latents.device).expand(rows, -1), position.flatten(1)], dim=1),
        attention(clean_and_noisy_mask(clean, size, batch.block, batch.history)),
    )
    weight = (open_ & batch.used[..., None]).flatten(1).float()  # (R, K * B)
    errors = (answer[:, clean:] - (batch.noise - start).flatten(1, 2)).square().mean(-1)
    return (errors * weight).sum() / batch.count


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


def attention(mask: Tensor) -> Attend:
    """Attention written out, (R, L, L) bool `mask`: its backward is far faster than the fused one's on a CPU."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (R, L, heads, head_dim)
        q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return (torch.softmax(q @ k.mT + bias, dim=-1).to(v.dtype) @ v).transpose(1, 2)

    return attend


class PriorObjective(Objective):
    """Stage 2 for the training loop: the DiT on the latents of a frozen VAE."""

    name = "prior"

    def __init__(self, dit: DiT, vae: TextVAE, pad_id: int, flow: FlowConfig = FLOW):
        super().__init__()
        self.dit, self._flow, self._pad_id = dit, flow, pad_id
        self._start = [vae.requires_grad_(False)]  # a list: not a submodule, so neither trained nor saved
        self._patch = vae.config.patch_size

    def draw_batch(self, rows: Sequence[Row], seed: str) -> FlowBatch:
        config, rows = self.dit.config, with_whole_patches(rows, self._patch, self._pad_id)
        size, channels = config.block_size, config.txt_in_channels
        return draw_batch(rows, size, channels, self._pad_id, self._flow, seed, self._patch)

    def forward(self, batch: FlowBatch) -> dict[str, Tensor]:
        with torch.autocast(batch.ids.device.type, enabled=False):
            latents, _ = self._encoded_by_start(batch.ids)
        return {"loss": flow_loss(self.dit, latents, latents, batch)}

    @torch.no_grad()
    def _encoded_by_start(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance by the VAE that the run started from."""
        return self._start[0].to(ids.device).encode(ids)


class JointObjective(PriorObjective):
    """Both networks together: the VAE's own losses too, and a KL to the encoder it started from, against drift.

    The clean history carries no gradient.
    """

    def __init__(self, dit: DiT, vae: TextVAE, pad_id: int, flow: FlowConfig = FLOW, joint: JointConfig = JOINT):
        super().__init__(dit, copy.deepcopy(vae), pad_id, flow)
        self.vae, self._joint = vae, joint
        self._texts = [VaeObjective(vae, pad_id, dit.config.block_size, joint.loss)]  # a list, as above

    def draw(self, groups: Sequence[Sequence[Row]], seed: str, rank: int, world: int) -> Sequence[Batch]:
        groups = [with_whole_patches(rows, self._patch, self._pad_id) for rows in groups]
        texts: Sequence[Any] = self._texts[0].draw(groups, seed, rank, world)
        flow: Sequence[Any] = super().draw(groups, seed, rank, world)
        return [replace(batch, text=text) for batch, text in zip(flow, texts, strict=True)]

    def forward(self, batch: FlowBatch) -> dict[str, Tensor]:
        mean, log_variance = self.vae.encode(batch.ids)
        parts = self._texts[0](batch.text)
        prior = flow_loss(self.dit, mean, mean.detach(), batch)
        start, start_log = self._encoded_by_start(batch.ids)
        gap = (mean - start) / self.vae.config.scaling_factor
        ratio = torch.zeros_like(gap)
        if log_variance is not None and start_log is not None:
            gap, ratio = gap * torch.exp(-0.5 * start_log), log_variance - start_log
        drift = kl_to_standard_normal(gap, ratio).mean(1).sum() / batch.rows  # KL(q || q of the start) a latent
        loss = prior + self._joint.vae_weight * parts["loss"] + self._joint.reference_kl * drift
        return {**parts, "loss": loss, "flow": prior, "drift": drift}
