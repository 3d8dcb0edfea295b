"""One process or several (torchrun): who computes what, and how gradients and states come together.

DDP keeps whole copies; FSDP shards the parameters of each block, for models of the released size. Both are tested
with two CPU processes (gloo). Not run on a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colaserve_services.errors import UsageError

T = TypeVar("T")
MODES = ("ddp", "fsdp")
# A thread of gloo's may still be letting the tensors of the last operation go. If that takes the interpreter's lock
# when the interpreter has ended, the process aborts, with its work done; nothing tells when the thread is through.
_LET_GO_SECONDS = 0.5


@dataclass(frozen=True)
class Parallel:
    """This process's place, and the few operations that differ with it."""

    rank: int
    world: int
    device: torch.device
    mode: str = "ddp"

    def wrap(self, module: nn.Module) -> nn.Module:
        """Move `module` to the device and make its gradients those of all processes together (their mean)."""
        module.to(self.device)
        if self.world == 1:
            return module
        if self.mode == "fsdp":
            return _shard(module)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def total(self, value: Tensor) -> float:
        """The sum over processes."""
        value = value.detach().double().reshape(())
        if self.world > 1:
            dist.all_reduce(value)
        return float(value)

    def largest(self, value: int) -> int:
        """The largest over processes, the same answer for all."""
        largest = torch.tensor(value, device=self.device)
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, values: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies on the CPU, shards put together, for the first process; the others get nothing. Collective."""
        whole = ((name, self.whole(value.detach())) for name, value in values)
        return {name: value.to("cpu", copy=True) for name, value in whole if self.rank == 0}

    def whole(self, value: Tensor) -> Tensor:
        """A sharded tensor put together; any other as it is. Collective."""
        full = getattr(value, "full_tensor", None)
        return full() if full else value

    def shard_again(self, module: nn.Module) -> None:
        """Let go of whole weights that a forward without a backward left in place."""
        from torch.distributed.fsdp import FSDPModule

        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def fill(self, target: Tensor, value: Tensor) -> None:
        """Set `target`, sharded or not, to the whole tensor `value`."""
        target.copy_(_like(value, target))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state_dict with whole tensors on the CPU, for the first process. Collective."""
        state = optimizer.state_dict()
        state["state"] = {
            index: self.gather((key, torch.as_tensor(value)) for key, value in entry.items())
            for index, entry in state["state"].items()
        }
        return state

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a state made of whole tensors."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = {
            index: {key: _like(value, parameters[index]) for key, value in entry.items()}
            for index, entry in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": entries})

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


SINGLE = Parallel(0, 1, torch.device("cpu"))


class Objective(nn.Module):
    """A network with its loss: forward(batch) -> {"loss": ..., further parts}, normalised over the whole step."""

    def apply_whole(self, work: Callable[[], T]) -> T:
        """Do work that uses the networks in another way than by forward; FSDP gathers their weights for it."""
        return work()


def repeatable() -> None:
    """Let this process compute the same bits whenever it computes the same, with the same number of threads.

    torch is to add up in a fixed order; so is MKL, which promises it only when asked before its first product.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())


def _like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, sharded as `target` is where their shapes agree."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor) and value.shape == target.shape:
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value


def _shard(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for child in list(module.modules()):
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block)
            if hasattr(block, "modulation"):  # of a DiT block: called beside forward, and needs whole weights too
                register_fsdp_forward_method(block, "modulation")
    fully_shard(module)
    register_fsdp_forward_method(module, "apply_whole")
    return module


@contextmanager
def started(device: str = "cpu", mode: str = "ddp") -> Iterator[Parallel]:
    """Join the group that torchrun announces (RANK, WORLD_SIZE, ...), or be alone without it."""
    if mode not in MODES:
        raise UsageError(f"parallel: got {mode!r}, expected one of {', '.join(MODES)}")
    repeatable()
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: got cuda, but this torch sees no CUDA device; use --device cpu")
    if world == 1:
        yield Parallel(0, 1, place, mode)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)  # FSDP's mesh takes the current device
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        parallel = Parallel(dist.get_rank(), world, place, mode)
        yield parallel
        parallel.barrier()  # nobody leaves while another one still computes
    finally:
        dist.destroy_process_group()
        time.sleep(_LET_GO_SECONDS)
