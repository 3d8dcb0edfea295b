"""Stages on GPUs, with `fake_gpus` in their place: which device, which threads, which streams, which numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import UsageError
from colaserve_services.launch.memory import budgets
from colaserve_services.launch.stages import load_stages, pick_device, pick_dtype
from colaserve_services.model.backend import Sizes
from colaserve_services.model.backend.pick import bucketed
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import load
from colaserve_services.rpc.metrics import Metrics
from tests.conftest import Golden
from tests.services.fake_gpus import Gpus
from tests.services.kernel_references import references
from tests.services.launch.processes import FREE_PORTS

WHO_IMPORTS_TORCH = """
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch", sys.argv[1], os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), file=sys.stderr)
sys.meta_path.insert(0, Finder)
"""


def test_cuda_is_the_current_device_and_older_ones_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, [(7, 5), (8, 6)], current=1, free=0)
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert pick_dtype("auto", torch.device("cuda", 1)) == torch.bfloat16
    refused = {
        "cuda:0": "GPU 0 has compute capability 7.5, expected 8.0 (Ampere) or newer",
        "cuda:2": "got cuda:2, this machine has 2 GPU(s)",
    }
    for name, why in refused.items():
        with pytest.raises(UsageError) as caught:
            pick_device(name)
        assert str(caught.value) == f"--device: {why}"
    with pytest.raises(UsageError, match=r"it takes compute capability 8\.9, this GPU has 8\.6"):
        pick_dtype("float8", torch.device("cuda", 1))


def test_threads_of_a_process_have_its_gpu_as_the_current_one(monkeypatch: pytest.MonkeyPatch, tiny: Golden) -> None:
    monkeypatch.setitem(sys.modules, "colaserve_services.model.kernels", None)  # as without Triton: plain torch
    monkeypatch.delattr("colaserve_services.model.kernels", raising=False)
    compute = dict.fromkeys(("encoder", "prior", "decoder"), ("cuda:1", "float32"))
    gpus = Gpus(monkeypatch, [(9, 0)] * 2, current=0, free=1 << 30)
    with gpus.here(1):
        stages = load_stages(Checkpoint.open(tiny.directory), compute, EngineLimits(max_context=64), Metrics())
    stages.stop()
    assert gpus.chosen == [("MainThread", 1), ("device", 1)]
    assert "not installed" in stages.engines["prior"].chosen()["why"]


def test_the_decoder_does_not_wait_for_the_prior(monkeypatch: pytest.MonkeyPatch, tiny: Golden) -> None:
    """Its stream has a higher priority. Each size of a pass is one graph, that is captured once and computed before."""
    gpus = Gpus(monkeypatch, [(9, 0)], current=0, free=1 << 30)
    device, kernels = torch.device("cuda", 0), references()
    with gpus.here(0):
        picked, found = bucketed(kernels, device), []
        for stage in ("prior", "decoder", "encoder"):
            model = load(Checkpoint.open(tiny.directory), stage, device, torch.float32)
            getattr(picked, stage)(model, Sizes(1 << 20, 1, 4, 64))
            found.append(gpus.captured)
        monkeypatch.setenv("COLASERVE_CUDA_GRAPHS", "0")
        picked.encoder(model, Sizes(1 << 20, 1, 4, 64))
    assert gpus.priorities[:3] == [0, -1, -1]
    assert [*found, gpus.captured] == [4, 8, 12, 12]


def test_kv_gets_what_the_graphs_of_all_passes_leave(monkeypatch: pytest.MonkeyPatch, tiny: Golden) -> None:
    free, graph = 1 << 30, 8 << 20
    gpus = Gpus(monkeypatch, [(9, 0)], current=0, free=free, graph=graph)
    device, checkpoint = torch.device("cuda", 0), Checkpoint.open(tiny.directory)
    with gpus.here(0):
        picked = bucketed(references(), device)
        models = {stage: load(checkpoint, stage, device, torch.float32) for stage in ("prior", "decoder", "encoder")}
        found = budgets(
            models, EngineLimits(max_running=1, max_context=64), 4, lambda stage, *of: getattr(picked, stage)(*of)
        )
    config = models["decoder"].config
    logits = 3 * 4 * 4 * config.patch_size * config.vocab_size
    assert gpus.captured == 12
    assert abs(sum(found.values()) - (0.9 * free - 12 * graph - logits)) < 4


@pytest.mark.slow
def test_stages_of_a_gpu_are_a_process_that_sets_its_allocator_before_it_imports_torch(tmp_path: Path) -> None:
    """`up` itself has the coordinator and the gateway, and no torch."""
    (tmp_path / "sitecustomize.py").write_text(WHO_IMPORTS_TORCH)
    command = [sys.executable, "-m", "colaserve_services.launch", "up", "--device=cuda", *FREE_PORTS]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("torch")] == [
        "torch encoder+prior+decoder expandable_segments:True"
    ]
    assert "finds no GPU" in done.stderr
