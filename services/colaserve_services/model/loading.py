"""From a checkpoint's files to networks on a device: cast, placed and packed one tensor after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colaserve_services.errors import CheckpointError
from colaserve_services.model.checkpoint import Checkpoint, Progress, WeightFolder
from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import Linear
from colaserve_services.model.text_vae import TextVAEDecoder, TextVAEEncoder

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Network(Generic[_Model]):
    """One of a checkpoint's networks: how it is made, and where its weights lie."""

    make: Callable[[], _Model]
    folder: WeightFolder
    prefix: str  # of its tensors' names


def encoder(checkpoint: Checkpoint) -> Network[TextVAEEncoder]:
    return Network(lambda: TextVAEEncoder(checkpoint.vae_config), checkpoint.vae, "encoder.")


def decoder(checkpoint: Checkpoint) -> Network[TextVAEDecoder]:
    return Network(lambda: TextVAEDecoder(checkpoint.vae_config), checkpoint.vae, "decoder.")


def prior(checkpoint: Checkpoint) -> Network[DiT]:
    return Network(lambda: DiT(checkpoint.dit_config), checkpoint.dit, "")


NETWORKS: dict[str, Callable[[Checkpoint], Network[Any]]] = {"encoder": encoder, "prior": prior, "decoder": decoder}


def parameters(network: Network[Any]) -> int:
    """How many it has. Raises `CheckpointError` unless every tensor is there in its shape; reads headers only."""
    names = _check_names(_empty(network), network.folder, network.prefix)
    return sum(network.folder.entries[name].elements for name in names)


def load(
    network: Network[_Model], device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> _Model:
    """Read, cast and place one tensor after the other, so that only one is held twice."""
    model, folder = _empty(network), network.folder
    slots = _check_names(model, folder, network.prefix)
    total, done = sum(folder.entries[name].nbytes for name in slots), 0
    pending = _Pending(model)
    with torch.no_grad():
        for name, stored in folder.read(slots):
            _check_finite(folder.entries[name].path, name, stored)
            owner, attribute = slots[name]
            target = _target_dtype(owner, dtype)
            value = stored.to(device=device, dtype=target, copy=True)
            setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
            pending.placed(owner)
            done += folder.entries[name].nbytes
            if progress:
                progress(done, total)
    return model.eval()


def _check_finite(path: Path, name: str, stored: Tensor) -> None:
    """Raise `CheckpointError` for NaN and infinity. One pass over the bytes; `isfinite` takes ten times as long."""
    if stored.numel() and not all(bound.isfinite() for bound in stored.aminmax()):
        raise CheckpointError(f"{path}: tensor {name!r} holds values that are not finite")


def _empty(network: Network[_Model]) -> _Model:
    with torch.device("meta"), _NoInit():
        return network.make()


class _NoInit(TorchFunctionMode):
    """Modules built inside keep their parameters as they are allocated: the file has the values.

    On the meta device initialising is not only useless: it pulls in 70 MB of shape functions written in Python.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_INITIALISERS = {
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    Tensor.fill_,
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.zero_,
}


class _Pending:
    """Packs a Linear as soon as all its parameters are placed."""

    def __init__(self, model: nn.Module):
        self._missing = {
            module: sum(1 for _ in module.parameters(recurse=False))
            for module in model.modules()
            if isinstance(module, Linear)
        }

    def placed(self, module: nn.Module) -> None:
        if isinstance(module, Linear):
            self._missing[module] -= 1
            if self._missing[module] == 0:
                module.pack()


def _target_dtype(owner: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Weights of matrix products and embeddings in the compute dtype; norms and frequencies in float32."""
    return dtype if isinstance(owner, Linear | nn.Embedding) else torch.float32


def _check_names(model: nn.Module, folder: WeightFolder, prefix: str) -> dict[str, tuple[nn.Module, str]]:
    """Stored name -> (owning module, attribute) of every parameter; all must be there with the expected shape."""
    slots = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}{path}.{attribute}" if path else f"{prefix}{attribute}"
            entry = folder.entries.get(name)
            if entry is None:
                raise CheckpointError(f"{folder.folder}: tensor {name!r} is missing")
            if entry.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{entry.path}: tensor {name!r} has shape {list(entry.shape)}; "
                    f"config.json asks for {list(parameter.shape)}"
                )
            slots[name] = (module, attribute)
    unknown = sorted(name for name in folder.entries if name.startswith(prefix) and name not in slots)
    if unknown:
        raise CheckpointError(f"{folder.folder}: tensor {unknown[0]!r} is not in the model of config.json")
    return slots
