"""Networks that fail where a marked value goes through them, and requests that carry a mark."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from colaserve_services.prior.sampling_run import SampleJob

MARK_LATENT, MARK_TOKEN = 77.0, 477  # the value of a whole position; the id of a token


class Broken(Exception):
    """What a lost device raises."""


Fault = Callable[[Tensor, Tensor], Tensor]  # (what a network's first layer gives, its marked rows) -> what it gives


def raises(rows: Tensor, marked: Tensor) -> Tensor:
    raise Broken


def raises_late(rows: Tensor, marked: Tensor) -> Tensor:
    """In the last layer, when all others have done their work."""
    rows.breaks = True  # type: ignore[attr-defined]
    return rows


def not_finite(rows: Tensor, marked: Tensor) -> Tensor:
    return rows.masked_fill(marked.view(*marked.shape, *[1] * (rows.ndim - marked.ndim)), float("nan"))


def lacks_memory(rows: Tensor, marked: Tensor) -> Tensor:
    """As torch does it on a CPU."""
    return torch.empty(1 << 50)


def hangs(seconds: float) -> Fault:
    """Once."""
    left = [seconds]

    def hang(rows: Tensor, marked: Tensor) -> Tensor:
        time.sleep(left.pop() if left else 0)
        return rows

    return hang


class Network:
    """Stands for a network; `faults` holds what happens where a value, or all (None), goes through its first layer."""

    def __init__(self, network: Any, faults: dict[float | None, Fault]):
        self._network, self.faults = network, faults
        self._breaks = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def txt_in(self, z: Tensor) -> Tensor:
        """Of the prior."""
        return self._failing(self._network.txt_in(z), z[..., 0])

    def in_layer(self, latents: Tensor) -> Tensor:
        """Of the decoder."""
        return self._failing(self._network.in_layer(latents), latents[..., 0])

    def velocity(self, h: Tensor) -> Tensor:
        """Of the prior, the last layer."""
        return self._last(self._network.velocity(h))

    def logits(self, x: Tensor) -> Tensor:
        """Of the decoder, the last layers."""
        return self._last(self._network.logits(x))

    def emb_in(self, times: Tensor) -> Tensor:
        """Of the prior, when a run starts."""
        return self._failing(self._network.emb_in(times), times)

    def __call__(self, first: Tensor, *others: Any) -> Any:
        """Of the encoder, a pass."""
        results = self._network(first, *others)
        marks = first.view(len(results[0]), -1).amax(dim=1).float()
        return self._last(self._failing(results[0], marks)), results[1]

    def _failing(self, rows: Tensor, values: Tensor) -> Tensor:
        self._breaks = False
        for mark, fault in list(self.faults.items()):
            marked = torch.ones_like(values, dtype=torch.bool) if mark is None else values == mark
            if marked.any():
                rows = fault(rows, marked)
                self._breaks |= hasattr(rows, "breaks")
        return rows

    def _last(self, results: Tensor) -> Tensor:
        if self._breaks:
            self._breaks = False
            raise Broken
        return results


def marked_latents(latents: Tensor, mark: float = MARK_LATENT) -> Tensor:
    """The last position holds the mark."""
    return torch.cat((latents[:-1], torch.full_like(latents[-1:], mark)))


def marked_job(job: SampleJob, mark: float = MARK_LATENT) -> SampleJob:
    """The position given last, which is in the first block to write, goes through every pass."""
    return replace(job, latents=marked_latents(job.latents, mark))


def marked_ids(ids: Sequence[int], mark: int = MARK_TOKEN) -> list[int]:
    return [*ids[:-1], mark]
