"""Batches: a line in, a line out; what was answered stays, what failed is tried again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.client.behaviour import Behaviour, Failure
from tests.client.cli.conftest import Ran, Run
from tests.client.fakes import STORY


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(path: Path, lines: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch(run: Run, files: tuple[Path, Path], *more: str) -> Ran:
    return run("generate", "--input", files[0], "--output", files[1], *more)


def test_answers_come_in_order_with_their_ids(run: Run, files: tuple[Path, Path]) -> None:
    write(files[0], [{"id": f"q{n}", "prompt": "a", "max_new_tokens": n + 1} for n in range(9)])
    assert batch(run, files, "--concurrency", "3").code == 0
    answers = read(files[1])
    assert [answer["id"] for answer in answers] == [f"q{n}" for n in range(9)]
    assert [answer["text"] for answer in answers] == [STORY[: n + 1].decode() for n in range(9)]
    assert answers[0]["usage"]["completion_tokens"] == 1


def test_lines_override_the_options(run: Run, files: tuple[Path, Path], behaviour: Behaviour) -> None:
    write(
        files[0], [{"prompt": "a"}, {"prompt": [1, 2], "steps": 2, "temperature": 0.5, "seed": 3, "sampling_seed": 4}]
    )
    assert batch(run, files, "--steps", "8", "--top-k", "5", "--seed", "1", "--concurrency", "1").code == 0
    first, second = behaviour.requests
    assert (first.sampler.steps, first.sampling.top_k, first.seed.base_seed) == (8, 5, 1)
    assert (second.sampler.steps, second.sampling.top_k, second.seed.base_seed) == (2, 5, 3)
    assert (second.sampling.temperature, second.sampling.seed, list(second.prompt_ids.ids)) == (0.5, 4, [1, 2])
    assert [answer["id"] for answer in read(files[1])] == [1, 2]


def test_without_output_the_answers_are_printed(run: Run, files: tuple[Path, Path]) -> None:
    write(files[0], [{"prompt": "a"}])
    assert run("generate", "--input", files[0]).json["text"] == STORY.decode()
    assert run("generate", "--input", "-", stdin='{"prompt": "a"}\n').json["id"] == 1


def test_failures_are_lines_too_and_tried_again(run: Run, files: tuple[Path, Path], behaviour: Behaviour) -> None:
    write(files[0], [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}, {"id": 3, "prompt": "c"}])
    behaviour.failures.append(Failure(grpc.StatusCode.INTERNAL, "it broke"))
    done = batch(run, files, "--concurrency", "1")
    assert (done.code, "1 of 3 failed" in done.err) == (1, True)
    assert read(files[1])[0]["error"] == {"type": "ServerError", "message": "it broke"}
    assert batch(run, files, "--resume").code == 0
    assert sorted(answer["id"] for answer in read(files[1])) == [1, 2, 3]
    assert behaviour.calls == 4
    assert batch(run, files, "--resume").code == 0
    assert behaviour.calls == 4


def test_a_line_that_was_cut_off_is_asked_again(run: Run, files: tuple[Path, Path], behaviour: Behaviour) -> None:
    write(files[0], [{"prompt": "a"}, {"prompt": "b"}])
    assert batch(run, files).code == 0
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-20] + "日".encode()[:1])
    assert batch(run, files, "--resume").code == 0
    assert len(read(files[1])) == 2
    assert behaviour.calls == 3


def test_a_server_that_is_gone_ends_the_batch_and_keeps_what_was_done(run, files, behaviour):
    write(files[0], [{"prompt": "a", "max_new_tokens": 4}, {"prompt": "b"}, {"prompt": "c"}])
    behaviour.fail_after = {1: Failure(grpc.StatusCode.UNAVAILABLE, "gone")}  # the first has one block, so it is done
    done = batch(run, files, "--concurrency", "1")
    assert (done.code, "gone" in done.err) == (3, True)
    assert [answer["id"] for answer in read(files[1])] == [1]
    behaviour.fail_after = {}
    assert batch(run, files, "--resume").code == 0
    assert [answer["id"] for answer in read(files[1])] == [1, 2, 3]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["no json"], "in.jsonl:1: not JSON"),
        ([[1, 2]], "in.jsonl:1: expected a JSON object, got list"),
        ([{"prompt": "a"}, {"text": "b"}], "in.jsonl:2: expected an object"),
        ([{"prompt": "a", "max_tokens": 3}], "unknown field 'max_tokens'"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], "in.jsonl:2: the id 1 appears twice"),
        ([{"prompt": "a", "id": [1]}], "id: expected a text or a whole number"),
        ([{"prompt": "a", "id": True}], "id: expected a text or a whole number"),
        ([{"prompt": [1.5]}], "in.jsonl:1: prompt: expected a text or a list of token ids"),
        (['{"prompt": "a"}', '{"prompt": "\udcff"}'], "in.jsonl:2: byte 0xff is not UTF-8"),
        ([{"prompt": "a", "sample_id": 3}], "in.jsonl:1: sample_id tells samples of one seed apart"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_asked(run, files, behaviour, lines, complaint):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    files[0].write_text(text, encoding="utf-8", errors="surrogateescape")
    done = batch(run, files)
    assert (done.code, behaviour.calls) == (2, 0)
    assert complaint in done.err


def test_nothing_is_overwritten_and_nothing_is_mixed_up(run: Run, files: tuple[Path, Path]) -> None:
    write(files[0], [{"prompt": "a"}])
    assert batch(run, files).code == 0
    assert "--resume" in batch(run, files).err
    write(files[0], [{"prompt": "a", "id": "other"}])
    assert "answers to ids that --input lacks" in batch(run, files, "--resume").err
    files[1].write_text("my diary\n")
    assert "right file" in batch(run, files, "--resume").err
    assert files[1].read_text() == "my diary\n"
    assert run("generate", "--input", files[0], "--resume").code == 2
    assert "are both" in run("generate", "--input", files[0], "--output", files[0], "--resume").err


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": "end"},
        {"stop": 5},
        {"max_new_tokens": True},
        {"ignore_end": 1},
        {"temperature": False},
        {"solver": ["euler"]},
        {"seed": "x"},
    ],
)
def test_a_wrong_value_fails_its_own_line_only(run: Run, files: tuple[Path, Path], wrong: dict[str, Any]) -> None:
    write(files[0], [{"prompt": "a"}, {"prompt": "b", **wrong}, {"prompt": "c"}])
    assert batch(run, files).code == 1
    assert [answer.get("error", {}).get("type") for answer in read(files[1])] == [None, "InvalidRequest", None]


def test_a_seed_of_null_is_drawn(run: Run, files: tuple[Path, Path], behaviour: Behaviour) -> None:
    write(files[0], [{"prompt": "a", "seed": None}, {"prompt": "b", "seed": 4, "sample_id": None}])
    assert batch(run, files, "--concurrency", "1").code == 0
    assert [request.HasField("seed") for request in behaviour.requests] == [False, True]
