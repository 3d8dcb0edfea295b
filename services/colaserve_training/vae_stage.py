"""Stage 1, the Text VAE: reconstruction + beta KL + lambda masking (arXiv:2605.06548; MODEL.md section 7).

    L = E_q[-log p(x | z)] + beta KL(q(z | x) || N(0, I)) + lambda E_masked[-log p(x_i | z~)]

z ~ q(z | x) is drawn once a token; the decoder sees it with extra noise, so that it forgives the prior's small errors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.text_vae import TextVAE
from colaserve_training.batch import Batch
from colaserve_training.config import RunConfig, VaeLossConfig
from colaserve_training.parallel import Objective
from colaserve_training.rows import Row, Source, micro_batches, pad_rows


@dataclass(frozen=True)
class VaeBatch(Batch):
    """R rows of n latents; all random draws of the pass are in it. Counts are those of the whole step."""

    ids: Tensor  # (R, n * P) int64, what is to be written
    valid: Tensor  # (R, n * P) bool: False past a row's last block
    masked: Tensor  # (R, n * P) bool: tokens hidden from the encoder
    noise: Tensor  # (R, n, d): draws of the posterior
    decoder_noise: Tensor  # (R, n, d), already scaled
    tokens: float  # valid and not masked
    hidden: float  # valid and masked


class VaeObjective(Objective):
    """The losses of a batch, as shares of the whole step's means."""

    def __init__(self, vae: TextVAE, loss: VaeLossConfig):
        super().__init__()
        self.vae, self.weights = vae, loss

    def forward(self, batch: VaeBatch) -> dict[str, Tensor]:
        mean, log_variance = self.vae.encode(torch.where(batch.masked, self.mask_id, batch.ids))
        logits = self.vae.decode(draw_posterior(mean, log_variance, batch.noise, self.scale) + batch.decoder_noise)
        errors = F.cross_entropy(logits.transpose(1, 2), batch.ids, reduction="none")
        return self._total(errors, batch, self._kl(mean, log_variance, batch))

    @property
    def mask_id(self) -> int:
        """The last row of the encoder's embedding, which inference never reads."""
        return self.vae.config.vocab_size

    @property
    def scale(self) -> float:
        return self.vae.config.scaling_factor

    def _total(self, errors: Tensor, batch: VaeBatch, kl: Tensor) -> dict[str, Tensor]:
        reconstruction = errors[batch.valid & ~batch.masked].sum() / batch.tokens
        masking = errors[batch.valid & batch.masked].sum() / max(batch.hidden, 1)
        loss = reconstruction + self.weights.kl * kl + self.weights.masking * masking
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "masking": masking}

    def _kl(self, mean: Tensor, log_variance: Tensor | None, batch: VaeBatch) -> Tensor:
        patch = self.vae.config.patch_size
        valid = batch.valid[:, ::patch]
        latents = (batch.tokens + batch.hidden) / patch
        if log_variance is None:
            return mean.new_zeros(())
        raw = mean / self.scale + self.vae.config.shifting_factor
        return kl_to_standard_normal(raw, log_variance)[valid].sum() / latents


def draw_posterior(mean: Tensor, log_variance: Tensor | None, noise: Tensor, scale: float = 1.0) -> Tensor:
    """z = mean + sigma * noise in normalised units (sigma is scaled as the mean is)."""
    return mean if log_variance is None else mean + scale * torch.exp(0.5 * log_variance) * noise


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) summed over channels: (..., d) -> (...)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(-1)


def draw_vae_batch(
    rows: Sequence[Row], vae: TextVAE, pad_id: int, multiple: int, loss: VaeLossConfig, seed: str
) -> VaeBatch:
    """Choose masked tokens and noise for `rows`; `multiple` is what rows are padded to, in tokens."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    ids = pad_rows(rows, multiple, pad_id)
    ends = torch.tensor([-(-len(row.ids) // multiple) * multiple for row in rows])
    valid = torch.arange(ids.shape[1]) < ends[:, None]
    chosen = torch.rand(len(rows), 1, generator=generator) < loss.masked_rows
    masked = chosen & (torch.rand(ids.shape, generator=generator) < loss.masked_tokens)
    shape = (len(rows), ids.shape[1] // vae.config.patch_size, vae.config.latent_dim)
    sigma = loss.decoder_noise * torch.rand(len(rows), 1, 1, generator=generator)
    noise, extra = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    tokens, hidden = (valid & ~masked).sum(), (valid & masked).sum()
    return VaeBatch(ids, valid, masked, noise, sigma * extra, float(tokens), float(hidden))


def draw_vae_step(
    groups: Sequence[Sequence[Row]], vae: TextVAE, pad_id: int, multiple: int, loss: VaeLossConfig, seed: str,
    rank: int, world: int,
) -> list[VaeBatch]:  # fmt: skip
    """One process's part of each of a step's batches, normalised over the whole step."""
    drawn = [draw_vae_batch(rows, vae, pad_id, multiple, loss, f"{seed}:{part}") for part, rows in enumerate(groups)]
    tokens, hidden = sum(batch.tokens for batch in drawn), sum(batch.hidden for batch in drawn)
    return [replace(batch, tokens=tokens, hidden=hidden).part(rank, world) for batch in drawn]


class VaeStage:
    """Stage 1 for the training loop."""

    name = "vae"

    def __init__(self, vae: TextVAE, source: Source, run: RunConfig, loss: VaeLossConfig, pad_id: int, block_size: int):
        self.vae, self.source, self.run, self.loss, self.pad_id = vae, source, run, loss, pad_id
        self.multiple = block_size * vae.config.patch_size
        self.module: Objective = VaeObjective(vae, loss)

    def batches(self, step: int, rank: int, world: int) -> list[VaeBatch]:
        groups = micro_batches(self.source.rows(step, self.run.rows), self.run.micro_batches)
        return self.draw(groups, f"vae:{self.run.seed}:{step}", rank, world)

    def draw(self, groups: Sequence[Sequence[Row]], seed: str, rank: int, world: int) -> list[VaeBatch]:
        """A batch for each of a step's groups of rows."""
        return draw_vae_step(groups, self.vae, self.pad_id, self.multiple, self.loss, seed, rank, world)
