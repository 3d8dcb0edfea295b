import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from colaserve.v1 import generation_pb2, latent_service_pb2, types_pb2
from colaserve_services.coordinator import Coordinator, CoordinatorLimits, Defaults, Stages
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.coordinator.stages import Local
from colaserve_services.errors import CheckpointError, ModelMismatch, Unavailable, UsageError
from colaserve_services.rpc.local import LocalStub
from colaserve_services.text import SpecialIds, Tokenizer
from tests.services.coordinator.stage_fakes import FakeDecoder, FakeEncoder, FakePrior
from tests.waiting import eventually

CONTEXT: Any = SimpleNamespace(invocation_metadata=tuple, time_remaining=lambda: None, peer=str)


def fakes() -> dict[str, Any]:
    return {"encoder": FakeEncoder(), "prior": FakePrior(), "decoder": FakeDecoder()}


def over(stages: dict[str, Any], tokenizer: Tokenizer, **limits: Any) -> Coordinator:
    stubs = {name: LocalStub(fake) for name, fake in stages.items()}
    return Coordinator(
        Stages(**stubs, targets={"prior": "prior.test:1"}), tokenizer, limits=CoordinatorLimits(**limits)
    )


class Starting:
    """Makes a fake's GetInfo fail until it is ready."""

    def __init__(self, fake: Any, code: StatusCode = StatusCode.UNAVAILABLE):
        self.up, self._answer, self._code = False, fake.GetInfo, code
        fake.GetInfo = self.answer

    async def answer(self, request: Any, context: Any) -> Any:
        if not self.up:
            await context.abort(self._code, "not yet")
        return await self._answer(request, context)


class Silent:
    """A stub that never answers."""

    async def GetInfo(self, request: Any, **options: Any) -> Any:
        raise AioRpcError(StatusCode.DEADLINE_EXCEEDED, Metadata(), Metadata())


class Looked:
    """Counts the looks at a fake."""

    def __init__(self, fake: Any):
        self.looks, self._answer = 0, fake.GetInfo
        fake.GetInfo = self.answer

    async def answer(self, request: Any, context: Any) -> Any:
        self.looks += 1
        return await self._answer(request, context)


@pytest.mark.parametrize("stage", ["encoder", "prior"])
@pytest.mark.parametrize("name", ["space", "block_size", "patch_size"])
async def test_stages_of_different_models_are_refused_naming_both(tokenizer, stage: str, name: str):
    stages = fakes()
    setattr(stages[stage], name, "ffff" if name == "space" else 2)
    stages["decoder"].patch_size = 1
    with pytest.raises(ModelMismatch, match=rf"{name} is \w+ at {stage}, \w+ at decoder"):
        await over(stages, tokenizer).connect()


async def test_stages_that_are_still_starting_are_waited_for(tokenizer):
    stages = fakes()
    starting = Starting(stages["prior"])
    coordinator = over(stages, tokenizer)
    connecting = asyncio.create_task(coordinator.connect())
    await asyncio.sleep(0.1)
    assert not connecting.done()
    assert not coordinator.ready
    starting.up = True
    await connecting
    assert coordinator.ready


async def test_the_log_says_which_stage_is_waited_for(tokenizer, caplog):
    stages = fakes()
    starting = Starting(stages["prior"])
    connecting = asyncio.create_task(over(stages, tokenizer).connect(silent_seconds=0))
    await eventually(lambda: caplog.messages)
    starting.up = True
    await connecting
    assert set(caplog.messages) == {"waiting for the stages: prior at prior.test:1: UNAVAILABLE"}


async def test_stages_of_another_model_than_the_coordinators_are_refused_naming_both(tokenizer):
    stages = fakes()
    stubs = {name: LocalStub(fake) for name, fake in stages.items()}
    theirs = stages["decoder"].space
    await Coordinator(Stages(**stubs), tokenizer, space=theirs).connect()
    with pytest.raises(ModelMismatch, match=rf"space is {theirs} there, ffff in the coordinator's checkpoint"):
        await Coordinator(Stages(**stubs), tokenizer, space="ffff").connect()


async def test_a_stage_that_waiting_will_not_change_is_reported_at_once(tokenizer):
    stages = fakes()
    Starting(stages["prior"], StatusCode.UNAUTHENTICATED)
    with pytest.raises(Unavailable, match=r"prior at prior\.test:1 answers UNAUTHENTICATED"):
        await over(stages, tokenizer).connect()


async def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    library = SimpleNamespace(decoder=None)
    with pytest.raises(CheckpointError, match="ids up to 599, the stages' model takes ids up to 511"):
        await over(fakes(), Tokenizer(library, 600, SpecialIds(2))).connect()


async def test_before_connecting_calls_are_refused(tokenizer):
    with pytest.raises(Unavailable, match="waits for its stages"):
        _ = over(fakes(), tokenizer).services


async def test_served_calls_that_come_before_connecting_wait_for_it(tokenizer):
    coordinator = over(fakes(), tokenizer)
    generation, latents = GenerationServicer(coordinator), LatentServicer(coordinator)
    early = [
        asyncio.create_task(call)
        for call in (
            generation.Tokenize(generation_pb2.TokenizeRequest(text="he"), CONTEXT),
            generation.GetInfo(generation_pb2.GenerationServiceGetInfoRequest(), None),
            latents.GetInfo(latent_service_pb2.LatentServiceGetInfoRequest(), None),
        )
    ]
    await asyncio.sleep(0.1)
    assert not any(call.done() for call in early)
    await coordinator.connect()
    assert (await early[0]).token_ids
    assert (await early[1]).space == (await early[2]).space


