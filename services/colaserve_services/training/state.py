"""Resumable states: weights, averaged weights, optimizers, random generator and position, without pickle.

A state is a folder `state/step-00000500/` with `tensors.safetensors` and `state.json`; it is written under another
name first and renamed, so that a killed run leaves no half state. The two newest are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from colaserve_client.writing import write_file
from colaserve_services.errors import CheckpointError

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
    _write(path, tensors, plain)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return path


def _write(path: Path, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, draft / "tensors.safetensors"
    )
    write_file(draft / "state.json", json.dumps(plain, indent=1))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(draft, path)


def _split(name: str, optimizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state_dict as plain JSON and tensors; a number beside the tensors becomes a tensor."""
    tensors = {}
    for index, entries in optimizer["state"].items():
        for key, value in entries.items():
            tensors[f"optimizer/{name}/{index}/{key}"] = torch.as_tensor(value)
    return {"param_groups": optimizer["param_groups"]}, tensors


def newest_state(folder: Path) -> Path | None:
    """The newest complete state below `folder`, or None."""
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def load_state(path: Path) -> TrainingState:
    """Read a state and set torch's random generator to it. Raises CheckpointError on a damaged one."""
    try:
        plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "tensors.safetensors")
    except Exception as error:  # safetensors has its own exception types
        raise CheckpointError(f"{path}: not a readable training state ({error})") from error
    torch.set_rng_state(tensors.pop("rng/torch"))
    optimizers = {name: {"state": {}, **groups} for name, groups in plain["optimizers"].items()}
    for name in [name for name in tensors if name.startswith("optimizer/")]:
        _, optimizer, index, key = name.split("/")
        optimizers[optimizer]["state"].setdefault(int(index), {})[key] = tensors.pop(name)
    return TrainingState(
        plain["step"], _below(tensors, "weights/"), _below(tensors, "ema/"), optimizers, plain["settings"]
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
