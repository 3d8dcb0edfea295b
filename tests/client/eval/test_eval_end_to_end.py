"""The verbs with the real client, over gRPC: against a small deterministic server."""

import json

import pytest

from colaserve.v1 import types_pb2

STORY = " there was a fox that wrote."  # what the small server writes


@pytest.fixture
def colaserve_eval(server, run_eval):
    def run(verb, *arguments):
        target = ["--target", server.target] if verb in ("run", "sweep", "vae") else []
        return run_eval([verb, *arguments, *target])

    return run


def test_answers_come_over_the_wire_with_their_usage(colaserve_eval, write_questions, read_lines, behaviour, tmp_path):
    file = write_questions("once", "twice")
    options = [
        "--steps",
        4,
        "--guidance-scale",
        2,
        "--solver",
        "ab2",
        "--temperature",
        0.5,
        "--seed",
        7,
        "--stop",
        "fox",
    ]
    result = colaserve_eval("run", file, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    lines = read_lines(tmp_path / "out" / "task.jsonl")
    assert [(line["generate"], line["finish_reason"]) for line in lines] == [(" there was a ", "stop")] * 2
    assert lines[0]["usage"] == {"prompt_tokens": 4, "completion_tokens": 13, "blocks": 4, "wasted_blocks": 0}
    sent = {request.prompt: request for request in behaviour.requests if hasattr(request, "prompt")}
    sampler = types_pb2.Sampler(steps=4, guidance_scale=2, solver=types_pb2.SOLVER_AB2)
    assert sent["once"].sampler == sampler
    assert sent["once"].sampling == types_pb2.Sampling(temperature=0.5)
    assert [sent[prompt].seed for prompt in ("once", "twice")] == [
        types_pb2.NoiseSeed(base_seed=7, sample_id=0),
        types_pb2.NoiseSeed(base_seed=7, sample_id=1),
    ]


def test_settings_of_the_run_name_the_served_model(colaserve_eval, write_questions, tmp_path):
    colaserve_eval("run", write_questions("once"), "--output", tmp_path / "out")
    model = json.loads((tmp_path / "out" / "settings.json").read_text())["model"]
    assert (model["name"], model["space"]) == ("fake", "0123456789abcdef")
    assert model["dtypes"] == {"encoder": "float32", "prior": "float32", "decoder": "float32"}
    assert model["default_sampler"]["steps"] == 16


def test_round_trips_come_over_the_wire(colaserve_eval, tmp_path):
    (tmp_path / "texts.txt").write_text("one text\nanother\n")
    figures = json.loads(colaserve_eval("vae", tmp_path / "texts.txt", "--json").stdout)
    assert (figures["tokens"], figures["token_accuracy"], figures["bits_per_token"]) == (15, 100.0, 0.5)


def test_a_server_that_is_not_there_is_one_line(colaserve_eval, server, write_questions, tmp_path):
    file = write_questions("once")
    server.stop()
    result = colaserve_eval("run", file, "--output", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_score_sweep_and_report_work_together(colaserve_eval, write_questions, tmp_path):
    file, out = write_questions(STORY, "something else"), tmp_path / "out"
    assert colaserve_eval("run", file, "--output", out).exit_code == 0
    assert json.loads(colaserve_eval("score", out, "--json").stdout)["average"] == 50.0
    sweep = ["--guidance", "1,2", "--steps", "2", "--output", out]
    assert colaserve_eval("sweep", file, *sweep).exit_code == 0
    assert colaserve_eval("report", out).exit_code == 0
    assert "# Evaluation of fake" in (out / "report.md").read_text()


def test_a_key_is_sent_and_half_of_a_certificate_is_refused(colaserve_eval, behaviour, write_questions, tmp_path):
    file = write_questions("once")
    assert colaserve_eval("run", file, "--output", tmp_path / "out", "--key", "secret").exit_code == 0
    assert {metadata["authorization"] for metadata in behaviour.metadata} == {"Bearer secret"}
    result = colaserve_eval("run", file, "--output", tmp_path / "out", "--tls-client-cert", file)
    assert "tls: cert and key belong together" in result.stderr
