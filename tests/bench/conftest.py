"""A tiny checkpoint as `bench make-checkpoint` writes it, and its prior started."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from colaserve_bench.stages import ComputeSettings, Stages, started
from colaserve_bench.weights import make_checkpoint


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    make_checkpoint("tiny", directory)
    return directory


@pytest.fixture
def stages(tiny_model: Path) -> Iterator[Stages]:
    compute = ComputeSettings(tiny_model, "float32", threads=1)
    with started(compute, max_context=128, max_running=4, roles=("decoder", "prior")) as running:
        yield running


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
