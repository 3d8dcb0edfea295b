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
from colaserve_training.config import VaeLossConfig
from colaserve_training.parallel import Objective
from colaserve_training.rows import Batch, Row, pad_rows


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
    """Stage 1 for the training loop. Rows are padded to whole blocks of `block_size` latents."""

    name = "vae"

    def __init__(self, vae: TextVAE, loss: VaeLossConfig, pad_id: int, block_size: int):
        super().__init__()
        self.vae, self.loss = vae, loss
        self._pad_id, self._block_size = pad_id, block_size

    def draw(self, groups: Sequence[Sequence[Row]], seed: str, rank: int, world: int) -> Sequence[VaeBatch]:
        return draw_vae_step(groups, self.vae, self._pad_id, self._block_size, self.loss, seed, rank, world)

    def forward(self, batch: VaeBatch) -> dict[str, Tensor]:
        return vae_losses(self.vae, batch, self.loss)


def vae_losses(vae: TextVAE, batch: VaeBatch, weights: VaeLossConfig) -> dict[str, Tensor]:
    """The losses of a batch, as shares of the whole step's means."""
    mask_id = vae.config.vocab_size  # the last row of the encoder's embedding, which inference never reads
    mean, log_variance = vae.encode(torch.where(batch.masked, mask_id, batch.ids))
    latents = draw_posterior(mean, log_variance, batch.noise, vae.config.scaling_factor)
    logits = vae.decode(latents + batch.decoder_noise)
    errors = F.cross_entropy(logits.transpose(1, 2), batch.ids, reduction="none")
    reconstruction = errors[batch.valid & ~batch.masked].sum() / batch.tokens
    masking = errors[batch.valid & batch.masked].sum() / max(batch.hidden, 1)
    kl = _kl(vae, mean, log_variance, batch)
    loss = reconstruction + weights.kl * kl + weights.masking * masking
    return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "masking": masking}


def _kl(vae: TextVAE, mean: Tensor, log_variance: Tensor | None, batch: VaeBatch) -> Tensor:
    """The mean over latents, before they are normalised."""
    if log_variance is None:
        return mean.new_zeros(())
    config = vae.config
    raw = mean / config.scaling_factor + config.shifting_factor
    latents = (batch.tokens + batch.hidden) / config.patch_size
    return kl_to_standard_normal(raw, log_variance)[batch.valid[:, :: config.patch_size]].sum() / latents


def draw_posterior(mean: Tensor, log_variance: Tensor | None, noise: Tensor, scale: float) -> Tensor:
    """z = mean + sigma * noise in normalised units (sigma is scaled as the mean is)."""
    return mean if log_variance is None else mean + scale * torch.exp(0.5 * log_variance) * noise


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) summed over channels: (..., d) -> (...)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(-1)


def draw_vae_step(
    groups: Sequence[Sequence[Row]], vae: TextVAE, pad_id: int, block_size: int, loss: VaeLossConfig, seed: str,
    rank: int, world: int,
) -> list[VaeBatch]:  # fmt: skip
    """One process's part of each of a step's batches, normalised over the whole step."""
    drawn = [_draw_batch(rows, vae, pad_id, block_size, loss, f"{seed}:{part}") for part, rows in enumerate(groups)]
    tokens, hidden = sum(batch.tokens for batch in drawn), sum(batch.hidden for batch in drawn)
    return [replace(batch, tokens=tokens, hidden=hidden).part(rank, world) for batch in drawn]


def _draw_batch(
    rows: Sequence[Row], vae: TextVAE, pad_id: int, block_size: int, loss: VaeLossConfig, seed: str
) -> VaeBatch:
    """Choose masked tokens and noise for `rows`."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    multiple = block_size * vae.config.patch_size
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
