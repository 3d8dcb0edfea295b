"""Checkpoints in the released layout: opened and checked as a whole, each service reading only the tensors it needs.

<model>/cola_dlm/cola_dit/   config.json, model.safetensors or shards with model.safetensors.index.json
<model>/cola_dlm/cola_vae/   likewise
<model>/tokenizer.json       and, optionally, generation_config.json

Reading weights imports torch, all else does without: a coordinator opens a checkpoint too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from colaserve_services.errors import CheckpointError
from colaserve_services.model.config import (
    DiTConfig,
    ModelShape,
    TextVAEConfig,
    check_pair,
    load_dit_config,
    load_vae_config,
    read_json,
)
from colaserve_services.model.generation_config import GenerationDefaults, read_generation_config
from colaserve_services.stand_ins import stand_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from colaserve_services.model.dit import DiT
    from colaserve_services.model.text_vae import TextVAEDecoder, TextVAEEncoder

Progress = Callable[[int, int], None]  # bytes read so far, bytes to read

_FINGERPRINT_BYTES = 4096  # of each tensor's data


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in its file."""

    path: Path
    dtype: str  # as safetensors writes it, such as "F32"
    shape: tuple[int, ...]
    offset: int  # of the data, from the beginning of the file
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class WeightFolder:
    """The tensors of one folder, single-file or sharded; reads headers only until a tensor is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, _Entry] = {}
        for path, expected in _weight_files(folder):
            entries = _read_header(path)
            for name in sorted(expected - entries.keys()):
                raise CheckpointError(f"{path}: tensor {name!r} is missing, though the index puts it there")
            for name in sorted(entries.keys() - expected) if expected else ():
                raise CheckpointError(f"{path}: has a tensor {name!r} that the index does not put there; delete it")
            self.entries |= entries

    def read(self, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor as stored, on the CPU) one by one, in file order; tensors are only valid until the next one."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].path, []).append(name)
        for path, inside in by_file.items():
            with _opened(path, "pt") as file:
                for name in sorted(inside, key=lambda n: self.entries[n].offset):
                    yield name, file.get_tensor(name)

    def fingerprint(self) -> str:
        """First 16 hex digits of SHA-256 over the canonical config.json and each tensor's name, dtype, shape and head.

        Per tensor, in name order: name, dtype and comma-joined shape, each followed by a newline, then the first
        4,096 bytes of data.
        """
        config = json.dumps(read_json(self.folder / "config.json"), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(config.encode())
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}\n{entry.dtype}\n{','.join(map(str, entry.shape))}\n".encode())
            with entry.path.open("rb") as file:
                file.seek(entry.offset)
                digest.update(file.read(min(_FINGERPRINT_BYTES, entry.nbytes)))
        return digest.hexdigest()[:16]


class Checkpoint:
    """A checkpoint whose configs, headers and defaults have been read and found sound; weights are read later."""

    def __init__(self, directory: Path):
        self.directory = directory
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such folder")
        self.name = directory.resolve().name
        self.tokenizer_path = directory / "tokenizer.json"
        if not self.tokenizer_path.is_file():
            raise CheckpointError(f"{self.tokenizer_path}: no such file")
        vae_folder, dit_folder = (directory / "cola_dlm" / name for name in ("cola_vae", "cola_dit"))
        self.vae_config: TextVAEConfig = load_vae_config(vae_folder / "config.json")
        self.dit_config: DiTConfig = load_dit_config(dit_folder / "config.json")
        check_pair(self.vae_config, self.dit_config)
        self.vae, self.dit = WeightFolder(vae_folder), WeightFolder(dit_folder)
        self.space = self.vae.fingerprint()
        own = directory / "generation_config.json"
        self.defaults = read_generation_config(own) if own.is_file() else GenerationDefaults()

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Open a folder in the released layout; raise `CheckpointError`, one line, if it cannot be served."""
        return cls(Path(directory))

    @property
    def shape(self) -> ModelShape:
        """Of the whole model; `parameters` counts all stages."""
        stored = (*self.vae.entries.values(), *self.dit.entries.values())
        parameters = sum(entry.elements for entry in stored)
        return self._shape(parameters)

    def load_encoder(
        self, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
    ) -> TextVAEEncoder:
        """The Text VAE's encoder; decoder weights are never read."""
        from colaserve_services.model import loading

        return loading.load(loading.encoder(self), device, dtype, progress)

    def load_decoder(
        self, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
    ) -> TextVAEDecoder:
        """The Text VAE's decoder; encoder weights are never read."""
        from colaserve_services.model import loading

        return loading.load(loading.decoder(self), device, dtype, progress)

    def load_prior(self, device: torch.device, dtype: torch.dtype, progress: Progress | None = None) -> DiT:
        """The DiT prior."""
        from colaserve_services.model import loading

        return loading.load(loading.prior(self), device, dtype, progress)

    def weights_of(self, stage: str) -> str:
        """Fingerprint of the folder that the weights of one stage lie in."""
        return self.dit.fingerprint() if stage == "prior" else self.space

    def check(self) -> None:
        """Raise `CheckpointError` unless every tensor of the networks is there in its shape; reads headers only."""
        from colaserve_services.model import loading

        for network in loading.NETWORKS.values():
            loading.parameters(network(self))

    def shape_of(self, stage: str) -> ModelShape:
        """The shape with the parameters of one stage alone: "encoder", "prior" or "decoder"."""
        from colaserve_services.model import loading

        return self._shape(loading.parameters(loading.NETWORKS[stage](self)))

    def _shape(self, parameters: int) -> ModelShape:
        vae, dit = self.vae_config, self.dit_config
        return ModelShape(
            vae.latent_dim, dit.block_size, vae.block_size, vae.patch_size, vae.vocab_size, parameters=parameters
        )


def _weight_files(folder: Path) -> list[tuple[Path, set[str]]]:
    """The files of a folder, each with the tensors that the index expects in it."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [(folder / "model.safetensors", set())]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name!r} is put into {file!r}; expected a file of the same folder")
        files.setdefault(file, set()).add(name)
    return [(folder / file, names) for file, names in sorted(files.items())]


_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def _read_header(path: Path) -> dict[str, _Entry]:
    with _opened(path, "np"):  # the library checks the header against the file's size
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in _DTYPE_BYTES:
            raise CheckpointError(f"{path}: tensor {name!r} is {info['dtype']}; expected a floating-point dtype")
        begin, end = info["data_offsets"]
        entries[name] = _Entry(path, info["dtype"], tuple(info["shape"]), 8 + size + begin, end - begin)
    return entries


def _opened(path: Path, framework: str) -> Any:
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        if found := stand_in(path):
            raise CheckpointError(f"{path}: is {found}") from error
        raise CheckpointError(f"{path}: damaged or truncated: {error}") from error
