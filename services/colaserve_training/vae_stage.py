"""Stage 1, the Text VAE: reconstruction + beta KL + lambda masking (arXiv:2605.06548; MODEL.md section 7).

    L = E_q[-log p(x | z)] + beta KL(q(z | x) || N(0, I)) + lambda E_masked[-log p(x_i | z~)]

z ~ q(z | x) is drawn once a token; the decoder sees it with extra noise, so that it forgives the prior's small errors.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.text_vae import TextVAE
from colaserve_training.config import VAE_LOSS, VaeLossConfig
from colaserve_training.parallel import Objective
from colaserve_training.rows import Batch, Row, pad_rows


@dataclass(frozen=True)
class VaeBatch(Batch):
    """R rows of n latents; all random draws of the pass are in it."""

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

    def __init__(self, vae: TextVAE, pad_id: int, block_size: int, loss: VaeLossConfig = VAE_LOSS):
        super().__init__()
        self.vae, self.loss = vae, loss
        self._pad_id, self._block_size = pad_id, block_size

    def draw_batch(self, rows: Sequence[Row], seed: str) -> VaeBatch:
        """Choose masked tokens and noise for `rows`."""
        loss, config = self.loss, self.vae.config
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
        multiple = self._block_size * config.patch_size
        ids = pad_rows(rows, multiple, self._pad_id)
        ends = torch.tensor([-(-len(row.ids) // multiple) * multiple for row in rows])
        valid = torch.arange(ids.shape[1]) < ends[:, None]
        chosen = torch.rand(len(rows), 1, generator=generator) < loss.masked_rows
        masked = chosen & (torch.rand(ids.shape, generator=generator) < loss.masked_tokens)
        shape = (len(rows), ids.shape[1] // config.patch_size, config.latent_dim)
        sigma = loss.decoder_noise * torch.rand(len(rows), 1, 1, generator=generator)
        noise, extra = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        tokens, hidden = (valid & ~masked).sum(), (valid & masked).sum()
        return VaeBatch(ids, valid, masked, noise, sigma * extra, float(tokens), float(hidden))

    def forward(self, batch: VaeBatch) -> dict[str, Tensor]:
        """The losses of a batch, as shares of the whole step's means."""
        config = self.vae.config
        mask_id = config.vocab_size  # the last row of the encoder's embedding, which inference never reads
        mean, log_variance = self.vae.encode(torch.where(batch.masked, mask_id, batch.ids))
        latents, kl = mean, mean.new_zeros(())
        if log_variance is not None:
            # sigma is scaled as the mean is; the KL is that of latents before they are normalised
            latents = mean + config.scaling_factor * torch.exp(0.5 * log_variance) * batch.noise
            raw = mean / config.scaling_factor + config.shifting_factor
            of_latents = kl_to_standard_normal(raw, log_variance)[batch.valid[:, :: config.patch_size]]
            kl = of_latents.sum() / ((batch.tokens + batch.hidden) / config.patch_size)
        logits = self.vae.decode(latents + batch.decoder_noise)
        errors = F.cross_entropy(logits.transpose(1, 2), batch.ids, reduction="none")
        reconstruction = errors[batch.valid & ~batch.masked].sum() / batch.tokens
        masking = errors[batch.valid & batch.masked].sum() / max(batch.hidden, 1)
        loss = reconstruction + self.loss.kl * kl + self.loss.masking * masking
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "masking": masking}


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) summed over channels: (..., d) -> (...)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(-1)
