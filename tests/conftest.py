"""Shared by all tests: the golden checkpoints and their recorded numbers."""

import json
import os
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

# As every role does: threads that spin long on a machine with other work make tests several times slower. Torch, which
# reads it when it is imported, comes later.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; on a GPU with 0

# Tests send SIGINT to themselves and to processes they start, which would ignore it where the shell had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that stands still for a moment is no failure, and a run is to fail again when it is repeated.
settings.register_profile("colaserve", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("colaserve")

TRACKER = "multiprocessing.resource_tracker"  # ends with the process that started it
COMPILED = "torchinductor_"  # torch makes a folder for what it compiled, and keeps it
GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_NAMES = ("tiny_b4", "tiny_b4_vae1", "tiny_b16_scaled")


@dataclass(frozen=True)
class Golden:
    """One golden checkpoint: its folder, golden.json and the recorded tensors."""

    directory: Path
    meta: dict[str, Any]
    tensors: dict[str, Any]


def load_golden(name: str) -> Golden:
    from safetensors.torch import load_file

    directory = GOLDEN / name
    return Golden(
        directory,
        json.loads((directory / "golden.json").read_text(encoding="utf-8")),
        load_file(directory / "golden.safetensors"),
    )


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory):
    """Temporary files of the tests, and the processes they start and theirs, are gone when all have ended."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith(COMPILED))
    assert not left, f"left behind in the folder for temporary files: {', '.join(left)}"
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    running = [command for command in commands if TRACKER not in command]
    assert not running, f"still running: {'; '.join(running)}"


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def tiny() -> Golden:
    return load_golden("tiny_b4")
