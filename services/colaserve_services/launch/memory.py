"""`--kv-bytes auto`: KV caches get what memory leaves after the weights and the largest pass, in equal contexts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from colaserve_client.reading import Unreadable, read_text
from colaserve_services.engine.limits import EngineLimits

GROUPS = Path("/sys/fs/cgroup")
KEPT = 0.1  # of what is left, for what nobody counts: fragments, workspaces of libraries
OF_A_MACHINE = 0.5  # of what is available where nothing limits this process: others live there too
ROWS_AT_ONCE = 16  # rows of a layer's width, in float32, that a pass holds for each position at its peak
COPIES = 3  # of logits, in float32


def budgets(models: Mapping[str, Any], limits: EngineLimits, block_size: int) -> dict[str, int]:
    """Bytes for the KV cache of each stage, by its loaded network; those on one device hold equally many latents."""
    found: dict[str, int] = {}
    for device in {model.device for model in models.values()}:
        here = {stage: model for stage, model in models.items() if model.device == device}
        free = _left(device) - sum(_pass_bytes(stage, model, limits, block_size) for stage, model in here.items())
        latent = {stage: model.kv_elements * model.dtype.itemsize for stage, model in here.items()}
        found |= {stage: max(0, free) * size // max(1, sum(latent.values())) for stage, size in latent.items()}
    return found


def _pass_bytes(stage: str, model: Any, limits: EngineLimits, block_size: int) -> int:
    """Of the largest pass: a part of a context, both guidance branches of every session, and a decoder's logits."""
    sessions = limits.max_running * block_size
    width = model.kv_elements // (2 * max(1, len(model.blocks)))
    logits = sessions * model.config.patch_size * model.config.vocab_size if stage == "decoder" else 0
    return 4 * ((limits.prefill_chunk + 2 * sessions) * ROWS_AT_ONCE * width + COPIES * logits)


def _left(device: torch.device) -> int:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * (1 - KEPT))
    machine = _available()
    limited = container_left(GROUPS, Path("/proc/self/cgroup"))
    return int(machine * OF_A_MACHINE) if limited is None else int(min(limited, machine) * (1 - KEPT))


def _available() -> int:
    try:
        lines = read_text(Path("/proc/meminfo")).splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (Unreadable, StopIteration):  # no Linux: half of what is there at all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def container_left(groups: Path, own: Path) -> int | None:
    """What the tightest of this process's control groups (version 2, or 1) leaves; None where none has a limit."""
    left = []
    for folder in _groups(groups, own):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit = _number(folder / most)
            if limit is not None and limit < 1 << 60:  # version 1 says "none" by a number
                left.append(limit - (_number(folder / used) or 0) + _reclaimable(folder / "memory.stat"))
    return max(0, min(left)) if left else None


def _groups(groups: Path, own: Path) -> list[Path]:
    """The groups that hold this process, inside a container as outside of one."""
    try:
        paths = [line.split(":", 2)[1:] for line in read_text(own).splitlines()]
    except Unreadable:
        paths = []
    found = {groups, groups / "memory"}
    for kind, path in paths:
        if kind in ("", "memory"):
            leaf = groups / kind / path.lstrip("/")
            found.update(each for each in (leaf, *leaf.parents) if each.is_relative_to(groups))
    return [each for each in found if each.is_dir()]


def _number(path: Path) -> int | None:
    try:
        return int(read_text(path))
    except (Unreadable, ValueError):  # "max"
        return None


def _reclaimable(path: Path) -> int:
    """Files' pages, which the kernel gives up when memory is short; weights were read through them."""
    try:
        return sum(int(n) for name, n in map(str.split, read_text(path).splitlines()) if name == "inactive_file")
    except (Unreadable, ValueError):
        return 0
