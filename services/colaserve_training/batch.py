"""What all batches can do: give one process its rows, and move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tensor fields have one row a sequence; other fields describe the whole step."""

    def part(self, rank: int, world: int) -> Self:
        """The rows of one of `world` processes."""
        return self._each(lambda value: value[rank::world])

    def to(self, device: torch.device) -> Self:
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})
