"""The verbs against the real services with a tiny checkpoint: what they record is what the model does."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest

from colaserve_services.coordinator import Coordinator, CoordinatorLimits, Stages
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.rpc.in_process import InProcessStub
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.server import RpcServer
from colaserve_services.rpc.settings import ServerSettings
from colaserve_services.text import Tokenizer
from tests.services.stages.serving import serving


@pytest.fixture
async def target(tiny) -> AsyncIterator[str]:
    """The address of a coordinator over the stages of a tiny checkpoint."""
    async with serving(tiny, EngineLimits(max_context=256)) as served:
        tokenizer = Tokenizer.open(tiny.directory / "tokenizer.json", served.shape.vocab_size)
        stubs = {name: InProcessStub(served.stages.services[name]) for name in ("encoder", "prior", "decoder")}
        coordinator = Coordinator(Stages(**stubs), tokenizer, limits=CoordinatorLimits(max_context=256))
        await coordinator.connect()
        server = RpcServer(ServerSettings(), Metrics())
        for servicer in (GenerationServicer(coordinator), LatentServicer(coordinator)):
            server.add(servicer)
        port = await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop()


@pytest.fixture
def colaserve_eval(target, run_eval) -> Callable:
    async def run(verb: str, *arguments: object):
        result = await asyncio.to_thread(run_eval, [verb, *arguments, "--target", target])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    return run


async def test_answers_depend_neither_on_concurrency_nor_on_a_break(colaserve_eval, write_questions, tmp_path):
    file = write_questions("the fox", "a dog runs", "one", "two words", "the fox")
    options = ["--steps", 4, "--guidance-scale", 3, "--max-new-tokens", 12]
    outputs = []
    for name, concurrency in (("one", 1), ("four", 4)):
        await colaserve_eval("run", file, "--output", tmp_path / name, "--concurrency", concurrency, *options)
        outputs.append((tmp_path / name / "task.jsonl").read_text())
    kept = outputs[0].splitlines(keepends=True)
    (tmp_path / "one" / "task.jsonl").write_text(kept[3] + kept[0])
    await colaserve_eval("run", file, "--output", tmp_path / "one", *options)
    outputs.append((tmp_path / "one" / "task.jsonl").read_text())
    answers = [[json.loads(line)["generate"] for line in text.splitlines()] for text in outputs]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] != answers[0][4], "the same prompt with other noise"


async def test_the_round_trip_is_measured(colaserve_eval, tmp_path):
    (tmp_path / "texts.txt").write_text("the fox\na dog runs over the hill\n")
    figures = json.loads(await colaserve_eval("vae", tmp_path / "texts.txt", "--json"))
    assert figures["texts"] == 2
    assert figures["tokens"] > 2
    assert 0 <= figures["token_accuracy"] <= 100
    assert figures["bits_per_token"] > 0
