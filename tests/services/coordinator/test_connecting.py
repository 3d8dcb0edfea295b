import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from colaserve.v1 import generation_pb2, latent_service_pb2, types_pb2
from colaserve_services.coordinator import Defaults
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.coordinator.stages import Local
from colaserve_services.errors import CheckpointError, ModelMismatch, NotAuthenticated, Unavailable
from colaserve_services.rpc.local import LocalStub
from colaserve_services.text import SpecialIds, Tokenizer
from tests.services.coordinator.conftest import fakes, over
from tests.waiting import eventually

CONTEXT: Any = SimpleNamespace(invocation_metadata=tuple, time_remaining=lambda: None, peer=str)


class Silent:
    """A stub that never answers."""

    async def GetInfo(self, request: Any, **options: Any) -> Any:
        raise AioRpcError(StatusCode.DEADLINE_EXCEEDED, Metadata(), Metadata())


@pytest.mark.parametrize("stage", ["encoder", "prior"])
@pytest.mark.parametrize("name", ["space", "block_size", "patch_size"])
async def test_stages_of_different_models_are_refused_naming_both(tokenizer, stage: str, name: str):
    stages = fakes()
    setattr(stages[stage], name, "ffff" if name == "space" else 2)
    stages["decoder"].patch_size = 1
    with pytest.raises(ModelMismatch, match=rf"{name} is \w+ at {stage}, \w+ at decoder"):
        await over(stages, tokenizer).connect()


async def test_stages_that_are_still_starting_are_waited_for_as_the_log_says(tokenizer, caplog):
    stages = fakes()
    stages["prior"].info_fault = Unavailable("not yet")
    coordinator = over(stages, tokenizer, targets={"prior": "prior.test:1"})
    connecting = asyncio.create_task(coordinator.connect(silent_seconds=0))
    await eventually(lambda: caplog.messages)
    assert not connecting.done()
    assert not coordinator.ready
    stages["prior"].info_fault = None
    await connecting
    assert coordinator.ready
    assert set(caplog.messages) == {"waiting for the stages: prior at prior.test:1: UNAVAILABLE"}


async def test_stages_of_another_model_than_the_coordinators_are_refused_naming_both(tokenizer):
    stages = fakes()
    theirs = stages["decoder"].space
    await over(stages, tokenizer, space=theirs).connect()
    with pytest.raises(ModelMismatch, match=rf"space is {theirs} there, ffff in the coordinator's checkpoint"):
        await over(stages, tokenizer, space="ffff").connect()


async def test_a_stage_that_waiting_will_not_change_is_reported_at_once(tokenizer):
    stages = fakes()
    stages["prior"].info_fault = NotAuthenticated("no key")
    with pytest.raises(Unavailable, match="prior at in-process answers UNAUTHENTICATED"):
        await over(stages, tokenizer).connect()


async def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    library = SimpleNamespace(decoder=None)
    with pytest.raises(CheckpointError, match="ids up to 599, the stages' model takes ids up to 511"):
        await over(fakes(), Tokenizer(library, 600, SpecialIds(2))).connect()


async def test_calls_before_connecting_are_refused_and_served_ones_do_not_wait_for_ever(tokenizer):
    with pytest.raises(Unavailable, match="waits for its stages"):
        _ = over(fakes(), tokenizer).services
    servicer = GenerationServicer(over(fakes(), tokenizer), connected_seconds=0.01)
    with pytest.raises(Unavailable, match="waits for its stages"):
        await servicer.Tokenize(generation_pb2.TokenizeRequest(text="he"), CONTEXT)


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


async def test_readiness_follows_the_stages(tokenizer):
    stages, reported = fakes(), list[bool]()
    coordinator = over(stages, tokenizer, watch_seconds=0.01)
    await coordinator.connect()
    watching = asyncio.create_task(coordinator.watch(reported.append))
    for fault, expected in ((Unavailable("away"), [False]), (None, [False, True])):
        stages["decoder"].info_fault = fault
        await eventually(lambda expected=expected: reported == expected)
        assert coordinator.ready is (fault is None)
    watching.cancel()


async def test_silent_replicas_do_not_count_while_another_one_answers(tokenizer):
    stages = fakes()
    prior = stages["prior"]
    replicas = [Local(Silent(), "a:1"), Local(LocalStub(prior), "b:1"), Local(Silent(), "c:1")]
    coordinator = over(stages | {"prior": replicas}, tokenizer, watch_seconds=0)
    await coordinator.connect()
    reported: list[bool] = []
    watching = asyncio.create_task(coordinator.watch(reported.append))
    await eventually(lambda: prior.info_calls >= 30)
    watching.cancel()
    assert coordinator.ready
    assert not reported


async def test_what_the_stages_are_is_answered_from_the_last_look(tokenizer):
    stages = fakes()
    coordinator = over(stages, tokenizer)
    await coordinator.connect()
    looks = stages["prior"].info_calls
    assert all(stage.serving for stage in (await coordinator.generation_info()).stages)
    assert stages["prior"].info_calls == looks


async def test_limits_follow_the_stages(tokenizer):
    stages = fakes()
    coordinator = over(stages, tokenizer, max_context=200, max_message_bytes=777, watch_seconds=0.01)
    await coordinator.connect()
    assert coordinator.services.model.max_message_bytes == 777
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
