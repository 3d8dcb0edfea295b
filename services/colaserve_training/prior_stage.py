"""Stage 2, the prior: block-causal flow matching on the VAE's latents (arXiv:2605.06548; MODEL.md section 7).

    L = E || v(z_t, t; z_<b) - (z_1 - z_0) ||^2,   z_t = (1 - t) z_0 + t z_1,   z_1 ~ N(0, I)

The mean runs over the open positions of noisy blocks. With `JointConfig` the VAE trains along: its own losses, and a
KL to the encoder it started from, against drift; the clean history then carries no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import Attend
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.config import FlowConfig, JointConfig
from colaserve_training.flow_batch import FlowBatch, draw_batch, lay_out
from colaserve_training.parallel import Objective
from colaserve_training.rows import Row, with_whole_patches
from colaserve_training.vae_stage import VaeBatch, draw_vae_step, vae_losses


def attention(mask: Tensor) -> Attend:
    """Attention written out, (R, L, L) bool `mask`: its backward is far faster than the fused one's on a CPU."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (R, L, heads, head_dim)
        q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return (torch.softmax(q @ k.mT + bias, dim=-1).to(v.dtype) @ v).transpose(1, 2)

    return attend


def flow_loss(dit: DiT, latents: Tensor, history: Tensor, batch: FlowBatch) -> Tensor:
    """The step's mean squared velocity error, this batch's share of it; see the module's equation."""
    inputs = lay_out(latents, history, batch)
    answer = dit(inputs.values, inputs.timestep, inputs.position, attention(inputs.mask))
    errors = (answer[:, -inputs.weight.shape[1] :] - inputs.target).square().mean(-1)
    return (errors * inputs.weight).sum() / batch.count


class JointBatch(tuple[FlowBatch, VaeBatch]):
    """Both halves of a joint step; moves as one."""

    def to(self, device: torch.device) -> JointBatch:
        return JointBatch((self[0].to(device), self[1].to(device)))


class PriorObjective(Objective):
    """Stage 2 for the training loop: the DiT on the latents of a frozen VAE, or with `joint` both networks together."""

    name = "prior"

    def __init__(self, dit: DiT, vae: TextVAE, flow: FlowConfig, pad_id: int, joint: JointConfig | None = None):
        super().__init__()
        self.dit, self._flow, self._pad_id, self._joint = dit, flow, pad_id, joint
        if joint:
            self.vae = vae
            vae = copy.deepcopy(vae)
        self._start = [vae.requires_grad_(False)]  # a list: not a submodule, so neither trained nor saved
        self._patch = vae.config.patch_size

    def draw(self, groups: Sequence[Sequence[Row]], seed: str, rank: int, world: int) -> Sequence[Any]:
        size, channels = self.dit.config.block_size, self.dit.config.txt_in_channels
        groups = [with_whole_patches(rows, self._patch, self._pad_id) for rows in groups]
        drawn = [
            draw_batch(rows, size, channels, self._pad_id, self._flow, f"{seed}:{part}", self._patch)
            for part, rows in enumerate(groups)
        ]
        count = sum(batch.count for batch in drawn)
        flow = [replace(batch, count=count, share=1 / (world * len(drawn))).part(rank, world) for batch in drawn]
        if self._joint is None:
            return flow
        texts = draw_vae_step(groups, self.vae, self._pad_id, size, self._joint.loss, seed, rank, world)
        return [JointBatch(pair) for pair in zip(flow, texts, strict=True)]

    def forward(self, batch: FlowBatch | JointBatch) -> dict[str, Tensor]:
        if isinstance(batch, JointBatch):
            return self._together(*batch)
        with torch.autocast(batch.ids.device.type, enabled=False):
            latents, _ = self._encoded_by_start(batch.ids)
        return {"loss": flow_loss(self.dit, latents, latents, batch)}

    def _together(self, flow: FlowBatch, text: VaeBatch) -> dict[str, Tensor]:
        assert self._joint is not None
        mean, log_variance = self.vae.encode(flow.ids)
        parts = vae_losses(self.vae, text, self._joint.loss)
        prior = flow_loss(self.dit, mean, mean.detach(), flow)
        drift = self._drift(mean, log_variance, flow)
        loss = prior + self._joint.vae_weight * parts["loss"] + self._joint.reference_kl * drift
        return {**parts, "loss": loss, "flow": prior, "drift": drift}

    def _drift(self, mean: Tensor, log_variance: Tensor | None, batch: FlowBatch) -> Tensor:
        """KL(q || q of the start) a latent."""
        start, start_log = self._encoded_by_start(batch.ids)
        gap = (mean - start) / self.vae.config.scaling_factor
        if log_variance is None or start_log is None:
            return 0.5 * gap.square().sum(-1).mean() * batch.share
        ratio = log_variance - start_log
        kl = 0.5 * (gap.square() / start_log.exp() + ratio.exp() - ratio - 1).sum(-1)
        return kl.mean() * batch.share

    @torch.no_grad()
    def _encoded_by_start(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance by the VAE that the run started from."""
        return self._start[0].to(ids.device).encode(ids)
