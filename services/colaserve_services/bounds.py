"""Bounds of a request's numbers (types.proto): the edges check them before work, the engines where they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from colaserve_services.errors import require


@dataclass(frozen=True)
class Range:
    """From `least` to `most`, both included but where `open` says that the least is not."""

    least: float
    most: float
    open: bool = False

    def __str__(self) -> str:
        return f"above {self.least} and at most {self.most}" if self.open else f"{self.least} to {self.most}"

    def check(self, field: str, value: float) -> None:
        """Raise InvalidRequest naming the field of a value outside; NaN is."""
        holds = self.least <= value <= self.most and not (self.open and value == self.least)
        require(holds, field, f"{value:g}" if isinstance(value, float) else value, str(self))


SAMPLER: Final = {
    "steps": Range(1, 1000),
    "guidance_scale": Range(0, 1000),
    "guidance_start": Range(0, 1),
    "guidance_end": Range(0, 1),
    "resamples": Range(1, 100),
}
SAMPLING: Final = {
    "temperature": Range(0, 100),
    "top_k": Range(0, 2**32 - 1),
    "top_p": Range(0, 1, open=True),
    "repetition_penalty": Range(0, 1000, open=True),
}
MAX_NEW_TOKENS: Final = Range(1, 2**32 - 1)
TOP_LOGPROBS: Final = Range(0, 20)
SAMPLE_ID: Final = Range(0, 9_999)
LATENT: Final = Range(-10_000, 10_000)  # of latents and noise: beyond, the networks' own numbers overflow
SEED_END: Final = 2**63  # of the noise of each block; they stay below


def block_seed(base_seed: int, sample_id: int, block: int) -> int:
    """Seed of the CPU generator of one block's noise: base_seed + 1_000 sample_id + 10_000_000 block."""
    return base_seed + 1_000 * sample_id + 10_000_000 * block
