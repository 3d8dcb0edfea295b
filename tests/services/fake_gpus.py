"""GPUs without one: what torch.cuda says of them, and graphs that do again what was computed when they were made."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from colaserve_services.model.backend.streams import Stream

CPU = torch.device("cpu")
ALLOCATIONS = ("aten::empty", "aten::new_empty")  # what they hold is written later


class Operations(TorchDispatchMode):
    """Each one that computes, with its arguments and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(ALLOCATIONS):
            self._done.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def again(self) -> None:
        """Do the same on the same memory."""
        for func, args, kwargs, result in self._done:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class Replayed(Stream):
    """With such graphs, whose capture launches no kernel: what they leave, how often they are replayed, and events."""

    def __init__(self, device: torch.device = CPU):
        super().__init__(device)
        self.left: list[Any] = []  # of each graph
        self.replays = self.events = 0

    def captured(self, body: Any) -> Any:
        from colaserve_services.model.kernels.registry import recording  # which takes Triton

        with recording(), Operations() as operations:
            found = body()
        self.left.append(found)

        def replay() -> Any:
            self.replays += 1
            operations.again()
            return found

        return replay

    def record(self) -> Any:
        self.events += 1
        return super().record()


class _OnCpu(TorchFunctionMode):
    """Of the thread that enters it."""

    def __init__(self, gpu: torch.device):
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return self._gpu
        if func is Tensor.pin_memory:
            return args[0]
        args, kwargs = tree_map(_cpu_for_gpu, (args, {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}))
        return func(*args, **kwargs)


def _cpu_for_gpu(value: Any) -> Any:
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


class Gpus:
    """What torch.cuda knows of them, and was asked for."""

    def __init__(
        self, patch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], current: int, free: int, graph: int = 0
    ):
        """`graph`: bytes that each takes for good."""
        self.chosen: list[tuple[str, int]] = []  # by a thread: its name, the GPU
        self.priorities: list[int] = []  # of streams
        self.captured = 0  # graphs
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: len(capabilities),
            "current_device": lambda: current,
            "set_device": lambda device: self.chosen.append((threading.current_thread().name, device.index)),
            "get_device_capability": lambda device: capabilities[device.index],
            "get_device_name": lambda device: f"GPU {device.index}",
            "mem_get_info": lambda device: (free - graph * self.captured, free),
            "graph_pool_handle": lambda: (0, 0),
            "current_stream": lambda device: None,
            "stream": lambda stream: nullcontext(),
            "Stream": self._stream,
            "Event": lambda enable_timing: SimpleNamespace(
                record=lambda: None, query=lambda: True, synchronize=lambda: None, elapsed_time=lambda end: 1.0
            ),
            "CUDAGraph": self._graph,
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)

    def _stream(self, device: torch.device, priority: int) -> SimpleNamespace:
        self.priorities.append(priority)
        return SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)

    def _graph(self) -> SimpleNamespace:
        self.captured += 1
        return SimpleNamespace(capture_begin=lambda pool, capture_error_mode: None, capture_end=lambda: None)

    @contextmanager
    def here(self, index: int) -> Iterator[None]:
        """For this thread tensors on that GPU lie on the CPU."""
        with _OnCpu(torch.device("cuda", index)):
            yield
