"""The tensors of one network's folder: found and checked by their files' headers, read one by one.

Reading tensors imports torch, all else does without: a coordinator opens checkpoints too.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from colaserve_services.errors import CheckpointError
from colaserve_services.model.config import read_json
from colaserve_services.stand_ins import stand_in

if TYPE_CHECKING:
    from torch import Tensor

_FINGERPRINT_BYTES = 4096  # of each tensor's data


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    path: Path
    dtype: str  # as safetensors writes it, such as "F32"
    shape: tuple[int, ...]
    offset: int  # of the data, from the beginning of the file
    nbytes: int


class WeightFolder:
    """The tensors of one folder, single-file or sharded; reads headers only until a tensor is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for path, expected in _weight_files(folder):
            entries = _read_header(path)
            for name in sorted(expected - entries.keys()):
                raise CheckpointError(f"{path}: tensor {name!r} is missing, though the index puts it there")
            for name in sorted(entries.keys() - expected) if expected else ():
                raise CheckpointError(f"{path}: has a tensor {name!r} that the index does not put there; delete it")
            self.entries |= entries

    def elements(self, prefix: str = "") -> int:
        """Of all tensors whose names begin so."""
        return sum(math.prod(entry.shape) for name, entry in self.entries.items() if name.startswith(prefix))

    def read(self, names: Iterable[str]) -> "Iterable[tuple[str, Tensor]]":
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


def _read_header(path: Path) -> dict[str, Entry]:
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
        entries[name] = Entry(path, info["dtype"], tuple(info["shape"]), 8 + size + begin, end - begin)
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
