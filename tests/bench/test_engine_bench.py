"""`bench engine`, `solvers` and `stall`: what is counted, what is left out, and that a run gives every number."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from colaserve_bench.checkpoint import PRESETS
from colaserve_bench.commands import bench
from colaserve_bench.engines import Engines, Load, StepRecorder, run
from colaserve_bench.stall import describe
from colaserve_bench.work import CALLS, LAYER_MATRICES, Peak, attention_of_block, product_flops, time_shares
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.flow import SamplerSettings

CPU = torch.device("cpu")
RunBench = Callable[..., Any]


def test_products_are_twice_the_rows_times_the_stored_weights(tiny_model: Path) -> None:
    entries = Checkpoint.open(tiny_model).dit.entries
    stored = sum(
        entry.shape[0] * entry.shape[1]
        for name, entry in entries.items()
        if any(name.endswith(f"{matrix}.weight") for matrix in LAYER_MATRICES)
    )
    assert product_flops(PRESETS["tiny"].dit, rows=5) == 2 * 5 * stored


def test_attention_of_a_block_counts_what_each_branch_sees() -> None:
    config = PRESETS["tiny"].dit
    inner = config.num_layers * config.heads * config.head_dim
    flops, kv_bytes = attention_of_block(config, past=8, evaluations=2, guided=1, itemsize=2)
    assert flops == 4 * inner * 4 * (2 * 12 + 4 + 8)  # twice over the past, once alone, once to commit
    assert kv_bytes == 2 * 2 * inner * (2 * 12 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_of_the_peak_is_the_same_product(tiny_model: Path, dtype: torch.dtype) -> None:
    peak = Peak(Checkpoint.open(tiny_model), CPU, dtype)
    x = peak.inputs(4)[0]
    available = {name: products for name in CALLS if (products := peak.products(name, 4))}
    assert "linear" in available
    for products in available.values():
        torch.testing.assert_close(products[0](x), x @ peak.weights[0].T, rtol=2e-2, atol=2e-2)
    gflops, call = peak.measure(4, 0.01)
    assert gflops > 0
    assert call in available


def test_steps_count_from_the_last_first_block_until_the_first_session_has_ended() -> None:
    recorder = StepRecorder()
    recorder.begin(2)
    recorder.stepped(1.0, 4, 2)  # prefill
    recorder.block(0.0, first=True)
    recorder.stepped(1.0, 4, 2)
    recorder.block(0.0, first=True)
    recorder.stepped(1.0, 4, 2)  # completes the last first block
    for rows in (8, 9):
        recorder.queued(0, 2)
        recorder.block(0.0, first=False)
        recorder.stepped(1.0, rows, 2)
    recorder.queued(0, 1)
    recorder.stepped(1.0, 10, 1)
    assert [step.rows for step in recorder.steady] == [8, 9]


async def test_a_profiled_run_knows_where_the_time_went(engines: Engines) -> None:
    await run(engines, Load(1, 8, 3, SamplerSettings(steps=3)), seed=1, profile=True)
    assert len(engines.steps.profiled_seconds) == 3
    shares = time_shares(engines.steps.profile, sum(engines.steps.profiled_seconds))
    assert min(shares["products"], shares["attention"], shares["other"]) > 0


def test_time_goes_to_the_outermost_operator_that_has_a_kind() -> None:
    def event(name: str, micros: float, parent: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, key=name, self_cpu_time_total=micros, cpu_parent=parent)

    attention = event("aten::scaled_dot_product_attention", 1e6)
    linear = event("aten::linear", 2e6)
    events = [attention, event("aten::bmm", 3e6, attention), event("aten::copy_", 4e6, attention), linear]
    events += [event("aten::addmm", 5e6, linear), event("aten::mul", 6e6)]
    shares = time_shares(SimpleNamespace(events=lambda: events, key_averages=lambda: events), step_seconds=25.0)
    assert (shares["attention"], shares["products"], shares["other"]) == (8.0, 7.0, 10.0)


async def test_errands_run_on_the_device_thread_and_bring_their_errors_back(engines: Engines) -> None:
    def fail() -> None:
        raise UsageError("here")

    assert await engines.errands.run(torch.is_inference_mode_enabled)
    with pytest.raises(UsageError, match="here"):
        await engines.errands.run(fail)


def test_the_engine_command_writes_every_number_a_table_and_a_picture(run_bench: RunBench, tmp_path: Path) -> None:
    picture = tmp_path / "engine.png"
    result, report = run_bench("engine", "--sessions=1,2", "--context=8", "--steps=2", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert [row["sessions"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert row["roofline_fraction"] == pytest.approx(row["gflops"] / row["peak_gflops"])
        assert row["attention_gflops"] > 0
        assert row["tokens_per_second"] == pytest.approx(4 * row["blocks_per_second"])
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["settings"]["steps"] == 2
    assert "of peak" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_solvers_are_compared_within_their_round(run_bench: RunBench) -> None:
    result, report = run_bench("solvers", "--sessions=1", "--context=8", "--steps=4", "--blocks=2")
    assert result.exit_code == 0, result.output
    rows = report["rows"]
    assert rows[0]["ratio"] == 1.0
    for row in rows:
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
    assert {row["variant"]: (row["evaluations"], row["guided"]) for row in rows} == {
        "plain": (4, 4),
        "half guidance": (4, 2),
        "ab2, half the steps": (2, 2),
        "heun, half the steps": (3, 3),
        "ab2, half the steps, half guidance": (2, 1),
    }


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--context", "3"], "--context: got 3, expected a multiple of the block size, 4"),
        (["--blocks", "1"], "--blocks: got 1, expected 2 or more: the first is warm-up"),
    ],
)
def test_the_engines_stop_when_a_benchmark_fails(run_bench: RunBench, arguments: list[str], problem: str) -> None:
    result, _ = run_bench("engine", *arguments)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == f"Error: {problem}"
    assert not [thread for thread in threading.enumerate() if thread.name == "device"]


def test_a_session_that_joins_is_held_against_the_time_before(run_bench: RunBench) -> None:
    result, report = run_bench("stall", "--sessions=2", "--prompt=64", "--steps=2")
    assert result.exit_code == 0, result.output
    (row,) = report["rows"]
    assert row["ratio"] == pytest.approx(row["during_seconds"] / row["before_seconds"])
    assert row["longest_ratio"] >= row["ratio"] > 0
    assert row["first_block_seconds"] > 0


def test_gaps_count_by_when_they_were() -> None:
    arrivals = [[0.0, 1.0, 2.0, 5.0, 9.0, 10.0], [0.5, 1.5, 3.5, 8.5, 9.5]]
    row = describe(arrivals, joined=2.0, ended=9.0)
    assert row["before_seconds"] == 1.0
    assert row["during_seconds"] == 3.0  # of 3, 4, 2, 5, 1
    assert row["longest_ratio"] == 5.0


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(bench, ["engine", "--model", "nowhere", "--plot", "picture.png"])
    assert result.exit_code == 2
    assert "Error: --plot: needs matplotlib: pip install " in result.output
