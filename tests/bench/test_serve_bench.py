"""`bench serve`, `bench prefix`, `bench load`: what counts, and that what is started is stopped."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from colaserve_bench.commands import bench
from colaserve_bench.report import Column, Report, percentile
from colaserve_bench.savings import Formed, table
from colaserve_bench.serve import ENGINE, summarise, with_ratios
from colaserve_bench.system import Mix, Record, closed_loop, open_loop
from colaserve_client import ServerError
from tests.services.launch.processes import FREE_PORTS, started

INFO: Any = SimpleNamespace(model=SimpleNamespace(vocab_size=8), end_ids=(0, 1), pad_id=2)


class FakeClient:
    """Streams blocks after a pause each; every `fails`-th request fails as a server would."""

    def __init__(self, pause: float, blocks: int = 2, fails: int = 0):
        self.pause, self.blocks, self.fails = pause, blocks, fails
        self.running = self.highest = self.calls = 0

    def stream(self, **request: object) -> "FakeClient":
        return self

    async def __aenter__(self) -> AsyncIterator[SimpleNamespace]:
        self.running, self.calls = self.running + 1, self.calls + 1
        self.highest = max(self.highest, self.running)
        return self._chunks(self.calls)

    async def __aexit__(self, *error: object) -> None:
        self.running -= 1

    async def _chunks(self, number: int) -> AsyncIterator[SimpleNamespace]:
        for _ in range(self.blocks):
            await asyncio.sleep(self.pause)
            if self.fails and number % self.fails == 0:
                raise ServerError("broken") from Failure()
            yield SimpleNamespace(token_ids=(1, 2, 3))


class Failure(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL


def requests() -> Any:
    return Mix((4, 8), (4,)).requests(INFO, "0")


def test_requests_have_lengths_of_the_mix_and_no_special_ids() -> None:
    drawn, again = ([next(source) for _ in range(200)] for source in (requests(), requests()))
    assert {len(request["prompt"]) for request in drawn} == {4, 8}
    assert {i for request in drawn for i in request["prompt"]} == {3, 4, 5, 6, 7}
    assert drawn == again
    assert all(request["ignore_end"] for request in drawn)


async def test_a_closed_loop_keeps_as_many_requests_running_and_cancels_the_last() -> None:
    fake: Any = FakeClient(0.01)
    records = await closed_loop(fake, requests(), 3, time.monotonic() + 0.2)
    assert fake.highest == 3
    assert fake.running == 0
    finished = [record for record in records if record.finished]
    assert len(records) - len(finished) <= 3
    assert all(record.tokens == [3, 3] for record in finished)


async def test_an_open_loop_sends_without_waiting_for_answers() -> None:
    fake: Any = FakeClient(0.3, blocks=1)
    begin = time.monotonic()
    records = await open_loop(fake, requests(), 100.0, begin + 0.2, seed=3)
    assert 8 <= len(records) <= 40
    assert fake.highest > 5
    assert all(begin < record.due < begin + 0.2 and record.finished for record in records)


async def test_failures_are_counted_by_status_and_are_never_good() -> None:
    fake: Any = FakeClient(0.005, blocks=1, fails=2)
    begin = time.monotonic()
    records = await open_loop(fake, requests(), 200.0, begin + 0.1, seed=1)
    row = summarise(records, begin, time.monotonic())
    assert row["errors"] == f"INTERNAL {len(records) // 2}"
    assert [record.is_good(5.0, 5.0) for record in records] == [not record.error for record in records]


def test_throughput_counts_the_answers_that_end_inside_the_window_over_the_window() -> None:
    def answer(*blocks: float, error: str = "") -> Record:
        return Record(0.0, blocks=list(blocks), tokens=[16] * len(blocks), finished=blocks[-1], error=error)

    before, across, inside = answer(8.0, 9.0), answer(9.0, 11.0), answer(12.0, 13.0, 14.0)
    after, failed = answer(19.0, 21.0), answer(15.0, error="INTERNAL")
    unfinished = Record(0.0, blocks=[18.0], tokens=[16])
    row = summarise([before, across, inside, after, failed, unfinished], 10.0, 20.0)
    assert row["requests_per_second"] == pytest.approx(2 / 10)
    assert row["blocks_per_second"] == pytest.approx(5 / 10)
    assert row["tokens_per_second"] == pytest.approx(80 / 10)


def test_a_request_is_good_when_both_its_first_block_and_its_gaps_are() -> None:
    found = [Record(0.0, blocks=blocks) for blocks in ([1.0, 1.5, 2.0], [1.1, 1.5], [1.0, 1.6], [])]
    found.append(Record(0.0, blocks=[1.0], error="INTERNAL"))
    assert [record.is_good(1.0, 0.5) for record in found] == [True, False, False, False, False]


def test_a_table_has_medians_over_rounds_and_marks_what_is_missing() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert [percentile([7.0], 0.99), percentile([], 0.5)] == [7.0, None]
    rounds = [{"n": 1, "round": i, "x": x, "call": "a", "maybe": None} for i, x in enumerate((1.0, 9.0, 2.0))]
    report = Report([Column("n", "number"), Column("maybe", "b", "{:.1f}")], rounds, ("n",), ["why"])
    assert report.rows == [{"n": 1, "x": 2.0, "call": "a", "maybe": None}]
    assert report.text().splitlines() == ["number  b", "     1  -", "* why"]


def test_ratios_are_of_the_same_load_in_the_same_round() -> None:
    rows = [
        {"system": ENGINE, "loop": "closed", "load": 4.0, "blocks_per_second": 10.0},
        {"system": "one", "loop": "closed", "load": 4.0, "blocks_per_second": 9.0},
        {"system": "one", "loop": "open", "load": 4.0, "blocks_per_second": 5.0},
        {"system": "split", "loop": "closed", "load": 4.0, "blocks_per_second": 8.1},
    ]
    rows = [row | {"watched": "no"} for row in rows]
    rows[1]["cpu_ms_per_block"] = 4.0
    rows.append(rows[1] | {"watched": "probes", "cpu_ms_per_block": 5.0})
    *found, watched = [with_ratios(row, rows, "one") for row in rows]
    assert (watched["of_engine"], watched["of_first"], watched["cpu_of_unwatched"]) == (0.9, 1.0, 1.25)
    assert [row["of_engine"] for row in found] == [1.0, 0.9, None, pytest.approx(0.81)]
    assert [row["of_first"] for row in found] == [pytest.approx(10 / 9), 1.0, 1.0, pytest.approx(0.9)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_started_system_is_measured_beside_the_engine_and_then_gone(run_bench: Callable[..., Any]) -> None:
    options = ["--start=up", "--concurrency=2", "--rate=8", "--prompt-tokens=4,8", "--new-tokens=8", "--watched"]
    result, report = run_bench("serve", *options)
    assert result.exit_code == 0, result.output
    engine, closed, previews, _, opened, *_ = report["rows"]
    assert [row["system"] for row in report["rows"]] == [ENGINE, *["one process, 1 threads"] * 6]
    assert previews["watched"] == "previews every 4 steps"
    if sys.platform == "linux":
        assert previews["cpu_of_unwatched"] == pytest.approx(previews["cpu_ms_per_block"] / closed["cpu_ms_per_block"])
    assert closed["errors"] is None
    assert opened["errors"] is None
    assert closed["of_engine"] == pytest.approx(closed["blocks_per_second"] / engine["blocks_per_second"])
    assert closed["tokens_per_second"] == pytest.approx(4 * closed["blocks_per_second"], rel=0.3)
    assert 0 < closed["first_block_p50"] <= closed["first_block_p99"]
    assert opened["requests"] > 0
    assert "key" not in report["settings"]


@pytest.mark.slow
def test_a_running_system_is_measured_by_the_other_verbs(run_bench, tiny_model, tmp_path):
    with started(tmp_path, "up", *FREE_PORTS, model=tiny_model) as running:

        def rows_of(verb: str, *options: str) -> Any:
            result, report = run_bench(verb, f"--target={running.target}", *options)
            assert result.exit_code == 0, result.output
            return report["rows"]

        (row,) = rows_of("prefix", "--prefix-tokens=32")
        assert (row["pairs"], row["ratio"]) == (1, pytest.approx(row["warm_seconds"] / row["cold_seconds"]))
        (row,) = rows_of("fork", "--prefix-latents=32", "--branches=3")
        assert row["ratio"] == pytest.approx(row["fork_seconds"] / (row["prefill_seconds"] + row["together_seconds"]))
        found = rows_of("stable", "--stable-steps=1,2")
        assert [(row["stable_steps"], row["stable_distance"]) for row in found[:2]] == [(1, 0.05), (1, 0.1)]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["serve"], 2, "--target or --start: expected one of them"),
        (["serve", "--target", "localhost:1", "--start", "up"], 2, "--target or --start: expected one of them"),
        (["serve", "--start", "up"], 2, "--model: needed with --start"),
        (["prefix", "--start", "up", "--model", "nothing"], 1, "colaserve up ended with exit code"),
        (["serve", "--target", "127.0.0.1:1"], 1, "127.0.0.1:1: Unavailable: "),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], code: int, problem: str) -> None:
    result = CliRunner().invoke(bench, arguments)
    assert problem in result.output.splitlines()[-1]
    assert result.exit_code == code


def test_an_early_stop_is_counted_where_the_steps_before_it_hardly_moved() -> None:
    first = Formed([0.3, 0.1, 0.1, 0.3], [(1,), (2,), (2,), (3,), (3,)])
    assert [first.stop(1, 0.2), first.stop(2, 0.2), first.stop(3, 0.2), first.stop(1, 0.1)] == [3, 4, 5, 5]
    other = Formed([0.1] * 4, [(5,)] * 5)
    [row] = table([first, other], [1], [0.2])
    assert (row["blocks"], row["saved"], row["final"]) == (2, pytest.approx((2 + 3) / 10), 0.5)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_loading_is_measured_in_processes_of_its_own(run_bench: Callable[..., Any]) -> None:
    result, report = run_bench("load")
    assert result.exit_code == 0, result.output
    *_, row = report["rows"]
    assert row["role"] == "all in one process"
    assert row["parameters_millions"] == pytest.approx(0.320956)
    assert row["read_mib"] == pytest.approx(4 * 0.320956e6 / 2**20, rel=1e-6)
    assert row["peak_mib"] >= row["resident_mib"]
