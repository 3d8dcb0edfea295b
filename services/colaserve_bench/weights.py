"""Random weights in the released layout, written tensor by tensor: memory stays bounded at any model size."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from colaserve_bench.presets import PRESETS, Preset
from colaserve_bench.tokens import write_tokenizer
from colaserve_client.writing import write_file
from colaserve_services.errors import UsageError
from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import rotary_frequencies
from colaserve_services.model.text_vae import TextVAE

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_BYTES = {"F32": 4, "BF16": 2}
_PIECE = 1 << 22  # elements drawn at once
_NEVER = -1e4  # bias of the special ids: a benchmark's text does not end by chance


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * _BYTES[self.dtype]


def make_checkpoint(preset_name: str, directory: Path, dtype: str = "float32", seed: int = 0) -> int:
    """Write a checkpoint of a preset's size; the same seed gives the same bytes. Returns the parameters written.

    Raises UsageError when the folder holds a checkpoint already or the disk has no room.
    """
    preset = PRESETS[preset_name]
    with torch.device("meta"):
        models = {"cola_dit": DiT(preset.dit), "cola_vae": TextVAE(preset.vae)}
    tensors = {folder: _tensors(model, DTYPES[dtype]) for folder, model in models.items()}
    _check_room(directory, sum(tensor.nbytes for folder in tensors.values() for tensor in folder))
    configs = {
        "cola_dit": {"architectures": ["ColaDiTModel"], "model_type": "cola_dit", **asdict(preset.dit)},
        "cola_vae": {"architectures": ["ColaTextVAEModel"], "model_type": "cola_text_vae", **asdict(preset.vae)},
    }
    for name, config in configs.items():
        folder = directory / "cola_dlm" / name
        folder.mkdir(parents=True)
        _write_folder(folder, tensors[name], preset, seed)
        _write_json(folder / "config.json", {**config, "dtype": dtype})
    write_tokenizer(directory / "tokenizer.json", preset.vae.vocab_size, preset.special_ids)
    return sum(tensor.elements for folder in tensors.values() for tensor in folder)


def _tensors(model: torch.nn.Module, dtype: str) -> list[_Tensor]:
    return [
        _Tensor(name, tuple(value.shape), "F32" if name.endswith(".freqs") else dtype)
        for name, value in model.state_dict().items()
    ]


def _check_room(directory: Path, nbytes: int) -> None:
    if (directory / "cola_dlm").exists():
        raise UsageError(f"{directory}: holds a checkpoint already; name another folder or remove it")
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise UsageError(f"{directory}: {nbytes / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


def _write_folder(folder: Path, tensors: list[_Tensor], preset: Preset, seed: int) -> None:
    shards = _shards(tensors, preset.shard_bytes)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], preset, seed)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, preset, seed)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: list[_Tensor], limit: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: list[_Tensor], preset: Preset, seed: int) -> None:
    """The safetensors format: header length, JSON header padded to 8 bytes, then the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    draft = path.with_name(path.name + ".part")
    with draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(file, tensor, preset, seed)
    draft.replace(path)


def _write_tensor(file: BinaryIO, tensor: _Tensor, preset: Preset, seed: int) -> None:
    for piece in _values(tensor, preset, seed):
        values = piece
        if tensor.dtype == "BF16":
            values = torch.from_numpy(piece).to(torch.bfloat16).view(torch.int16).numpy()
        file.write(values.tobytes())


def _values(tensor: _Tensor, preset: Preset, seed: int) -> Iterator[NDArray[np.float32]]:
    """Fan-in scaled matrices, norms that start as the identity: activations stay near one at any depth."""
    name, shape = tensor.name, tensor.shape
    if name.endswith(".freqs"):
        yield rotary_frequencies(preset.dit.rope_dim, 10000.0).numpy()
    elif name == "decoder.final_layer.bias":
        bias = np.zeros(shape, np.float32)
        bias[list(preset.special_ids.values())] = _NEVER
        yield bias
    elif len(shape) == 1:
        yield np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
    else:
        deviation = 1.0 if name.endswith("wte.weight") else _gain(name) / math.sqrt(math.prod(shape[1:]))
        yield from _normal(tensor.elements, deviation, [seed, zlib.crc32(name.encode())])


def _gain(name: str) -> float:
    """A small velocity: even with guidance 7 the latents stay near the sphere that the noise came from."""
    return 0.2 if name == "txt_out.proj.weight" else 1.0


def _normal(count: int, deviation: float, seed: list[int]) -> Iterator[NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    for start in range(0, count, _PIECE):
        values = generator.standard_normal(min(_PIECE, count - start), dtype=np.float32)
        values *= np.float32(deviation)
        yield values


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
