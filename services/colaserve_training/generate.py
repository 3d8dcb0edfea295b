"""Greedy repaint generation of many prompts at once, in process, for evaluation while training (MODEL.md section 4).

Written for clarity, without caches: every step runs the whole rows again. Serving has its own engines; their tokens
are the same, and a test says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from tokenizers import Tokenizer
from torch import Tensor

from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.flow_batch import TIME_SCALE, FlowInputs
from colaserve_training.prior_stage import velocity
from colaserve_training.rows import Row, pad_rows
from colaserve_training.tokenizer import END_ID, IM_END_ID, PAD_ID


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn; tokens are the most likely ones after the penalty of served requests."""

    steps: int = 16
    guidance: float = 2.0
    repetition_penalty: float = 1.1
    max_new_tokens: int = 64
    base_seed: int = 0  # noise of sample s and new block b; s is the prompt's place in the call
    end_ids: frozenset[int] = frozenset({END_ID, IM_END_ID})
    pad_id: int = PAD_ID


class Generator:
    """Prompts to texts, with one model."""

    def __init__(self, vae: TextVAE, dit: DiT, tokenizer: Tokenizer, sampling: Sampling | None = None):
        self.vae, self.dit, self.tokenizer = vae, dit, tokenizer
        self.sampling = sampling or Sampling()
        self.size, self.patch = dit.config.block_size, vae.config.patch_size

    @property
    def device(self) -> torch.device:
        return self.dit.txt_out.proj.weight.device

    def texts(self, prompts: Sequence[str], batch: int = 256) -> list[str]:
        """What each prompt goes on with, up to its end token."""
        ids = [self.tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        return [self.tokenizer.decode(row) for row in self.tokens(ids, batch)]

    @torch.no_grad()
    def tokens(self, ids: Sequence[list[int]], batch: int = 256) -> list[list[int]]:
        """New ids for each row of prompt ids; prompts of one length are run together."""
        out: list[list[int]] = [[] for _ in ids]
        for length in sorted({len(row) for row in ids}):
            places = [place for place, row in enumerate(ids) if len(row) == length]
            for start in range(0, len(places), batch):
                chunk = places[start : start + batch]
                for place, new in zip(chunk, self._run([ids[place] for place in chunk], chunk), strict=True):
                    out[place] = new
        return out

    def _run(self, ids: list[list[int]], samples: list[int]) -> list[list[int]]:
        latents = self._encode(ids)
        known, first = latents.shape[1], latents.shape[1] // self.size
        again = len(ids[0]) - first * self.size * self.patch if known % self.size else 0  # ids that are decoded again
        blocks = -(-(again + self.sampling.max_new_tokens) // (self.size * self.patch))
        done = torch.zeros(len(ids), dtype=torch.bool)
        tokens: list[list[int]] = [[] for _ in ids]
        seen = torch.zeros(len(ids), self.vae.config.vocab_size, dtype=torch.bool, device=self.device)
        for block in range(first, first + blocks):
            noise = torch.stack([self._noise(sample, block - first) for sample in samples]).to(self.device)
            latents = self._write(latents, block, max(0, known - block * self.size), noise)
            written = self._tokens(latents, block, seen)
            for row, found in enumerate(written[:, again if block == first else 0 :].tolist()):
                tokens[row] += [] if done[row] else _until(self.sampling.end_ids, found)
                done[row] |= not self.sampling.end_ids.isdisjoint(found)
            if done.all():
                break
        return [row[: self.sampling.max_new_tokens] for row in tokens]

    def _tokens(self, latents: Tensor, block: int, seen: Tensor) -> Tensor:
        """Most likely ids of a block, (N, B * P); ids of earlier blocks (`seen`, which is added to) are penalised."""
        logits = self.vae.decode(latents)[:, block * self.size * self.patch :]
        penalty = torch.where(logits < 0, self.sampling.repetition_penalty, 1 / self.sampling.repetition_penalty)
        ids = torch.where(seen[:, None], logits * penalty, logits).argmax(-1)
        seen.scatter_(1, ids, True)
        return ids

    def _encode(self, ids: list[list[int]]) -> Tensor:
        """Latents of the prompt, (N, m, d)."""
        if not ids[0]:
            return torch.zeros(len(ids), 0, self.dit.config.txt_in_channels, device=self.device)
        padded = pad_rows([Row(tuple(row)) for row in ids], self.size * self.patch, self.sampling.pad_id)
        return self.vae.encode(padded.to(self.device))[0][:, : -(-len(ids[0]) // self.patch)]

    def _write(self, latents: Tensor, block: int, pinned: int, z: Tensor) -> Tensor:
        """Transport one block from noise, its first `pinned` positions held; gives (N, (block + 1) * B, d)."""
        history, held = latents[:, : block * self.size], latents[:, block * self.size :]
        times = [TIME_SCALE * (1 - k / self.sampling.steps) for k in range(self.sampling.steps + 1)]
        for t, after in pairwise(times):
            z[:, :pinned] = held
            z = z - self._guided(history, z, pinned, t) * (t - after) / TIME_SCALE
        z[:, :pinned] = held
        return torch.cat([history, z], dim=1)

    def _guided(self, history: Tensor, z: Tensor, pinned: int, t: float) -> Tensor:
        conditional = self._velocity(history, z, pinned, t)
        if self.sampling.guidance == 1 or history.shape[1] == 0:
            return conditional
        alone = self._velocity(history[:, :0], z, pinned, t, start=0)
        return alone + self.sampling.guidance * (conditional - alone)

    def _velocity(self, history: Tensor, z: Tensor, pinned: int, t: float, start: int | None = None) -> Tensor:
        rows, past = history.shape[:2]
        length = past + self.size
        timestep = torch.zeros(rows, length, device=z.device)
        timestep[:, past + pinned :] = t
        place = torch.arange(length, device=z.device)
        position, blocks = place + (past if start is None else start) - past, place // self.size
        mask = (blocks <= blocks[:, None]).expand(rows, -1, -1)
        values = torch.cat([history, z], dim=1)
        inputs = FlowInputs(values, timestep, position.expand(rows, -1), mask, values, values)
        return velocity(self.dit, inputs)[:, past:]

    def _noise(self, sample: int, block: int) -> Tensor:
        seed = self.sampling.base_seed + sample * 1_000 + block * 10_000_000
        shape = (self.size, self.dit.config.txt_in_channels)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reconstructed(vae: TextVAE, ids: Sequence[list[int]], pad_id: int) -> list[list[int]]:
    """Each row of ids through the latents and back: the most likely ids."""
    device, multiple = vae.decoder.device, vae.config.block_size * vae.config.patch_size
    padded = [pad_rows([Row(tuple(row))], multiple, pad_id).to(device) for row in ids]
    found = [vae.decode(vae.encode(row)[0]).argmax(-1)[0].tolist() for row in padded]
    return [new[: len(row)] for row, new in zip(ids, found, strict=True)]


def _until(ends: frozenset[int], ids: list[int]) -> list[int]:
    """The ids before the first one that ends the text."""
    return next((ids[:place] for place, id_ in enumerate(ids) if id_ in ends), ids)
