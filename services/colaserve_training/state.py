"""Resumable states, and folders whose content appears whole or not at all, also after a power cut.

A state is a folder `state/step-00000500/` with `tensors.safetensors` and `state.json`, without pickle. The two newest
are kept: when the newest cannot be read, a run continues from the one before.
"""

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
    name = f"step-{state.step:08d}"
    with drafted(folder) as draft:
        (draft / name).mkdir()
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.tensors.items()}
        save_file({**tensors, _GENERATOR: torch.get_rng_state()}, draft / name / "tensors.safetensors")
        write_file(draft / name / "state.json", json.dumps({"step": state.step, "settings": state.settings}, indent=1))
    # Newer ones are damaged: this run did not continue from them.
    found = [path.name for path in stored_states(folder)]
    for old in {*found}.difference([each for each in found if each <= name][:KEPT]):
        shutil.rmtree(folder / old, ignore_errors=True)
    return folder / name


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
            plain, tensors = read_json(path / "state.json"), load_file(path / "tensors.safetensors")
            torch.set_rng_state(tensors.pop(_GENERATOR))
            return path, TrainingState(plain["step"], tensors, plain["settings"])
        except Exception as error:  # safetensors has its own exception types
            problem = f"{path}: not a readable training state ({error!r})"
            if path == found[-1]:
                raise CheckpointError(problem) from error
            warn(f"warning: {problem}; trying the state before it")
    return None


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """An empty folder to write into. When the block ends well, what is in it is on the disk and moves to `folder`.

    It replaces what is there, the entry that comes first in the alphabet (a checkpoint's weights, `cola_dlm`) last.
    """
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for item in draft.rglob("*"):
            _sync(item)
        for item in sorted(draft.iterdir(), reverse=True):
            if (path := folder / item.name).is_dir():  # a folder cannot be renamed over another one
                os.replace(path, draft / f"{item.name}.old")
            os.replace(item, path)
        _sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
