"""The machine's speed at the prior's matrix products, nothing else: what a step would cost if all else were free."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_bench.flops import LAYER_MATRICES, product_flops
from colaserve_services.model.checkpoint import Checkpoint

Product = Callable[[Tensor], Tensor]
Prepare = Callable[[Tensor, int], Product]  # weight (out, in), rows -> what multiplies with it


def _linear(weight: Tensor, rows: int) -> Product:
    return lambda x: F.linear(x, weight)


def _onednn(weight: Tensor, rows: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _onednn_32(weight: Tensor, rows: int) -> Product:
    return _onednn(weight, 32)


def _mkl(weight: Tensor, rows: int) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.to_mkldnn(), rows)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, rows)


CALLS: dict[str, Prepare] = {
    "linear": _linear,
    "onednn packed for the rows": _onednn,
    "onednn packed for 32": _onednn_32,
    "mkl packed": _mkl,
}


@dataclass(frozen=True)
class PeakResult:
    """GFLOP/s of one measurement and the call that reached it."""

    gflops: float
    call: str


class Peak:
    """Products over the checkpoint's own matrices in layer order. Use on the thread that the engine computes on.

    Every call the backend has is timed once for each number of rows; later measurements repeat the fastest.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        config = checkpoint.dit_config
        names = [f"blocks.{i}.{matrix}.weight" for i in range(config.num_layers) for matrix in LAYER_MATRICES]
        found = {name: stored.to(device=device, dtype=dtype, copy=True) for name, stored in checkpoint.dit.read(names)}
        self._config, self._weights = config, [found[name] for name in names]
        self._fastest: dict[int, str] = {}  # rows -> call
        self._rows, self._products = 0, list[Product]()  # prepared for so many rows

    def measure(self, rows: int, seconds: float) -> PeakResult:
        """Median over the passes of about `seconds`."""
        call = self._fastest.get(rows) or self._choose(rows, seconds)
        if rows != self._rows:
            self._products = []  # not both at once
            self._rows, self._products = rows, self._prepared(CALLS[call], rows)
        return PeakResult(self._gflops(self._products, rows, seconds), call)

    def _choose(self, rows: int, seconds: float) -> str:
        speeds = {}
        for call, prepare in CALLS.items():
            if products := self._prepared(prepare, rows):
                speeds[call] = self._gflops(products, rows, seconds)
        self._fastest[rows] = max(speeds, key=speeds.__getitem__)
        return self._fastest[rows]

    def _prepared(self, prepare: Prepare, rows: int) -> list[Product]:
        """Empty if this build of torch does not have the call, or not for this dtype or device."""
        try:
            products = [prepare(weight, rows) for weight in self._weights[:4]]
            for product, x in zip(products, self._inputs(rows), strict=True):
                product(x)
        except (RuntimeError, AttributeError, NotImplementedError):
            return []
        return products + [prepare(weight, rows) for weight in self._weights[4:]]

    def _inputs(self, rows: int) -> list[Tensor]:
        """One input for each of a layer's matrices."""
        return [
            torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
            for weight in self._weights[: len(LAYER_MATRICES)]
        ]

    def _gflops(self, products: list[Product], rows: int, seconds: float) -> float:
        inputs, times = self._inputs(rows), list[float]()
        self._pass(products, inputs)
        until = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < until:
            started = time.perf_counter()
            self._pass(products, inputs)
            times.append(time.perf_counter() - started)
        return product_flops(self._config, rows) / statistics.median(times) / 1e9

    def _pass(self, products: list[Product], inputs: list[Tensor]) -> None:
        for i, product in enumerate(products):
            product(inputs[i % len(inputs)])
        if self._weights[0].device.type == "cuda":
            torch.cuda.synchronize()
