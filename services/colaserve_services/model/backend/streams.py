"""Streams: queues of work on a device, with the memory, events and graphs that passes need there.

`Stream` is the interface, and computes at once, as a CPU does; `CudaStream` is a CUDA stream.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Event:
    """A point in a stream's work, which is done at once."""

    def done(self) -> bool:
        """Whether the device has finished all work before it."""
        return True

    def wait(self) -> None:
        """Block until it has."""

    def since(self, earlier: "Event") -> float | None:
        """Seconds on the device between two events, both done; None where they are not measured."""
        return None


class Stream:
    """Work that is done at once, as a CPU does it."""

    def __init__(self, device: torch.device):
        self.device = device

    def memory(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 zeros on the device."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def host(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 zeros on the CPU, pinned where a device copies from them asynchronously."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def fetched(self, values: Tensor) -> Tensor:
        """A copy on the CPU, complete once an event recorded after this call is done."""
        return values.clone()

    def join(self) -> None:
        """Do what was launched on the current stream, such as copies of weights, before all later work here."""

    def on(self) -> AbstractContextManager[object]:
        """Work launched inside the context goes to this stream."""
        return nullcontext()

    def record(self) -> Event:
        """An event that is done when all work launched so far is."""
        return Event()

    def captured(self, body: Callable[[], T]) -> Callable[[], T]:
        """A function that launches the work of `body` again, on the same memory, and returns the same tensors."""
        return body


class _CudaEvent(Event):
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: Event) -> float | None:
        return earlier._event.elapsed_time(self._event) / 1e3 if isinstance(earlier, _CudaEvent) else None


class CudaStream(Stream):
    """A CUDA stream; a lower priority goes first. `graphs`: make CUDA graphs; None: unless COLASERVE_CUDA_GRAPHS=0."""

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
        return torch.cuda.stream(self._stream)  # it also makes the stream's device the current one

    def record(self) -> Event:
        return _CudaEvent()

    def captured(self, body: Callable[[], T]) -> Callable[[], T]:
        body()  # compiles kernels and creates what libraries create on first use, which a capture does not allow
        self._stream.synchronize()
        if not self._graphs:
            return body
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
    """A stream on the device."""
    return CudaStream(device, priority) if device.type == "cuda" else Stream(device)
