"""Stage 2, the prior: block-causal flow matching on the VAE's latents (arXiv:2605.06548; MODEL.md section 7).

    L = E || v(z_t, t; z_<b) - (z_1 - z_0) ||^2,   z_t = (1 - t) z_0 + t z_1,   z_1 ~ N(0, I)

The mean runs over the open positions of noisy blocks. With `JointConfig` the VAE trains along: its own losses, and a
KL to the encoder it started from, against drift; the clean history then carries no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from colaserve_services.model.dit import DiT, DiTBlock, Modulation
from colaserve_services.model.layers import Attend
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.config import FlowConfig, JointConfig, RunConfig
from colaserve_training.flow_batch import FlowBatch, FlowInputs, draw_batch, lay_out
from colaserve_training.parallel import Objective
from colaserve_training.rows import Row, Source, micro_batches, with_whole_patches
from colaserve_training.vae_stage import VaeBatch, VaeObjective, draw_vae_step


def velocity(dit: DiT, inputs: FlowInputs) -> Tensor:
    """The network's answer at every token, (R, L, d). Times repeat, so each modulation is computed once a time."""
    times, place = torch.unique(inputs.timestep, return_inverse=True)
    e, rotary, attend = dit.emb_in(times), dit.rotary(inputs.position), attention(inputs.mask)
    flat = place.flatten()
    x = dit.txt_in.proj(inputs.values).float()
    for block in cast(Iterable[DiTBlock], dit.blocks):
        x = block(x, _spread(block.modulation(e), flat, place.shape), rotary, attend)
    shift, scale = (value.index_select(0, flat).view(*place.shape, -1) for value in dit.output_modulation(e))
    return dit.velocity(x, (shift, scale))


def attention(mask: Tensor) -> Attend:
    """Attention written out, (R, L, L) bool `mask`: its backward is far faster than the fused one's on a CPU."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (R, L, heads, head_dim)
        q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return (torch.softmax(q @ k.mT + bias, dim=-1).to(v.dtype) @ v).transpose(1, 2)

    return attend


def _spread(modulation: Modulation, flat: Tensor, shape: torch.Size) -> Modulation:
    values = {name: value.index_select(0, flat).view(*shape, -1) for name, value in vars(modulation).items()}
    return replace(modulation, **values)


def flow_loss(dit: DiT, latents: Tensor, history: Tensor, batch: FlowBatch) -> Tensor:
    """The step's mean squared velocity error, this batch's share of it; see the module's equation."""
    inputs = lay_out(latents, history, batch)
    answer = velocity(dit, inputs)[:, -inputs.weight.shape[1] :]
    errors = (answer - inputs.target).square().mean(-1)
    return (errors * inputs.weight).sum() / batch.count


class PriorObjective(Objective):
    """The DiT's loss on the latents of a frozen VAE."""

    def __init__(self, dit: DiT, vae: TextVAE):
        super().__init__()
        self.dit = dit
        self._frozen = [vae.requires_grad_(False)]  # a list: not a submodule, so neither trained nor saved

    def forward(self, batch: FlowBatch) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False):
            latents, _ = self._frozen[0].to(batch.ids.device).encode(batch.ids)
        return {"loss": flow_loss(self.dit, latents, latents, batch)}


class JointObjective(Objective):
    """DiT and VAE together."""

    def __init__(self, dit: DiT, vae: TextVAE, joint: JointConfig):
        super().__init__()
        self.dit, self.joint = dit, joint
        self.vae_objective = VaeObjective(vae, joint.loss)
        self._reference = [copy.deepcopy(vae).requires_grad_(False)]

    def forward(self, batch: tuple[FlowBatch, VaeBatch]) -> dict[str, Tensor]:
        flow, text = batch
        mean, log_variance = self.vae_objective.vae.encode(flow.ids)
        parts = self.vae_objective(text)
        prior = flow_loss(self.dit, mean, mean.detach(), flow)
        drift = self._drift(mean, log_variance, flow)
        loss = prior + self.joint.vae_weight * parts["loss"] + self.joint.reference_kl * drift
        return {**parts, "loss": loss, "flow": prior, "drift": drift}

    def _drift(self, mean: Tensor, log_variance: Tensor | None, batch: FlowBatch) -> Tensor:
        """KL(q || q_reference) a latent."""
        with torch.no_grad():
            reference, reference_log = self._reference[0].to(mean.device).encode(batch.ids)
        gap = (mean - reference) / self.vae_objective.scale
        if log_variance is None or reference_log is None:
            return 0.5 * gap.square().sum(-1).mean() * batch.share
        ratio = log_variance - reference_log
        kl = 0.5 * (gap.square() / reference_log.exp() + ratio.exp() - ratio - 1).sum(-1)
        return kl.mean() * batch.share


class JointBatch(tuple[FlowBatch, VaeBatch]):
    """Both halves of a joint step; moves as one."""

    def to(self, device: torch.device) -> JointBatch:
        return JointBatch((self[0].to(device), self[1].to(device)))


class PriorStage:
    """Stage 2 for the training loop."""

    name = "prior"

    def __init__(
        self,
        dit: DiT,
        vae: TextVAE,
        source: Source,
        run: RunConfig,
        flow: FlowConfig,
        pad_id: int,
        joint: JointConfig | None = None,
    ):
        self.dit, self.vae, self.source, self.run, self.flow = dit, vae, source, run, flow
        self.pad_id, self.joint = pad_id, joint
        self.module: Objective = JointObjective(dit, vae, joint) if joint else PriorObjective(dit, vae)

    def batches(self, step: int, rank: int, world: int) -> list[FlowBatch] | list[JointBatch]:
        groups = micro_batches(self.source.rows(step, self.run.rows), self.run.micro_batches)
        return self.draw(groups, f"prior:{self.run.seed}:{step}", rank, world)

    def draw(
        self, groups: Sequence[Sequence[Row]], seed: str, rank: int, world: int
    ) -> list[FlowBatch] | list[JointBatch]:
        """A batch for each of a step's groups of rows."""
        size, patch = self.dit.config.block_size, self.vae.config.patch_size
        groups = [with_whole_patches(rows, patch, self.pad_id) for rows in groups]
        drawn = [
            draw_batch(rows, size, self.dit.config.txt_in_channels, self.pad_id, self.flow, f"{seed}:{part}", patch)
            for part, rows in enumerate(groups)
        ]
        count = sum(batch.count for batch in drawn)
        flow = [replace(batch, count=count, share=1 / (world * len(drawn))).part(rank, world) for batch in drawn]
        if self.joint is None:
            return flow
        texts = draw_vae_step(groups, self.vae, self.pad_id, size * patch, self.joint.loss, seed, rank, world)
        return [JointBatch(pair) for pair in zip(flow, texts, strict=True)]
