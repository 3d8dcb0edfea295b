"""`--kv-bytes auto`: from limits of control groups, and by what a latent takes in each stage."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colaserve_services.engine.limits import EngineLimits
from colaserve_services.launch.memory import budgets, container_left
from tests.services.fake_gpus import Gpus

GB = 1 << 30


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def own(folder: Path, lines: str) -> Path:
    path = folder / "own"
    path.write_text(lines)
    return path


def test_the_tightest_group_above_a_process_counts(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    group(groups, max="max\n", current="1\n", stat="")
    group(groups / "pod", max=f"{8 * GB}\n", current=f"{3 * GB}\n", stat=f"anon 5\ninactive_file {GB}\n")
    group(groups / "pod" / "one", max=f"{20 * GB}\n", current="0\n", stat="")
    assert container_left(groups, own(tmp_path, "0::/pod/one\n")) == 6 * GB
    assert container_left(groups, own(tmp_path, "0::/\n")) is None


def test_version_1_says_by_a_number_that_there_is_no_limit(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    group(groups / "memory", limit_in_bytes=f"{2**63 - 4096}", usage_in_bytes="5", stat="")
    group(groups / "memory" / "job", limit_in_bytes=f"{4 * GB}", usage_in_bytes=f"{5 * GB}", stat="")
    assert container_left(groups, own(tmp_path, "4:memory:/\n3:cpu:/job\n")) is None
    assert container_left(groups, own(tmp_path, "4:memory:/job\n")) == 0
    assert container_left(tmp_path / "none", tmp_path / "none") is None


def network(kv_elements: int, device: str = "cpu") -> SimpleNamespace:
    config = SimpleNamespace(patch_size=1, vocab_size=100)
    return SimpleNamespace(
        device=torch.device(device), dtype=torch.float32, kv_elements=kv_elements, blocks=[0], config=config
    )


def nothing(*_: object) -> None:
    """Made, it takes no memory."""


def test_stages_of_a_device_hold_equally_many_latents() -> None:
    found = budgets({"prior": network(3000), "decoder": network(1000)}, EngineLimits(), 4, nothing)
    assert found["decoder"] > 0
    assert abs(found["prior"] - 3 * found["decoder"]) < 4


def test_what_a_pass_takes_is_not_for_kv() -> None:
    few, many = (
        budgets({"prior": network(1000)}, EngineLimits(max_running=running), 16, nothing)["prior"]
        for running in (1, 8000)
    )
    assert few - many > GB // 2


def test_a_tenth_of_what_is_free_on_a_gpu_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for free in (10 * GB, 20 * GB):
        Gpus(monkeypatch, [(9, 0)], current=0, free=free)
        found.append(budgets({"prior": network(1000, "cuda:0")}, EngineLimits(), 16, nothing)["prior"])
    assert abs(found[1] - found[0] - 9 * GB) < 4000
