"""From a checkpoint's files to networks on a device: cast, placed and packed one tensor after the other."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colaserve_services.errors import CheckpointError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.cpu_features import narrow_dtype
from colaserve_services.model.dit import DiT
from colaserve_services.model.float8 import FLOAT8
from colaserve_services.model.layers import Linear
from colaserve_services.model.text_vae import TextVAEDecoder, TextVAEEncoder
from colaserve_services.model.weights import WeightFolder

Progress = Callable[[int, int], None]  # bytes read so far, bytes to read
Slots = dict[str, tuple[nn.Module, str]]  # module and attribute of the parameter that a stored tensor becomes
STAGES = ("encoder", "prior", "decoder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "float8": FLOAT8}  # of `load`

_OF_LAYERS = re.compile(r"\bblocks\.\d+\.(?!ada\.)")  # the DiT's `ada` is computed once for each time


def load(
    checkpoint: Checkpoint, stage: str, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> Any:
    """The network of a stage (TextVAEEncoder, DiT or TextVAEDecoder); weights of the others are not read.

    `dtype` int8 or float8 means the matrices of the layers; all else is then in `dtype_beside`. Tensors are read, cast
    and placed one after the other, so that only one is held twice.
    """
    model, folder, slots = _empty(checkpoint, stage)
    kind, dtype = dtype, dtype_beside(dtype)
    total, done = sum(folder.entries[name].nbytes for name in slots), 0
    with torch.no_grad():
        for name, stored in folder.read(slots):
            _check_finite(folder.entries[name].path, name, stored)
            owner, attribute = slots[name]
            quantized = kind != dtype and _OF_LAYERS.search(name) is not None and isinstance(owner, Linear)
            value = stored.to(device, torch.float32 if quantized else _target_dtype(owner, dtype), copy=True)
            setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
            if isinstance(owner, Linear) and not any(each.is_meta for each in owner.parameters(recurse=False)):
                owner.quantize(kind, dtype) if quantized else owner.pack()
            done += folder.entries[name].nbytes
            if progress is not None:
                progress(done, total)
    return model.eval()


def dtype_beside(dtype: torch.dtype) -> torch.dtype:
    """What is computed beside the matrices of layers in `dtype`."""
    return {torch.int8: narrow_dtype(), FLOAT8: torch.bfloat16}.get(dtype, dtype)


def check(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` unless every tensor of the networks is there in its shape; reads headers only."""
    for stage in STAGES:
        _empty(checkpoint, stage)


def _empty(checkpoint: Checkpoint, stage: str) -> tuple[nn.Module, WeightFolder, Slots]:
    """A network without values, the folder of its weights, and where each stored tensor belongs."""
    with torch.device("meta"), _NoInit():
        if stage == "prior":
            dit = DiT(checkpoint.dit_config)
            return dit, checkpoint.dit, _slots(dit, checkpoint.dit, "")
        half = TextVAEEncoder if stage == "encoder" else TextVAEDecoder
        vae: nn.Module = half(checkpoint.vae_config)
        return vae, checkpoint.vae, _slots(vae, checkpoint.vae, f"{stage}.")


def _slots(model: nn.Module, folder: WeightFolder, prefix: str) -> Slots:
    """Of every parameter by its stored name; all must be there with the expected shape, and no others."""
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
            slots[name] = module, attribute
    unknown = sorted(name for name in folder.entries if name.startswith(prefix) and name not in slots)
    if unknown:
        raise CheckpointError(f"{folder.folder}: tensor {unknown[0]!r} is not in the model of config.json")
    return slots


def _check_finite(path: Path, name: str, stored: Tensor) -> None:
    """Raise `CheckpointError` for NaN and infinity. One pass over the bytes; `isfinite` takes ten times as long."""
    if stored.numel() and not all(bound.isfinite() for bound in stored.aminmax()):
        raise CheckpointError(f"{path}: tensor {name!r} holds values that are not finite")


def _target_dtype(owner: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Weights of matrix products and embeddings in the compute dtype; norms and frequencies in float32."""
    return dtype if isinstance(owner, Linear | nn.Embedding) else torch.float32


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
    nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.fill_, Tensor.normal_, Tensor.uniform_,
    Tensor.zero_,
}  # fmt: skip
