"""The verbs with the real client, over gRPC: against a small deterministic server, and against the services."""

import json

import pytest

from colaserve.v1 import types_pb2
from tests.services.launch.processes import FREE_PORTS, started


@pytest.fixture
def colaserve_eval(server, run_eval):
    return lambda *arguments: run_eval([*arguments, "--target", server.target])


def test_settings_go_and_answers_come_over_the_wire(colaserve_eval, write_questions, read_lines, behaviour, tmp_path):
    sampler = ["--steps", 4, "--guidance-scale", 2, "--solver", "ab2"]
    others = ["--temperature", 0.5, "--seed", 7, "--max-new-tokens", 32, "--stop", "fox", "--key", "secret"]
    out = tmp_path / "out"
    result = colaserve_eval("run", write_questions("once", "twice"), "--output", out, *sampler, *others)
    assert result.exit_code == 0, result.stderr
    lines = read_lines(out / "task.jsonl")
    assert [line["finish_reason"] for line in lines] == ["stop"] * 2
    assert lines[0]["usage"].keys() == {"prompt_tokens", "completion_tokens", "blocks", "wasted_blocks", "steps_saved"}
    sent = {request.prompt: request for request in behaviour.requests if hasattr(request, "prompt")}
    assert sent["once"].sampler == types_pb2.Sampler(steps=4, guidance_scale=2, solver=types_pb2.SOLVER_AB2)
    assert sent["once"].sampling == types_pb2.Sampling(temperature=0.5)
    assert (sent["once"].max_new_tokens, list(sent["once"].stop)) == (32, ["fox"])
    assert [sent[prompt].seed for prompt in ("once", "twice")] == [
        types_pb2.NoiseSeed(base_seed=7, sample_id=0),
        types_pb2.NoiseSeed(base_seed=7, sample_id=1),
    ]
    assert {metadata["authorization"] for metadata in behaviour.metadata} == {"Bearer secret"}
    model = json.loads((out / "settings.json").read_text())["model"]
    assert (model["name"], model["space"]) == ("fake", "0123456789abcdef")
    assert model["dtypes"] == {"encoder": "float32", "prior": "float32", "decoder": "float32"}
    assert model["default_sampler"]["steps"] == 16


def test_texts_take_the_round_trip_and_a_server_that_is_not_there_is_one_line(
    colaserve_eval, server, write_questions, tmp_path
):
    texts, file = tmp_path / "texts.txt", write_questions("once")
    texts.write_text("one text\nanother\n")
    figures = json.loads(colaserve_eval("vae", texts, "--json").stdout)
    assert (figures["tokens"], figures["token_accuracy"], figures["bits_per_token"]) == (15, 100.0, 0.5)
    server.stop()
    result = colaserve_eval("run", file, "--output", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_answers_of_the_services_depend_neither_on_concurrency_nor_on_a_break(
    run_eval, write_questions, read_lines, tmp_path
):
    file = write_questions("the fox", "a dog runs", "one", "two words", "the fox")
    options = ["--steps", 4, "--guidance-scale", 3, "--max-new-tokens", 12]
    one = tmp_path / "one" / "task.jsonl"
    with started(tmp_path, "up", *FREE_PORTS) as running:

        def answers(folder, concurrency):
            more = ["--concurrency", concurrency, "--target", running.target]
            assert run_eval(["run", file, "--output", tmp_path / folder, *options, *more]).exit_code == 0
            return [line["generate"] for line in read_lines(tmp_path / folder / "task.jsonl")]

        expected = answers("one", 1)
        assert answers("four", 4) == expected
        kept = one.read_text().splitlines(keepends=True)
        one.write_text(kept[3] + kept[0])
        assert answers("one", 4) == expected
        assert expected[0] != expected[4], "the same prompt with other noise"
