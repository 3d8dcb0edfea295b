"""The verbs with the real client, over gRPC, against a small deterministic server; and right answers against wrong
ones by a likelihood that is known."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from colaserve.v1 import types_pb2
from colaserve_client.settings import Scoring
from colaserve_eval.measures import measure_likelihood
from colaserve_eval.records import EvalError, Record
from tests.client.eval.conftest import read_lines, run_eval


@pytest.fixture
def colaserve_eval(server):
    return lambda *arguments: run_eval([*arguments, "--target", server.target])


def test_settings_go_and_answers_come_over_the_wire(colaserve_eval, write_questions, behaviour, tmp_path):
    sampler = ["--steps", 4, "--guidance-scale", 2, "--solver", "ab2"]
    others = ["--temperature", 0.5, "--seed", 7, "--max-new-tokens", 32, "--stop", "fox", "--key", "secret"]
    out = tmp_path / "out"
    result = colaserve_eval("run", write_questions("once", "twice"), "--output", out, *sampler, *others)
    assert result.code == 0, result.err
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
    figures = colaserve_eval("vae", texts, "--json").json
    assert (figures["tokens"], figures["token_accuracy"], figures["bits_per_token"]) == (15, 100.0, 0.5)
    server.stop()
    result = colaserve_eval("run", file, "--output", tmp_path / "out")
    assert result.code == 3
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


ANSWERS = ("Rome", "Oslo", "Kyiv", "Paris", "Tokyo")


class Knows:
    """A client of a server that finds the answer to its question likelier, but for one question."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def info(self) -> Any:
        return SimpleNamespace(end_ids=(0,))

    async def detokenize(self, ids: list[int]) -> str:
        return "<end>" if ids == [0] else ""

    async def tokenize(self, text: str) -> Any:
        return SimpleNamespace(ids=text)

    async def score(self, text: str, prefix: str, **settings: Any) -> Any:
        assert settings == {"samples": 0, "probes": 2, "steps": None, "solver": None, "seed": 3}
        self.asked.append((text, prefix))
        right = prefix in text and prefix != "Oslo"
        return SimpleNamespace(log_likelihood=2.0 if right else 1.0, standard_error=0.5)


async def test_figures_are_those_of_the_scores() -> None:
    done: list[int] = []
    client, questions = Knows(), [Record(id=n, prompt=name, ground_truth=name) for n, name in enumerate(ANSWERS)]
    alone = Record(id=5, prompt="Where?", ground_truth="Zanzibar")
    scoring = Scoring(samples=0, probes=2)
    asked = partial(measure_likelihood, client, scoring=scoring, seed=3, concurrency=2, shown=done.append)  # type: ignore[arg-type]
    found = await asked([*questions, alone], [*ANSWERS, "Zanzibar"])
    figures = {"auc": 0.9, "paired": 0.8, "right": 1.8, "wrong": 1.0, "standard_error": 0.5}
    assert found == {"questions": 5, "left_out": ["Zanzibar"], **figures}
    assert sum(done) == 2 * 6
    for text, prefix in client.asked:
        assert text.endswith("<end>")
        assert len(text.strip()) == len(f"{prefix}<end>"), "as many tokens"
    assert (await asked(questions[:1], ANSWERS))["questions"] == 1, "others of the file are partners, too"
    with pytest.raises(EvalError, match="no two answers have as many tokens: 'Zanzibar'"):
        await asked([alone], [*ANSWERS, "Zanzibar"])
