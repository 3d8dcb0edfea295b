"""The gateway in front of a real coordinator and real stages, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve.v1.generation_pb2_grpc import GenerationServiceStub
from tests.services.gateway.running_gateway import CHAT, COMPLETIONS
from tests.services.launch.processes import FREE_PORTS, started


@dataclass(frozen=True)
class Served:
    """Where a running colaserve is reached."""

    http: httpx.Client
    stub: GenerationServiceStub

    def generate(self, prompt: str, tokens: int, sample: int) -> str:
        seed = types_pb2.NoiseSeed(base_seed=3, sample_id=sample)
        request = GenerateRequest(prompt=prompt, max_new_tokens=tokens, seed=seed)
        return "".join(response.text for response in self.stub.Generate(request, timeout=60))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`up` on a golden checkpoint."""
    with (
        started(tmp_path_factory.mktemp("served"), "up", "--threads=1", *FREE_PORTS) as up,
        httpx.Client(base_url=up.http, timeout=60) as http,
        grpc.insecure_channel(up.target) as channel,
    ):
        yield Served(http, GenerationServiceStub(channel))


def test_choices_are_the_samples_that_grpc_gives(served: Served):
    body = {"prompt": "Question: What is the capital of France? Answer:", "max_tokens": 13, "seed": 3, "n": 2}
    answer = served.http.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == [
        served.generate(body["prompt"], 13, sample) for sample in (0, 1)
    ]
    assert answer["usage"]["completion_tokens"] == 26


def test_a_hole_is_written_between_two_texts(served: Served):
    body = {"prompt": "He looked at", "suffix": " and went home.", "max_tokens": 6, "seed": 3}
    answers = [served.http.post("/v1/completions", json=body).json() for _ in range(2)]
    assert answers[0]["usage"]["completion_tokens"] == 6
    assert answers[0]["choices"] == answers[1]["choices"]


def test_an_echoed_prompt_is_scored_as_latents_of_it_are(served: Served):
    body = {"prompt": "He looked at", "echo": True, "logprobs": 1, "max_tokens": 0}
    scored = served.http.post(COMPLETIONS, json=body).json()["choices"][0]
    assert scored["text"] == "He looked at"
    ids = served.http.post("/tokenize", json={"prompt": "He looked at"}).json()["tokens"]
    assert len(scored["logprobs"]["token_logprobs"]) == len(ids)
    assert all(logprob <= 0 for logprob in scored["logprobs"]["token_logprobs"])
    more = served.http.post(COMPLETIONS, json=body | {"prompt": ids, "max_tokens": 2}).json()["choices"][0]
    assert more["logprobs"]["token_logprobs"][:-2] == scored["logprobs"]["token_logprobs"]


def test_what_can_never_fit_is_refused_with_both_numbers(served: Served):
    response = served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 100_000})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "max_tokens")
    assert "100000" in error["message"]
    assert "8192" in error["message"]


def test_token_ids_say_the_same_as_their_text(served: Served):
    ids = served.http.post("/tokenize", json={"prompt": "He looked at"}).json()["tokens"]
    assert served.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "He looked at"}
    bodies = [{"prompt": prompt, "seed": 3, "max_tokens": 9} for prompt in ("He looked at", ids, [ids])]
    answers = [served.http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]
    assert len(set(answers)) == 1
    assert served.http.get("/ready").json() == {"status": "ok"}


@pytest.mark.timeout(300)
def test_litellm_unmodified_completes_streams_and_is_refused(served: Served):
    """In a process of its own: importing litellm changes settings of the whole process."""
    script = Path(__file__).with_name("use_litellm.py")
    model = served.http.get("/v1/models").json()["data"][0]["id"]
    done = subprocess.run(
        [sys.executable, script, str(served.http.base_url).rstrip("/"), model],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_guided_choice_is_the_same_over_grpc_and_http(served: Served) -> None:
    prompt, texts = "The capital of France is", [" Rome", " Paris", " Addis Ababa"]
    seed = types_pb2.NoiseSeed(base_seed=3)
    *_, last = served.stub.Generate(GenerateRequest(prompt=prompt, choices=texts, seed=seed), timeout=60)
    values = [{"text": each.text, "tokens": each.token_count, "logprob": each.logprob} for each in last.choices]
    body = {"prompt": prompt, "guided_choice": texts, "seed": 3, "max_tokens": 40, "temperature": 0}
    [choice] = served.http.post(COMPLETIONS, json=body).json()["choices"]
    best = max(values, key=lambda each: each["logprob"])["text"]
    assert (choice["text"], choice["finish_reason"]) == (last.text, "stop") == (best, "stop")
    assert [each["text"] for each in choice["guided_choice"]] == texts
    for one, other in zip(values, choice["guided_choice"], strict=True):
        assert other == one | {"logprob": pytest.approx(one["logprob"], abs=1e-4)}
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "seed": 3}
    chat["guided_choice"] = ["Rome.", "Paris."]
    [choice] = served.http.post(CHAT, json=chat).json()["choices"]
    assert choice["message"]["content"] == max(choice["guided_choice"], key=lambda each: each["logprob"])["text"]
    assert [each["text"] for each in choice["guided_choice"]] == chat["guided_choice"]
    streamed = served.http.post(CHAT, json=chat | {"stream": True}).text
    *_, end = (json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {"))
    assert end["choices"][0]["finish_reason"] == "stop"
    assert [each["text"] for each in end["choices"][0]["guided_choice"]] == chat["guided_choice"]
    for fields in ({"stop": "."}, {"temperature": 1}, {"n": 2}, {"guided_choice": ["a"]}):
        refused = served.http.post(COMPLETIONS, json=body | fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, *fields)
    assert refused.json()["error"]["message"] == "guided_choice: got 1 items, expected 2 or more"
    same = served.http.post(COMPLETIONS, json=body | {"guided_choice": ["a", "b", "a"]}).json()["error"]
    assert same["param"] == "guided_choice[2]"
