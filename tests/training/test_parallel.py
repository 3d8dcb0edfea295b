"""Two processes under torchrun (gloo, CPU) compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from colaserve_services.errors import UsageError
from colaserve_services.training.parallel import started
from tests.training.parallel_job import main

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, mode: str, until: int = 6, resume: str = "fresh") -> None:
    path = os.pathsep.join([str(ROOT), *(str(ROOT / part) for part in ("client", "services", "protos/gen"))])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.parallel_job", str(folder), mode, str(until), resume]
    # torchrun leaves a folder for logs behind
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[:4000]  # the processes' own words come before torchrun's


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    main(folder, "ddp", 6, False)
    return folder


def assert_equal(one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    weights, others = (load_file(folder / "weights.safetensors") for folder in (one, two))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.timeout(300)
def test_two_processes_equal_one(alone, tmp_path):
    torchrun(tmp_path, "ddp")
    assert_equal(alone, tmp_path)


@pytest.mark.timeout(600)
def test_two_processes_with_shards_killed_and_resumed_equal_one(alone, tmp_path):
    torchrun(tmp_path, "fsdp", until=3)
    torchrun(tmp_path, "fsdp", resume="resume")
    assert_equal(alone, tmp_path)


def test_an_unknown_mode_and_an_absent_device_are_named():
    with (
        pytest.raises(UsageError, match="parallel: got 'pipeline', expected one of ddp, fsdp"),
        started("cpu", "pipeline"),
    ):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device: got cuda, but this torch sees no CUDA device"), started("cuda"):
            pass