async def test_served_calls_do_not_wait_for_ever_for_connecting(tokenizer):
    servicer = GenerationServicer(over(fakes(), tokenizer), connected_seconds=0.01)
    with pytest.raises(Unavailable, match="waits for its stages"):
        await servicer.Tokenize(generation_pb2.TokenizeRequest(text="he"), CONTEXT)


async def test_the_least_context_and_message_size_hold(tokenizer):
    stages = fakes()
    stages["prior"].max_context = 102
    coordinator = over(stages, tokenizer, max_context=1000, max_message_bytes=777)
    await coordinator.connect()
    assert (coordinator.services.model.max_context, coordinator.services.model.max_message_bytes) == (100, 777)


async def test_readiness_follows_the_stages(tokenizer):
    stages = fakes()
    decoder = Starting(stages["decoder"])
    decoder.up = True
    coordinator = over(stages, tokenizer, watch_seconds=0.01)
    await coordinator.connect()
    reported: list[bool] = []
    watching = asyncio.create_task(coordinator.watch(reported.append))
    decoder.up = False
    await eventually(lambda: reported == [False])
    assert not coordinator.ready
    decoder.up = True
    await eventually(lambda: reported == [False, True])
    assert coordinator.ready
    watching.cancel()


async def test_silent_replicas_do_not_count_while_another_one_answers(tokenizer):
    stages = fakes()
    prior, stubs = Looked(stages["prior"]), {name: LocalStub(fake) for name, fake in stages.items()}
    replicas = [Local(Silent(), "a:1"), Local(stubs["prior"], "b:1"), Local(Silent(), "c:1")]
    coordinator = Coordinator(
        Stages(**stubs | {"prior": replicas}), tokenizer, limits=CoordinatorLimits(watch_seconds=0)
    )
    await coordinator.connect()
    reported: list[bool] = []
    watching = asyncio.create_task(coordinator.watch(reported.append))
    await eventually(lambda: prior.looks >= 30)
    watching.cancel()
    assert coordinator.ready
    assert not reported


async def test_what_the_stages_are_is_answered_from_the_last_look(tokenizer):
    stages = fakes()
    prior, coordinator = Looked(stages["prior"]), over(stages, tokenizer)
    await coordinator.connect()
    looks = prior.looks
    assert all(stage.serving for stage in (await coordinator.generation_info()).stages)
    assert prior.looks == looks


async def test_limits_follow_the_stages(tokenizer):
    stages = fakes()
    coordinator = over(stages, tokenizer, max_context=200, watch_seconds=0.01)
    await coordinator.connect()
    watching = asyncio.create_task(coordinator.watch(lambda ready: None))
    for theirs, least in ((50, 48), (150, 148), (300, 200)):
        stages["decoder"].max_context = theirs
        await eventually(lambda least=least: coordinator.services.model.max_context == least)
        assert (await coordinator.generation_info()).limits.max_context == least
    watching.cancel()


async def test_info_reports_model_defaults_limits_and_stages(make_world):
    world = await make_world(defaults=Defaults.of(steps=9, chat_frame="Q: {prompt}\nA:"), max_running=3, max_waiting=5)
    info = await world.coordinator.generation_info()
    assert (info.model_name, info.space) == ("fake", "0123456789abcdef")
    assert (info.model.parameters, info.model.vocab_size) == (30, 512)
    assert (info.default_sampler.steps, info.default_max_new_tokens) == (9, 32)
    assert not info.default_sampling.HasField("seed")
    assert (info.limits.max_running, info.limits.max_waiting, info.limits.max_context) == (3, 5, 256)
    assert (list(info.end_ids), info.pad_id, info.chat_frame) == ([0, 1], 2, "Q: {prompt}\nA:")
    assert [(stage.stage, stage.target, stage.serving) for stage in info.stages] == [
        (name, "in-process", True) for name in ("encoder", "prior", "decoder")
    ]
    assert (await world.coordinator.latent_info()).model == info.model


async def test_a_request_switches_an_early_stop_of_the_defaults_off(make_world):
    world = await make_world(defaults=Defaults.of(stable_steps=2, stable_distance=0.5))
    for sampler, steps in (({}, 2), ({"stable_steps": 3}, 3), ({"stable_steps": 0}, 0)):
        await world.generate(prompt="a", sampler=types_pb2.Sampler(**sampler))
        sent = world.prior.calls[-1].sampler
        assert (sent.stable_steps, sent.HasField("stable_distance")) == (steps, steps > 0)


@pytest.mark.parametrize(
    ("bad", "name"),
    [({"steps": 0}, "sampler.steps"), ({"solver": "rk4"}, "sampler.solver"), ({"top_p": 0.0}, "sampling.top_p"),
     ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": 2**40}, "max_new_tokens"),
     ({"temperature": float("nan")}, "sampling.temperature"),
     ({"stable_steps": 2}, "sampler.stable_distance"),
     ({"guidance_start": 0.2, "guidance_end": 0.5}, "sampler.guidance_end")],
)  # fmt: skip
def test_impossible_defaults_are_refused(bad: dict[str, Any], name: str):
    with pytest.raises(UsageError, match=name):
        Defaults.of(**bad)
