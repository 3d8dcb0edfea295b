"""A golden checkpoint behind a coordinator, with real engines: behind real sockets, or in process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from colaserve.v1 import generation_pb2
from colaserve_services.coordinator import Coordinator, CoordinatorLimits, Stages
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.inference.service import InferenceServicer
from colaserve_services.launch.roles import COORDINATOR
from colaserve_services.rpc.local import LocalStub
from colaserve_services.text import Tokenizer
from tests.services.servers import served
from tests.services.stages.serving import Served, serving


@dataclass
class System:
    """A golden checkpoint behind a coordinator."""

    coordinator: Coordinator
    tokenizer: Tokenizer
    generation: Any
    latents: Any
    inference: Any
    stages: Served

    async def generate(self, **fields: Any) -> list[generation_pb2.GenerateResponse]:
        return [response async for response in self.generation.Generate(generation_pb2.GenerateRequest(**fields))]


@asynccontextmanager
async def system(
    golden: Any, split: bool, max_context: int = 256, limits: CoordinatorLimits | None = None
) -> AsyncIterator[System]:
    """`split`: stages and coordinator each behind a socket; else all called in process."""
    async with serving(golden, EngineLimits(max_context=max_context)) as stages:
        tokenizer = Tokenizer.open(golden.directory / "tokenizer.json", stages.shape.vocab_size)
        services = stages.stages.services
        fused = {name: LocalStub(services[name]) for name in ("encoder", "prior", "decoder")}
        stubs = {name: getattr(stages, name) for name in fused} if split else fused
        limits = limits or CoordinatorLimits(max_context=max_context)
        coordinator = Coordinator(Stages(**stubs), tokenizer, limits=limits, model_name="tiny")
        await coordinator.connect()
        inference = InferenceServicer(coordinator, lambda: True)
        servicers = GenerationServicer(coordinator), LatentServicer(coordinator), inference
        if not split:
            yield System(coordinator, tokenizer, *map(LocalStub, servicers), stages)
            return
        async with served(*servicers) as it:
            yield System(coordinator, tokenizer, *(stub(it.channel) for stub in COORDINATOR), stages)


def recorded(case: dict[str, Any], sample_id: int, budget: int) -> dict[str, Any]:
    """The request that a recorded generation came from."""
    params = case["params"]
    return {
        "prompt": case["prompts"][sample_id],
        "max_new_tokens": budget,
        "sampler": {"steps": params["timestep_num"], "guidance_scale": params["guidance_scale"]},
        "sampling": {"repetition_penalty": params.get("repetition_penalty", 1.1), "temperature": 0},
        "seed": {"base_seed": case["noise_base_seed"], "sample_id": sample_id},
        "ignore_end": True,
        "print_special": True,
    }


def ids_of(responses: list[Any]) -> list[int]:
    return [id_ for response in responses for id_ in response.token_ids]


def text_of(responses: list[Any]) -> str:
    return "".join(response.text for response in responses)
