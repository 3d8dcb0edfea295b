"""`bench engine` and `bench solvers`: what is counted, what is left out, and that a paired run gives every number."""

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from colaserve_bench import solvers, stall
from colaserve_bench.commands import bench
from colaserve_bench.driver import Load, run
from colaserve_bench.flops import LAYER_MATRICES, attention_of_block, product_flops
from colaserve_bench.peak import CALLS, Peak
from colaserve_bench.presets import PRESETS
from colaserve_bench.recorder import StepRecorder
from colaserve_bench.shares import time_shares
from colaserve_bench.stages import Stages
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.flow import SamplerSettings

CPU = torch.device("cpu")


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
    work = attention_of_block(config, past=8, evaluations=2, guided=1, itemsize=2)
    assert work.flops == 4 * inner * 4 * (2 * 12 + 4 + 8)  # twice over the past, once alone, once to commit
    assert work.kv_bytes == 2 * 2 * inner * (2 * 12 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_of_the_peak_is_the_same_product(tiny_model: Path, dtype: torch.dtype) -> None:
    peak = Peak(Checkpoint.open(tiny_model), CPU, dtype)
    x = peak._inputs(4)[0]
    expected = x @ peak._weights[0].T
    available = {name: products for name, prepare in CALLS.items() if (products := peak._prepared(prepare, 4))}
    assert "linear" in available
    for products in available.values():
        torch.testing.assert_close(products[0](x), expected, rtol=2e-2, atol=2e-2)
    assert peak.measure(4, 0.01).gflops > 0
    assert peak.measure(4, 0.01).call in available


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


async def test_a_run_gives_the_steps_of_all_blocks_but_the_first(stages: Stages) -> None:
    sampler = SamplerSettings(steps=3)
    result = await run(stages, Load(2, 8, 3, sampler), seed=0)
    assert 1 <= len(result.steady) <= 24  # 4 blocks of 3 evaluations of each session, of which some are done together
    assert {step.sessions for step in result.steady} <= {1, 2}
    assert result.blocks_per_second > 0
    assert len(result.first_block) == 2
    assert result.seconds >= result.wall


async def test_a_run_can_decode_and_be_profiled(stages: Stages) -> None:
    decoded = await run(stages, Load(2, 8, 3, SamplerSettings(steps=3), decode=True), seed=0)
    assert decoded.wall > decoded.step_seconds  # the decoder's turns are between the prior's
    watched = await run(stages, Load(1, 8, 3, SamplerSettings(steps=3)), seed=1, profile=True)
    assert watched.profiled == 3
    assert watched.shares is not None
    assert watched.shares.products > 0
    assert watched.shares.attention > 0
    assert 0 < watched.shares.outside < 1


def test_time_goes_to_the_outermost_operator_that_has_a_kind() -> None:
    def event(name: str, micros: float, parent: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, key=name, self_cpu_time_total=micros, cpu_parent=parent)

    attention = event("aten::scaled_dot_product_attention", 1e6)
    linear = event("aten::linear", 2e6)
    events = [attention, event("aten::bmm", 3e6, attention), event("aten::copy_", 4e6, attention), linear]
    events += [event("aten::addmm", 5e6, linear), event("aten::mul", 6e6)]
    shares = time_shares(SimpleNamespace(events=lambda: events, key_averages=lambda: events), step_seconds=25.0)
    assert (shares.attention, shares.products, shares.other) == (8.0, 7.0, 10.0)
    assert shares.outside == pytest.approx(0.4)


async def test_errands_run_on_the_device_thread_and_bring_their_errors_back(stages: Stages) -> None:
    def fail() -> None:
        raise UsageError("here")

    assert await stages.errands.run(torch.is_inference_mode_enabled)
    with pytest.raises(UsageError, match="here"):
        await stages.errands.run(fail)


@pytest.mark.parametrize(("load", "message"), [(Load(1, 3, 2), "--context"), (Load(1, 4, 1), "--blocks")])
async def test_an_impossible_load_is_refused(stages: Stages, load: Load, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        await run(stages, load, seed=0)


def test_the_engine_command_writes_every_number_a_table_and_a_picture(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--dtype=float32", "--threads=1", "--sessions=1,2", "--context=8", "--steps=2", "--quick"]
    out, picture = tmp_path / "engine.json", tmp_path / "engine.png"
    result = CliRunner().invoke(
        bench, ["engine", "--model", str(tiny_model), *arguments, "--json", str(out), "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert [row["sessions"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert row["roofline_fraction"] == pytest.approx(row["gflops"] / row["peak_gflops"])
        assert row["attention_gflops"] > 0
        assert row["tokens_per_second"] == pytest.approx(4 * row["blocks_per_second"])
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["settings"]["sampler"]["steps"] == 2
    assert "of peak" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_solvers_are_compared_within_their_round(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--dtype=float32", "--threads=1", "--sessions=1", "--context=8", "--steps=4", "--blocks=2", "--quick"]
    out, picture = tmp_path / "solvers.json", tmp_path / "solvers.png"
    left = ["--json", str(out), "--plot", str(picture)]
    result = CliRunner().invoke(bench, ["solvers", "--model", str(tiny_model), *arguments, *left])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == list(solvers.variants(SamplerSettings()))
    assert rows["plain"]["ratio"] == 1
    evaluations = {name: (row["evaluations"], row["guided"]) for name, row in rows.items()}
    assert evaluations == {
        "plain": (4, 4),
        "half guidance": (4, 2),
        "ab2, half the steps": (2, 2),
        "heun, half the steps": (3, 3),
        "ab2, half the steps, half guidance": (2, 1),
    }


def test_the_stages_stop_when_a_benchmark_fails(tiny_model: Path) -> None:
    result = CliRunner().invoke(bench, ["engine", "--model", str(tiny_model), "--context", "3"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == "Error: --context: got 3, expected a multiple of the block size, 4"
    assert not [thread for thread in threading.enumerate() if thread.name == "device"]


def test_a_session_that_joins_is_held_against_the_time_before(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--dtype=float32", "--threads=1", "--sessions=2", "--prompt=64", "--steps=2", "--quick"]
    out = tmp_path / "stall.json"
    result = CliRunner().invoke(bench, ["stall", "--model", str(tiny_model), *arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ratio"] == pytest.approx(row["during_seconds"] / row["before_seconds"])
    assert row["longest_ratio"] >= row["ratio"] > 0
    assert row["first_block_seconds"] > 0


def test_gaps_count_by_when_they_were() -> None:
    arrivals = [[0.0, 1.0, 2.0, 5.0, 9.0, 10.0], [0.5, 1.5, 3.5, 8.5, 9.5]]
    row = stall._describe(arrivals, joined=2.0, ended=9.0)
    assert row["before_seconds"] == 1.0
    assert row["during_seconds"] == 3.0  # of 3, 4, 2, 5, 1
    assert row["longest_ratio"] == 5.0


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(bench, ["engine", "--model", "nowhere", "--plot", "picture.png"])
    assert result.exit_code == 2
    assert "Error: --plot: needs matplotlib: pip install " in result.output
