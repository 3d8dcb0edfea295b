"""Resumable states: weights, averaged weights, optimizers, random generator and position, without pickle.

A state is a folder `state/step-00000500/` with `tensors.safetensors` and `state.json`; it is written under another
name, synced to the disk and renamed, so that a killed run leaves no half state. The two newest are kept: when the
newest cannot be read, a run goes on from the one before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from colaserve_client.writing import write_file
from colaserve_services.errors import CheckpointError
from colaserve_training.files import drafted

KEPT = 2


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on. Sources of data have no state of their own: step says it all."""

    step: int  # steps done
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizers: dict[str, dict[str, Any]]  # state_dict() of each
    settings: dict[str, Any]  # of the run, as JSON; a run is resumed under the same ones


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write `state` below `folder` and return its path; drop all but the newest."""
    tensors = {f"weights/{name}": value for name, value in state.weights.items()}
    tensors |= {f"ema/{name}": value for name, value in state.ema.items()}
    plain: dict[str, Any] = {"step": state.step, "settings": state.settings, "optimizers": {}}
    for name, optimizer in state.optimizers.items():
        groups, parts = _split(name, optimizer)
        plain["optimizers"][name] = groups
        tensors |= parts
    tensors["rng/torch"] = torch.get_rng_state()
    path = folder / f"step-{state.step:08d}"
    with drafted(path) as draft:
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, draft / "tensors.safetensors")
        write_file(draft / "state.json", json.dumps(plain, indent=1))
    _tidy(folder, path.name)
    return path


def _tidy(folder: Path, newest: str) -> None:
    """Remove half-written states, damaged ones that this run did not go on from, and all but the two newest."""
    found = [path.name for path in stored_states(folder)]
    good = [name for name in found if name <= newest][:KEPT]
    for name in {*found, *(path.name for path in folder.glob(".step-*"))}.difference(good):
        shutil.rmtree(folder / name, ignore_errors=True)


def _split(name: str, optimizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state_dict as plain JSON and tensors; a number beside the tensors becomes a tensor."""
    tensors = {}
    for index, entries in optimizer["state"].items():
        for key, value in entries.items():
            tensors[f"optimizer/{name}/{index}/{key}"] = torch.as_tensor(value)
    return {"param_groups": optimizer["param_groups"]}, tensors


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
            return path, load_state(path)
        except CheckpointError as error:
            if path == found[-1]:
                raise
            warn(f"warning: {error}; trying the state before it")
    return None


def load_state(path: Path) -> TrainingState:
    """Read a state and set torch's random generator to it. Raises CheckpointError on a damaged one."""
    try:
        return _load(path)
    except Exception as error:  # safetensors has its own exception types
        raise CheckpointError(f"{path}: not a readable training state ({error!r})") from error


def _load(path: Path) -> TrainingState:
    plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = load_file(path / "tensors.safetensors")
    generator = tensors.pop("rng/torch")
    optimizers = {name: {"state": {}, **groups} for name, groups in plain["optimizers"].items()}
    for name in [name for name in tensors if name.startswith("optimizer/")]:
        _, optimizer, index, key = name.split("/")
        optimizers[optimizer]["state"].setdefault(int(index), {})[key] = tensors.pop(name)
    weights, ema = _below(tensors, "weights/"), _below(tensors, "ema/")
    state = TrainingState(plain["step"], weights, ema, optimizers, plain["settings"])
    torch.set_rng_state(generator)
    return state


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
