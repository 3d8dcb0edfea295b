"""A tiny checkpoint as `bench make-checkpoint` writes it, its engines, and a way to run the verbs on it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from colaserve_bench.checkpoint import PRESETS, make_checkpoint
from colaserve_bench.commands import bench
from colaserve_bench.engines import Compute, Engines, started


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    make_checkpoint(PRESETS["tiny"], directory)
    return directory


@pytest.fixture
def engines(tiny_model: Path) -> Iterator[Engines]:
    with started(Compute(tiny_model, "float32", threads=1), 128, 4) as running:
        yield running


@pytest.fixture
def run_bench(tiny_model: Path, tmp_path: Path) -> Callable[..., tuple[Result, Any]]:
    """Runs a quick `colaserve bench VERB` on the tiny checkpoint: how it ended, and its JSON."""

    def run(verb: str, *arguments: str) -> tuple[Result, Any]:
        out = tmp_path / f"{verb}.json"
        compute = ["--model", str(tiny_model), "--dtype=float32", "--threads=1", "--quick", "--json", str(out)]
        result = CliRunner().invoke(bench, [verb, *compute, *arguments])
        return result, json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
