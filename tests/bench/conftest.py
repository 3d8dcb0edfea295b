"""A tiny checkpoint as `bench make-checkpoint` writes it."""

from pathlib import Path

import pytest
import torch

from colaserve_services.bench.weights import make_checkpoint


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    make_checkpoint("tiny", directory)
    return directory


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
