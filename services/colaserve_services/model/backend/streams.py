"""What passes need of a device: memory, a stream, moments on it, graphs. A CPU has the same, and computes at once."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Moment(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether the device has come so far."""

    def wait(self) -> None:
        """Return when it has."""

    def since(self, earlier: "Moment") -> float | None:
        """Seconds of the device between two moments that have come; None where nobody measures them."""


class _Now:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def since(self, earlier: Moment) -> float | None:
        return None


class Stream:
    """Computes at once, as a CPU does."""

    def __init__(self, device: torch.device):
        self.device = device

    def memory(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 of the device, zeros."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def host(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 that the device copies from while the caller goes on, zeros."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def fetched(self, values: Tensor) -> Tensor:
        """A copy for the CPU, there at the next moment that is done."""
        return values.clone()

    def join(self) -> None:
        """What was launched elsewhere before, such as copies of weights, comes before all that is launched here."""

    def on(self) -> AbstractContextManager[object]:
        """What is launched inside is launched here."""
        return nullcontext()

    def mark(self) -> Moment:
        """The moment when all that is launched so far is done."""
        return _Now()

    def captured(self, body: Callable[[], T]) -> Callable[[], T]:
        """Launches the same again, on the same memory, whenever it is called."""
        return body


class _Event:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: Moment) -> float | None:
        return earlier._event.elapsed_time(self._event) / 1e3 if isinstance(earlier, _Event) else None


class CudaStream(Stream):
    """A stream of its own on a GPU; one of less than 0 goes before others. Without `graphs` every launch is a call."""

    def __init__(self, device: torch.device, priority: int = 0, graphs: bool | None = None):
        super().__init__(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # from torch 2.9 on; off before
            torch.backends.cuda.matmul.fp32_precision = "ieee"
        self._stream = torch.cuda.Stream(device, priority)
        self._graphs = os.environ.get("COLASERVE_CUDA_GRAPHS") != "0" if graphs is None else graphs
        self._pool = torch.cuda.graph_pool_handle()

    def host(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def fetched(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def join(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def on(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(self.device))
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    def mark(self) -> Moment:
        return _Event()

    def captured(self, body: Callable[[], T]) -> Callable[[], T]:
        if not self._graphs:
            return body
        body()  # what is made on first use, such as compiled kernels, may not be made during a capture
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            found = body()
        finally:
            graph.capture_end()

        def replay() -> T:
            graph.replay()
            return found

        return replay


def stream(device: torch.device, priority: int = 0) -> Stream:
    """Of the device."""
    return CudaStream(device, priority) if device.type == "cuda" else Stream(device)
