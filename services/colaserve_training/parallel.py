"""One process or several (torchrun): who computes what, and how gradients and states come together.

DDP keeps whole copies; FSDP shards the parameters of each block, for models of the released size. Both are tested
with two CPU processes (gloo). Not run on a GPU.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colaserve_services.errors import UsageError
from colaserve_training.rows import Batch, Row, of_one_step

T = TypeVar("T")
MODES = ("ddp", "fsdp")
# A thread of gloo's may still be releasing the tensors of the last operation. If that takes the interpreter's lock
# when the interpreter has ended, the process aborts, with its work done; nothing says when the thread is done.
_RELEASE_SECONDS = 0.5


class Objective(nn.Module):
    """A stage for the training loop: networks with their loss.

    `forward` gives {"loss": ..., further parts} of a batch, normalised over the whole step.
    """

    name: str

    def draw_batch(self, rows: Sequence[Row], seed: str) -> Batch:
        """A batch of rows with all random draws of its pass; a function of its arguments."""
        raise NotImplementedError

    def draw(self, groups: Sequence[Sequence[Row]], seed: str, rank: int, world: int) -> Sequence[Batch]:
        """This process's batch of each of a step's groups of rows."""
        drawn = of_one_step([self.draw_batch(rows, f"{seed}:{part}") for part, rows in enumerate(groups)])
        return [batch.part(rank, world) for batch in drawn]

    def apply_whole(self, work: Callable[[], T]) -> T:
        """Do work that uses the networks in another way than by forward; FSDP gathers their weights for it."""
        return work()


@dataclass(frozen=True)
class Parallel:
    """Which of the processes this is, and the few operations that differ with their number."""

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
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            for child in list(module.modules()):
                for block in child if isinstance(child, nn.ModuleList) else ():
                    fully_shard(block)
                    if hasattr(block, "modulation"):  # of a DiT block: called beside forward, and needs whole weights
                        register_fsdp_forward_method(block, "modulation")
            fully_shard(module)
            register_fsdp_forward_method(module, "apply_whole")
            return module
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
        full = ((name, whole(value.detach())) for name, value in values)
        return {name: value.to("cpu", copy=True) for name, value in full if self.rank == 0}

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


SINGLE = Parallel(0, 1, torch.device("cpu"))


def whole(value: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is. Collective."""
    full = getattr(value, "full_tensor", None)
    return full() if full else value


def like(value: Tensor, target: Tensor) -> Tensor:
    """The tensor `value`, sharded as `target` is if it is whole and their shapes agree."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor) and not isinstance(value, DTensor) and value.shape == target.shape:
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value


def shard_again(module: nn.Module) -> None:
    """Release whole weights that a forward without a backward left in memory."""
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def repeatable() -> None:
    """Let this process compute the same bits whenever it computes the same, with the same number of threads.

    torch is to add up in a fixed order; so is MKL, which promises it only when asked before its first product.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())


@contextmanager
def started(device: str = "cpu", mode: str = "ddp") -> Iterator[Parallel]:
    """Join the group that torchrun announces (RANK, WORLD_SIZE, ...), or be alone without it."""
    repeatable()
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if own.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: got cuda, but this torch sees no CUDA device; use --device cpu")
    if world == 1:
        yield Parallel(0, 1, own, mode)
        return
    if own.type == "cuda":
        torch.cuda.set_device(own)  # FSDP's mesh takes the current device
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        parallel = Parallel(dist.get_rank(), world, own, mode)
        yield parallel
        parallel.barrier()  # nobody leaves while another one still computes
    finally:
        dist.destroy_process_group()
        time.sleep(_RELEASE_SECONDS)
