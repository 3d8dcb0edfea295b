"""Greedy repaint generation of many prompts at once, in process, for evaluation while training (MODEL.md section 4).

Written for clarity, without caches: every step runs the whole rows again. Serving has its own engines; their tokens
are the same, and a test says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from tokenizers import Tokenizer
from torch import Tensor

from colaserve_services.bounds import block_seed
from colaserve_services.model.dit import TIME_SCALE, DiT
from colaserve_services.model.flow import guide, schedule
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.prior_stage import attention
from colaserve_training.rows import Row, pad_rows
from colaserve_training.tokenizer import END_ID, IM_END_ID, PAD_ID


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn; tokens are the most likely ones after the penalty of served requests."""

    steps: int = 16
    guidance: float = 2.0
    repetition_penalty: float = 1.1
    max_new_tokens: int = 64
    base_seed: int = 0  # of the noise; a prompt's index in the call is its sample id
    end_ids: frozenset[int] = frozenset({END_ID, IM_END_ID})
    pad_id: int = PAD_ID


class Generator:
    """Prompts to texts, with one model."""

    def __init__(self, vae: TextVAE, dit: DiT, tokenizer: Tokenizer, sampling: Sampling | None = None):
        self.vae, self.dit, self.tokenizer = vae, dit, tokenizer
        self.sampling = sampling or Sampling()
        self._size, self._patch, self._device = dit.config.block_size, vae.config.patch_size, dit.device

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """What the model writes after each prompt, up to its end token."""
        ids = [self.tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        return [self.tokenizer.decode(row) for row in self.tokens(ids)]

    @torch.no_grad()
    def tokens(self, ids: Sequence[list[int]], batch: int = 256) -> list[list[int]]:
        """New ids for each row of prompt ids; prompts of one length are run together."""
        out: dict[int, list[int]] = {}
        for length in {len(row) for row in ids}:
            samples = [sample for sample, row in enumerate(ids) if len(row) == length]
            for start in range(0, len(samples), batch):
                chunk = samples[start : start + batch]
                out |= zip(chunk, self._run([ids[sample] for sample in chunk], chunk), strict=True)
        return [out[sample] for sample in range(len(ids))]

    def _run(self, ids: list[list[int]], samples: list[int]) -> list[list[int]]:
        shape, block_tokens = (self._size, self.dit.config.txt_in_channels), self._size * self._patch
        latents = torch.zeros(len(ids), 0, shape[1], device=self._device)
        if ids[0]:
            padded = pad_rows([Row(tuple(row)) for row in ids], block_tokens, self.sampling.pad_id)
            latents = self.vae.encode(padded.to(self._device))[0][:, : -(-len(ids[0]) // self._patch)]
        known, first = latents.shape[1], latents.shape[1] // self._size
        again = len(ids[0]) - first * block_tokens if known % self._size else 0  # ids that are decoded again
        written = torch.zeros(len(ids), 0, dtype=torch.int64, device=self._device)
        seen = torch.zeros(len(ids), self.vae.config.vocab_size, dtype=torch.bool, device=self._device)
        ends = torch.tensor(sorted(self.sampling.end_ids), dtype=torch.int64, device=self._device)
        for block in range(first, first - (-(again + self.sampling.max_new_tokens) // block_tokens)):
            pinned = max(0, known - block * self._size)
            seeds = [block_seed(self.sampling.base_seed, sample, block - first) for sample in samples]
            drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            latents = self._sample(latents, block, pinned, torch.stack(drawn).to(self._device))
            found = self._tokens(latents, block, seen)
            written = torch.cat([written, found[:, again if block == first else 0 :]], dim=1)
            if torch.isin(written, ends).any(1).all():
                break
        rows = written[:, : self.sampling.max_new_tokens].tolist()
        return [list(takewhile(lambda id_: id_ not in self.sampling.end_ids, row)) for row in rows]

    def _tokens(self, latents: Tensor, block: int, seen: Tensor) -> Tensor:
        """Most likely ids of a block, (N, B * P); ids of earlier blocks (`seen`, which is added to) are penalised."""
        logits = self.vae.decode(latents)[:, block * self._size * self._patch :]
        penalty = torch.where(logits < 0, self.sampling.repetition_penalty, 1 / self.sampling.repetition_penalty)
        ids = torch.where(seen[:, None], logits * penalty, logits).argmax(-1)
        seen.scatter_(1, ids, True)
        return ids

    def _sample(self, latents: Tensor, block: int, pinned: int, z: Tensor) -> Tensor:
        """Denoise one block, its first `pinned` positions held; gives (N, (block + 1) * B, d)."""
        history, held = latents[:, : block * self._size], latents[:, block * self._size :]
        for t, after in pairwise(schedule(self.sampling.steps)):
            z[:, :pinned] = held
            velocity = self._velocity(history, z, pinned, t)
            if block and self.sampling.guidance != 1:
                alone = self._velocity(history[:, :0], z, pinned, t)
                velocity = guide(velocity, alone, self.sampling.guidance)
            z = z - velocity * (t - after) / TIME_SCALE
        z[:, :pinned] = held
        return torch.cat([history, z], dim=1)

    def _velocity(self, history: Tensor, z: Tensor, pinned: int, t: float) -> Tensor:
        """Of a block after its history. Rotary positions are relative: they count from wherever that begins."""
        rows, past = history.shape[:2]
        index = torch.arange(past + self._size, device=z.device)
        timestep = torch.where(index < past + pinned, 0.0, t).expand(rows, -1)
        blocks = index // self._size
        mask = (blocks <= blocks[:, None]).expand(rows, -1, -1)
        velocity: Tensor = self.dit(torch.cat([history, z], dim=1), timestep, index.expand(rows, -1), attention(mask))
        return velocity[:, past:]


@torch.no_grad()
def reconstructed(vae: TextVAE, ids: Sequence[list[int]], pad_id: int) -> list[list[int]]:
    """Each row of ids through the latents and back: the most likely ids."""
    device, multiple = vae.decoder.device, vae.config.block_size * vae.config.patch_size
    padded = [pad_rows([Row(tuple(row))], multiple, pad_id).to(device) for row in ids]
    found = [vae.decode(vae.encode(row)[0]).argmax(-1)[0].tolist() for row in padded]
    return [new[: len(row)] for row, new in zip(ids, found, strict=True)]
