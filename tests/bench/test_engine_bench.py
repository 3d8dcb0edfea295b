"""`bench engine`, `solvers` and `stall`: what is counted, what is left out, and that a run gives every number."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colaserve_bench.engine import describe
from colaserve_bench.engines import CALLS, Engines, Peak, StepRecorder, product_flops
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint

CPU = torch.device("cpu")
RunBench = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_of_the_peak_is_the_same_product(tiny_model: Path, dtype: torch.dtype) -> None:
    peak = Peak(Checkpoint.open(tiny_model), CPU, dtype)
    config = Checkpoint.open(tiny_model).dit_config
    assert product_flops(config, rows=5) == 2 * 5 * sum(weight.numel() for weight in peak.weights)
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
        recorder.load(2, 0, 0)
        recorder.block(0.0, first=False)
        recorder.stepped(1.0, rows, 2)
    recorder.load(1, 0, 0)
    recorder.stepped(1.0, 10, 1)
    assert [step.rows for step in recorder.steady] == [8, 9]


async def test_calls_run_on_the_device_thread_and_raise_their_errors(engines: Engines) -> None:
    def fail() -> None:
        raise UsageError("here")

    assert await engines.device_calls.run(torch.is_inference_mode_enabled)
    with pytest.raises(UsageError, match="here"):
        await engines.device_calls.run(fail)


def test_the_engine_command_writes_every_number_and_a_table(run_bench: RunBench) -> None:
    result, report = run_bench("engine", "--sessions=1,2", "--context=8", "--steps=2")
    assert result.exit_code == 0, result.output
    assert [row["sessions"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert row["roofline_fraction"] == pytest.approx(row["gflops"] / row["peak_gflops"])
        assert row["tokens_per_second"] == pytest.approx(4 * row["blocks_per_second"])
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["settings"]["steps"] == 2
    assert "of peak" in result.output


def test_solvers_are_compared_within_their_round(run_bench: RunBench) -> None:
    result, report = run_bench("solvers", "--sessions=1", "--context=8", "--steps=4", "--blocks=2")
    assert result.exit_code == 0, result.output
    rows = report["rows"]
    assert rows[0]["ratio"] == 1.0
    for row in rows:
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
    assert {row["variant"]: (row["evaluations"], row["guided"]) for row in rows} == {
        "plain": (4, 4),
        "previews every 4 steps": (4, 4),
        "probes": (4, 4),
        "half of each block given": (4, 4),
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
