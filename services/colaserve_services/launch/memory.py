"""`--kv-bytes auto`: KV caches get what memory leaves after the weights and the largest pass, in equal contexts."""

import gc
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from colaserve_client.reading import Unreadable, read_text
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.model.backend import Sizes

GROUPS = Path("/sys/fs/cgroup")
_KEPT = 0.1  # of what is left, for what is not counted: fragmentation, workspaces of libraries
_OF_A_MACHINE = 0.5  # of what is available where no limit is set: other processes need memory, too
_ROWS_AT_ONCE = 16  # rows of a layer's width, in float32, that a pass holds for each position at its peak
_LOGITS = 3  # copies of them in float32, for all sessions at once


def budgets(
    models: Mapping[str, Any], limits: EngineLimits, block_size: int, make: Callable[[str, Any, Sizes], object]
) -> dict[str, int]:
    """Bytes for the KV cache of each stage with its loaded network; stages on one device hold equally many latents.
    `make` a stage's backend with these sizes, which on a GPU computes every size of a pass."""
    found: dict[str, int] = {}
    for device in {model.device for model in models.values()}:
        here = {stage: model for stage, model in models.items() if model.device == device}
        latent = {stage: model.kv_elements * model.dtype.itemsize for stage, model in here.items()}
        free, passes = _left(device), sum(_pass_bytes(model, limits, block_size) for model in here.values())
        if device.type == "cuda":
            page = {stage: size * block_size for stage, size in latent.items()}
            sizes = limits.max_running, block_size, limits.max_context
            made = (make(stage, model, Sizes(page[stage], *sizes)) for stage, model in here.items())
            passes = max(passes, _taken(device, made))
        if "decoder" in here:
            config = here["decoder"].config
            passes += 4 * _LOGITS * limits.max_running * block_size * config.patch_size * config.vocab_size
        found |= {stage: max(0, free - passes) * size // max(1, sum(latent.values())) for stage, size in latent.items()}
    return found


def _pass_bytes(model: Any, limits: EngineLimits, block_size: int) -> int:
    """Of the largest pass by estimate: a part of a context, and both guidance branches of every session."""
    width = model.kv_elements // (2 * max(1, len(model.blocks)))
    return 4 * (limits.prefill_chunk + 2 * limits.max_running * block_size) * _ROWS_AT_ONCE * width


def _taken(device: torch.device, backends: Iterator[object]) -> int:
    """Bytes of a GPU that making backends takes, whose graphs keep the memory of their passes."""
    free, _ = torch.cuda.mem_get_info(device)
    made = list(backends)
    left, _ = torch.cuda.mem_get_info(device)
    del made
    gc.collect()
    torch.cuda.empty_cache()
    return free - left


def _left(device: torch.device) -> int:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * (1 - _KEPT))
    kib = _number(Path("/proc/meminfo"), "MemAvailable:")
    # Where this is no Linux: half of what is there at all.
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if kib is None else kib << 10
    limited = container_left(GROUPS, Path("/proc/self/cgroup"))
    return int(machine * _OF_A_MACHINE) if limited is None else int(min(limited, machine) * (1 - _KEPT))


def container_left(groups: Path, own: Path) -> int | None:
    """What the tightest of this process's control groups (version 2, or 1) leaves; None where none has a limit."""
    left = []
    for folder in _groups(groups, own):
        # Pages of files, such as those that weights were read through: the kernel frees them when memory is short.
        reclaimable = _number(folder / "memory.stat", "inactive_file ") or 0
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit = _number(folder / most)
            if limit is not None and limit < 1 << 60:  # version 1 says "none" by a number
                left.append(limit - (_number(folder / used) or 0) + reclaimable)
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


def _number(path: Path, name: str = "") -> int | None:
    """The first number of a file, or of its line that begins with `name`; None where there is none, as for "max"."""
    try:
        found = re.search(rf"^{name}\s*(\d+)", read_text(path), re.MULTILINE)
    except Unreadable:
        return None
    return int(found[1]) if found else None
