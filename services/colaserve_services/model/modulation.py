"""adaLN tables: what the time does to every layer, computed once per time value and looked up at every step.

The modulation Linears are a third of the DiT's weights; with the table they are not read while sampling.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import padded_rows, to_device

_BUDGET_BYTES = 256 << 20


class ModulationTable:
    """Rows (layers, 6, D) and (2, D) for each time in use; the least recently used rows are given up.

    `at_least`: different times that one pass may need."""

    def __init__(self, dit: DiT, device: torch.device, at_least: int = 64):
        self._dit, self._device = dit, device
        layers, dim = dit.config.num_layers, dit.config.txt_dim
        row_bytes = 4 * dim * (6 * layers + 2)
        self.capacity = max(64, at_least, min(2048, _BUDGET_BYTES // row_bytes))
        self._layers = torch.empty(layers, self.capacity, 6, dim, device=device)
        self._output = torch.empty(self.capacity, 2, dim, device=device)
        self._rows: OrderedDict[float, int] = OrderedDict()

    def prepare(self, times: Iterable[float]) -> None:
        """Compute the rows of a schedule in one pass over the modulation weights, as far as the table has capacity."""
        self.rows(list(dict.fromkeys(times))[: self.capacity // 2])

    def rows(self, times: Sequence[float]) -> list[int]:
        """The row of each time; missing ones are computed. At most `capacity` different times."""
        missing: list[float] = []
        for t in times:
            if t in self._rows:
                self._rows.move_to_end(t)
            elif t not in missing:
                missing.append(t)
        if missing:
            try:
                self._compute(missing)
            except Exception:
                self.forget()  # some of them are not what they stand for
                raise
        return [self._rows[t] for t in times]

    def forget(self) -> None:
        """Compute all rows anew when they are needed."""
        self._rows.clear()

    def _compute(self, times: list[float]) -> None:
        slots = [self._slot(t) for t in times]
        spare = padded_rows(len(times), self._dit.dtype, self._device) - len(times)
        times, slots = times + times[:1] * spare, slots + slots[:1] * spare
        index = to_device(torch.tensor(slots), self._device)
        e = self._dit.emb_in(to_device(torch.tensor(times, dtype=torch.float32), self._device))
        for layer, block in enumerate(self._dit.blocks):
            m = block.modulation(e)  # type: ignore[operator]
            rows = (m.attn_shift, m.attn_scale, m.attn_gate, m.mlp_shift, m.mlp_scale, m.mlp_gate)
            self._layers[layer].index_copy_(0, index, torch.stack(rows, dim=1))
        self._output.index_copy_(0, index, torch.stack(self._dit.output_modulation(e), dim=1))

    def _slot(self, t: float) -> int:
        slot = len(self._rows) if len(self._rows) < self.capacity else self._rows.popitem(last=False)[1]
        self._rows[t] = slot
        return slot

    def layer(self, number: int) -> Tensor:
        """Rows (6, D): shift, 1 + scale and gate of the attention, then of the MLP."""
        return self._layers[number]

    @property
    def output(self) -> Tensor:
        """Rows (2, D): shift and 1 + scale of the last norm."""
        return self._output
