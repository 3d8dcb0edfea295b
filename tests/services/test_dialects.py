"""Every dialect before real engines: the same prompt and seed say the same, and who leaves ends the work at once."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve.v1.latent_service_pb2 import SampleLatentsRequest
from colaserve_services.bounds import FINISH_REASONS
from colaserve_services.gateway.backend import coordinator_stub
from colaserve_services.gateway.dialects import DIALECTS
from colaserve_services.gateway.dialects.logprobs import positions_of
from tests.conftest import load_golden
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import BUDGET, CHAT, COMPLETIONS, asking, outcome, running
from tests.services.inference.asking import asked, outputs, streaming, text
from tests.services.systems import System, ids_of, system, text_of
from tests.waiting import PATIENCE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "He looked at the river and then he said"
INFER, FORK, SAMPLE, INFILL = "/v2/models/generate/infer", *map("/v1/latents/{}".format, ("fork", "sample", "infill"))


@dataclass
class Served:
    """The gateway, by its client, and what is behind it."""

    http: httpx.AsyncClient
    it: System

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response

    def calls(self) -> float:
        """Those that the stages serve."""
        found = self.it.stages.metrics.registry.collect()
        return sum(s.value for one in found if one.name == "colaserve_requests_in_progress" for s in one.samples)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Served]:
    async with system(load_golden("tiny_b4"), split=True) as it:
        stub = coordinator_stub(it.generation, it.latents, it.inference)
        async with running(FakeGeneration(), stub=stub) as gateway:
            yield Served(gateway.http, it)


def spoken(path: str, tokens: int, **settings: Any) -> dict[str, Any]:
    return asking(path, PROMPT, model=None, seed=4, **{BUDGET[path]: tokens}, **settings)


def tensors(**parameters: Any) -> dict[str, Any]:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}
    return {"inputs": [tensor], "parameters": parameters}


@pytest.mark.parametrize(("tokens", "reason"), [(60, "stop"), (9, "length")])
async def test_the_same_prompt_and_seed_say_the_same_in_every_dialect(served: Served, tokens: int, reason: str):
    sampling, sampler = {"temperature": 5.0, "top_k": 0, "top_p": 1.0}, {"steps": 4}
    whole = {"seed": {"base_seed": 4}, "max_new_tokens": tokens, "sampling": sampling, "sampler": sampler}
    flat = {"seed": 4, "max_new_tokens": tokens, **sampling, **sampler}
    wanted = await served.it.generate(prompt=PROMPT, top_logprobs=0, **whole)
    ids, said, used = ids_of(wanted), text_of(wanted), wanted[-1].usage
    usage = [used.prompt_tokens, used.completion_tokens]
    assert FINISH_REASONS[wanted[-1].finish_reason] == reason

    assert BUDGET.keys() == {dialect.path for dialect in DIALECTS}
    names = [one["token"] for message in wanted for one in positions_of(message)]
    for path in BUDGET:
        logprobs = {COMPLETIONS: {"logprobs": 0}, CHAT: {"logprobs": True}}.get(path, {})
        answer = (await served.post(path, spoken(path, tokens, **sampling, **sampler, **logprobs))).json()
        assert outcome(path, answer) == (said if path == COMPLETIONS else said.removeprefix(" "), reason, usage)
        if logprobs:
            found = answer["choices"][0]["logprobs"]
            assert (found.get("tokens") or [one["token"] for one in found["content"]]) == names

    answer = await served.it.inference.ModelInfer(asked("generate", text(PROMPT), **flat))
    whole_answer = (await served.post(INFER, tensors(**flat))).json()
    by_name = {one["name"]: one["data"] for one in whole_answer["outputs"]}
    for found, counts in (
        (outputs(answer), {name: value.int64_param for name, value in answer.parameters.items()}),
        ({"token_ids": by_name["token_ids"], **{name: by_name[name][0] for name in ("text_output", "finish_reason")}},
         whole_answer["parameters"]),
    ):  # fmt: skip
        assert (found["text_output"], list(found["token_ids"]), found["finish_reason"]) == (said, ids, reason)
        assert [counts["prompt_tokens"], counts["completion_tokens"]] == usage

    streamed = (await served.post(FORK, {"text": PROMPT, "branches": [{}], **whole, "seed": 4})).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(event.get("text", "") for event in events) == said
    assert [id_ for event in events for id_ in event.get("token_ids", ())] == ids
    assert events[-1]["finish_reason"] == reason
    assert [events[-1]["usage"][name] for name in ("prompt_tokens", "completion_tokens")] == usage


LONG = {"max_new_tokens": 200, "steps": 50, "ignore_end": True}
MANY = {"seed": 3, "sampler": {"steps": 50}}
BODIES = {
    **{f"{path} {stream}": (path, spoken(path, 200, steps=50, ignore_eos=True, stream=stream))
       for path in BUDGET for stream in (False, True)},
    **{path: (path, body) for path, body in {
        INFER: tensors(**LONG),
        FORK: {"text": PROMPT, "branches": [{}, {}], "max_new_tokens": 200, "ignore_end": True, **MANY},
        SAMPLE: {"max_blocks": 40, **MANY},
        INFILL: {"segments": [{"text": PROMPT}, {"token_count": 150}], **MANY},
    }.items()},
}  # fmt: skip
CALLS: dict[str, Callable[[System], Any]] = {
    "Generate": lambda it: it.generation.Generate(GenerateRequest(
        prompt=PROMPT, max_new_tokens=200, sampler={"steps": 50}, ignore_end=True
    )),
    "SampleLatents": lambda it: it.latents.SampleLatents(SampleLatentsRequest(max_blocks=40, sampler={"steps": 50})),
    "ModelInfer": lambda it: it.inference.ModelInfer(asked("generate", text(PROMPT), **LONG)),
    "ModelStreamInfer": lambda it: it.inference.ModelStreamInfer(
        iter([asked("generate", text(PROMPT), streaming(), **LONG)])
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", [*BODIES, *CALLS])
async def test_a_client_that_leaves_during_a_step_lets_at_most_one_more_run(served, way, monkeypatch):
    engine, left, steps = served.it.stages.stages.engines["prior"], threading.Event(), list[int]()

    def stepped(seconds: float, rows: int, sessions: int) -> None:
        steps.append(sessions)
        if len(steps) == 3:
            left.wait(PATIENCE)

    monkeypatch.setattr(engine.observer, "stepped", stepped)
    if way in CALLS:
        call = CALLS[way](served.it)
    else:
        path, body = BODIES[way]
        call = asyncio.create_task(served.http.post(path, json=body))
    await eventually(lambda: len(steps) == 3)
    assert served.calls() > 0
    call.cancel()
    await eventually(lambda: served.calls() == 0)
    left.set()
    await eventually(lambda: not any(served.it.stages.kv_bytes(stage) for stage in ("encoder", "prior", "decoder")))
    assert len(steps) <= 4
    assert not served.it.coordinator.services.admission.running


async def test_a_guided_choice_is_the_same_over_grpc_and_http(served: Served):
    texts = [" Rome", " Paris", " Addis Ababa"]
    *_, last = await served.it.generate(prompt=PROMPT, choices=texts, seed={"base_seed": 4})
    values = [{"text": each.text, "tokens": each.token_count, "logprob": each.logprob} for each in last.choices]
    body = spoken(COMPLETIONS, 40, guided_choice=texts, temperature=0)
    [choice] = (await served.post(COMPLETIONS, body)).json()["choices"]
    best = max(values, key=lambda each: each["logprob"])["text"]
    assert (choice["text"], choice["finish_reason"]) == (last.text, "stop") == (best, "stop")
    for one, other in zip(values, choice["guided_choice"], strict=True):
        assert other == one | {"logprob": pytest.approx(one["logprob"], abs=1e-4)}
    chat = spoken(CHAT, 40, guided_choice=["Rome.", "Paris."])
    [choice] = (await served.post(CHAT, chat)).json()["choices"]
    assert choice["message"]["content"] == max(choice["guided_choice"], key=lambda each: each["logprob"])["text"]
    streamed = (await served.post(CHAT, chat | {"stream": True})).text
    *_, end = (json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {"))
    assert end["choices"][0]["finish_reason"] == "stop"
    assert [each["text"] for each in end["choices"][0]["guided_choice"]] == chat["guided_choice"]
    for fields, said in (
        ({"stop": "."}, "stop: "),
        ({"temperature": 1}, "temperature: "),
        ({"n": 2}, "n: "),
        ({"guided_choice": ["a"]}, "guided_choice: got 1 items, expected 2 or more"),
        ({"guided_choice": ["a", "b", "a"]}, "guided_choice[2]: "),
    ):
        refused = await served.http.post(COMPLETIONS, json=body | fields)
        assert (refused.status_code, refused.json()["error"]["message"].startswith(said)) == (400, True), refused.text


@pytest.mark.timeout(300)
async def test_litellm_unmodified_completes_streams_and_is_refused(served: Served):
    """In a process of its own: importing litellm changes settings of the whole process."""
    [model] = (await served.http.get("/v1/models")).json()["data"]
    script = Path(__file__).with_name("gateway") / "use_litellm.py"
    words = [sys.executable, script, str(served.http.base_url).rstrip("/"), model["id"]]
    done = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = await done.communicate()
    assert done.returncode == 0, said.decode()
