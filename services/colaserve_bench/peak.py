"""The work of a pass that counts, and the peak: the speed of that work alone.

Products: 2 x rows x weights of the four matrices of each layer (proj_qkv, proj_out, mlp.proj_in, mlp.proj_out), rows
being the latent positions of a pass, both branches and commits included. All else (attention, norms, modulation, GELU,
solver, copies, the 16-channel input and output projections) counts as no work but takes time.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.config import DiTConfig

LAYER_MATRICES = ("msa.proj_qkv", "msa.proj_out", "mlp.proj_in", "mlp.proj_out")


def product_flops(config: DiTConfig, rows: int) -> int:
    """Of one pass over so many rows."""
    return 2 * rows * config.num_layers * config.layer_weights


def _linear(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def _onednn(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


CALLS: dict[str, Callable[[Tensor, int], Callable[[Tensor], Tensor]]] = {  # weight (out, in), rows -> its product
    "linear": _linear,
    "onednn packed for the rows": _onednn,
    "onednn packed for 32": lambda weight, rows: _onednn(weight, 32),
}


class Peak:
    """The speed of products over the checkpoint's own matrices in layer order: what all else could at best reach.

    Use on the thread that the engine computes on. Every call that the backend has is timed once for each number of
    rows; later measurements repeat the fastest.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        config = checkpoint.dit_config
        names = [f"blocks.{i}.{matrix}.weight" for i in range(config.num_layers) for matrix in LAYER_MATRICES]
        found = {name: stored.to(device=device, dtype=dtype, copy=True) for name, stored in checkpoint.dit.read(names)}
        self._config, self.weights = config, [found[name] for name in names]
        self._fastest: dict[int, str] = {}  # rows -> call
        self._prepared: tuple[int, list[Callable[[Tensor], Tensor]]] = (0, [])  # rows, products

    def measure(self, rows: int, seconds: float) -> tuple[float, str]:
        """GFLOP/s, the median over the passes of about `seconds`, and the call that reached it."""
        if rows not in self._fastest:
            speeds = {
                call: self._gflops(products, rows, seconds) for call in CALLS if (products := self.products(call, rows))
            }
            self._fastest[rows] = max(speeds, key=speeds.__getitem__)
        if rows != self._prepared[0]:
            self._prepared = (0, [])  # not both at once
            self._prepared = rows, self.products(self._fastest[rows], rows)
        return self._gflops(self._prepared[1], rows, seconds), self._fastest[rows]

    def products(self, call: str, rows: int) -> list[Callable[[Tensor], Tensor]]:
        """Of every matrix; empty if this build of torch does not have the call, or not for this dtype or device."""
        try:
            products = [CALLS[call](weight, rows) for weight in self.weights[:4]]
            for product, x in zip(products, self.inputs(rows), strict=True):
                product(x)
        except (RuntimeError, AttributeError, NotImplementedError):
            return []
        return products + [CALLS[call](weight, rows) for weight in self.weights[4:]]

    def inputs(self, rows: int) -> list[Tensor]:
        """One for each of a layer's matrices."""
        return [torch.randn(rows, w.shape[1], device=w.device, dtype=w.dtype) for w in self.weights[:4]]

    def _gflops(self, products: list[Callable[[Tensor], Tensor]], rows: int, seconds: float) -> float:
        inputs, times = self.inputs(rows), list[float]()
        until = time.perf_counter() + seconds
        while len(times) < 4 or time.perf_counter() < until:
            started = time.perf_counter()
            for i, product in enumerate(products):
                product(inputs[i % len(inputs)])
            if self.weights[0].device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return product_flops(self._config, rows) / statistics.median(times[1:]) / 1e9  # the first is warm-up
