"""Resumable states, and folders that appear whole or not at all, also after a power cut.

A state is a folder `state/step-00000500/` with `tensors.safetensors` and `state.json`, without pickle. The two newest
are kept: when the newest cannot be read, a run continues from the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from colaserve_client.reading import read_json
from colaserve_client.writing import write_file
from colaserve_services.errors import CheckpointError

KEPT = 2
_GENERATOR = "rng/torch"


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on. Sources of data have no state of their own: `step` says it all."""

    step: int  # steps done
    tensors: dict[str, Tensor]  # weights/NAME, ema/NAME, optimizer/NAME/INDEX/KEY
    settings: dict[str, Any]  # of the run, as JSON; a run is resumed under the same ones


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write `state` and torch's random generator below `folder` and return the path; drop all but the newest."""
    path = folder / f"step-{state.step:08d}"
    with drafted(path) as draft:
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
        save_file({**tensors, _GENERATOR: torch.get_rng_state()}, draft / "tensors.safetensors")
        write_file(draft / "state.json", json.dumps({"step": state.step, "settings": state.settings}, indent=1))
    _tidy(folder, path.name)
    return path


def _tidy(folder: Path, newest: str) -> None:
    """Remove half-written states, damaged ones that this run did not continue from, and all but the two newest."""
    found = [path.name for path in stored_states(folder)]
    good = [name for name in found if name <= newest][:KEPT]
    for name in {*found, *(path.name for path in folder.glob(".step-*"))}.difference(good):
        shutil.rmtree(folder / name, ignore_errors=True)


def stored_states(folder: Path) -> list[Path]:
    """The states below `folder`, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def load_newest(folder: Path, warn: Callable[[str], object]) -> tuple[Path, TrainingState] | None:
    """The newest state that can be read, and torch's random generator set to it; None when there is no state.

    Raises CheckpointError when there are states and all of them are damaged.
    """
    found = stored_states(folder)
    for path in found:
        try:
            return path, _load(path)
        except Exception as error:  # safetensors has its own exception types
            problem = f"{path}: not a readable training state ({error!r})"
            if path == found[-1]:
                raise CheckpointError(problem) from error
            warn(f"warning: {problem}; trying the state before it")
    return None


def _load(path: Path) -> TrainingState:
    plain, tensors = read_json(path / "state.json"), load_file(path / "tensors.safetensors")
    generator = tensors.pop(_GENERATOR)
    state = TrainingState(plain["step"], tensors, plain["settings"])
    torch.set_rng_state(generator)
    return state


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """An empty folder to write into. When the block ends well, what is in it is on disk and called `path`."""
    draft = path.with_name(f".{path.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        publish(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, path: Path) -> None:
    """Write `draft` (a file or a folder) through to the disk and rename it to `path`, replacing what is there."""
    for item in (*draft.rglob("*"), draft):
        _sync(item)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        os.replace(path, old)  # a folder cannot be renamed over another one
    os.replace(draft, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
