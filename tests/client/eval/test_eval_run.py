"""`eval run`: every question asked once, whatever happens in between."""

import asyncio
import json

import pytest

from colaserve_client.settings import GenerationRequest, Sampler
from colaserve_eval.records import EvalError, Record, RunFolder, Task
from colaserve_eval.runner import run_tasks, work_through
from tests.client.eval.conftest import FakeClient, read_lines

NAMES = [f"name {number}" for number in range(12)]


@pytest.fixture
def run(colaserve_eval, write_questions, tmp_path):
    """Asks NAMES into tmp_path/out, with more options."""
    file = write_questions(*NAMES)
    return lambda *options: colaserve_eval("run", file, "--output", tmp_path / "out", *options)


def test_outputs_hold_question_answer_usage_and_reason_in_the_order_of_the_questions(
    colaserve_eval, write_questions, tmp_path
):
    out = tmp_path / "out"
    file = write_questions(*NAMES, choices=["name 0", "other"])
    result = colaserve_eval("run", file, "--output", out)
    assert result.code == 0, result.err
    lines = read_lines(out / "task.jsonl")
    assert [line["id"] for line in lines] == list(range(12))
    assert lines[3] == {
        "id": 3,
        "prompt": "name 3",
        "ground_truth": "name 3",
        "choices": ["name 0", "other"],
        "generate": " NAME 3\nmore",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "blocks": 2, "wasted_blocks": 1, "steps_saved": 0},
        "error": None,
    }


@pytest.mark.parametrize("concurrency", [1, 4])
def test_as_many_questions_are_in_flight_as_allowed_and_none_is_asked_twice(client, run, concurrency):
    assert run("--concurrency", concurrency).out == run().out
    assert client.most_in_flight == concurrency
    assert sorted(client.prompts) == sorted(NAMES)


def test_failed_answers_are_written_with_their_error_and_asked_again(client, run, tmp_path):
    client.down_for = {"name 2"}
    result = run()
    assert result.code == 1
    assert "1 answers failed" in result.err
    assert read_lines(tmp_path / "out" / "task.jsonl")[2]["error"] == "Unavailable: the prior is down"
    client.down_for = set()
    assert run().code == 0
    assert sorted(client.prompts) == sorted([*NAMES, "name 2"])
    assert [line["error"] for line in read_lines(tmp_path / "out" / "task.jsonl")] == [None] * 12


def test_an_overloaded_server_is_waited_for(client, run, tmp_path):
    client.overloaded_times = 30
    assert run().code == 0
    assert len(client.asked) == 42
    assert [line["error"] for line in read_lines(tmp_path / "out" / "task.jsonl")] == [None] * 12


@pytest.fixture
async def ask(tmp_path):
    """Asks a task's questions, one for each name, into tmp_path."""

    async def run(client, names, **limits):
        task = Task("task", [Record(name, name, name) for name in names])
        with RunFolder.opened(tmp_path, {}, [task]) as folder:
            await run_tasks(client, GenerationRequest("", sampler=Sampler(), seed=0), folder, **limits)

    return run


async def test_patience_with_an_overloaded_server_ends(client, ask, tmp_path):
    client.overloaded_times = 10**6
    await ask(client, ["a"], patience=0.03)
    assert read_lines(tmp_path / "task.jsonl")[0]["error"] == "Overloaded: busy"
    assert len(client.asked) in (4, 5)


async def test_a_run_gives_up_after_many_failures_in_a_row_and_keeps_what_it_has(client, ask, tmp_path):
    client.down_for = set(NAMES[::2])
    await ask(client, NAMES, concurrency=1, failures=2)
    assert client.prompts == NAMES, "failures between answers do not end a run"
    client.asked.clear()
    client.down_for = set(NAMES)
    with pytest.raises(EvalError, match="3 answers in a row failed"):
        await ask(client, NAMES, concurrency=1, failures=3)
    assert client.prompts == NAMES[:6:2]
    assert len([line for line in read_lines(tmp_path / "task.jsonl") if line["error"] is None]) == 6


async def test_the_first_failure_cancels_the_rest_and_is_raised():
    ended = []

    async def work(item: int) -> None:
        try:
            await asyncio.sleep(0.001 if item == 0 else 60)
            raise ValueError("first")
        finally:
            ended.append(item)

    with pytest.raises(ValueError, match="first"):
        await asyncio.wait_for(work_through(range(9), work, 3), timeout=5)
    assert sorted(ended) == [0, 1, 2]


async def test_a_cancelled_run_continues_with_the_questions_that_are_left(ask, tmp_path):
    asked = asyncio.Event()

    def answer(prompt: str, sampler: Sampler) -> str:
        if prompt == NAMES[5]:
            asked.set()
        return prompt

    client = FakeClient(answer)
    run = asyncio.create_task(ask(client, NAMES, concurrency=2))
    await asked.wait()
    as_it_runs = {line["id"] for line in read_lines(tmp_path / "task.jsonl")}  # what is left of a killed process
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert client.in_flight == 0
    kept = [line["id"] for line in read_lines(tmp_path / "task.jsonl")]
    assert as_it_runs <= set(kept)
    assert len(as_it_runs) >= 3
    assert 4 <= len(kept) < 12
    client.asked.clear()
    await ask(client, NAMES)
    assert sorted(client.prompts + kept) == sorted(NAMES)
    assert [line["id"] for line in read_lines(tmp_path / "task.jsonl")] == NAMES


def test_a_torn_last_line_is_dropped_and_asked_again(client, run, tmp_path):
    run()
    file = tmp_path / "out" / "task.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    client.asked.clear()
    assert run().code == 0
    assert client.prompts == [NAMES[-1]]
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--steps", 8], "generation.sampler.steps: the folder has None, this run asks for 8"),
        (["--stop", "."], "generation.stop: the folder has [], this run asks for ['.']"),
        (["--seed", 1], "generation.seed: the folder has 0, this run asks for 1"),
        (["--limit", 3], "task task was begun with other questions"),
        ([], "model.default_sampler.steps: the folder has 16, this run asks for 8; model.name: the folder has 'tiny'"),
    ],
)
def test_going_on_with_other_settings_is_refused_naming_them(client, run, arguments, difference):
    run()
    client.name = "other" if not arguments else client.name
    client.steps = 16 if arguments else 8
    result = run(*arguments)
    assert result.code == 1
    assert difference in result.err
    assert len(client.prompts) == 12


def test_another_task_may_join_a_folder_whose_first_one_is_unfinished(colaserve_eval, write_questions, tmp_path):
    out = tmp_path / "out"
    colaserve_eval("run", write_questions("a", name="one"), "--output", out)
    (out / "one.jsonl").unlink()
    assert colaserve_eval("run", write_questions("b", name="two"), "--output", out).code == 0
    assert sorted(json.loads((out / "settings.json").read_text())["tasks"]) == ["one", "two"]


def test_a_folder_of_unknown_outputs_or_of_another_run_is_left_alone(client, colaserve_eval, write_questions, tmp_path):
    file, out = write_questions("a"), tmp_path / "out"
    assert "holds .jsonl files but no settings.json" in colaserve_eval("run", file, "--output", tmp_path).err
    with RunFolder.opened(out, {}, []):
        assert "another run is writing to this folder" in colaserve_eval("run", file, "--output", out).err
    assert client.asked == []
