from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from colaserve.v1 import generation_pb2
from colaserve_services.coordinator import Call, Coordinator, CoordinatorLimits, Defaults, Stages
from colaserve_services.coordinator.generation import generate
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.text import Tokenizer
from tests.services.coordinator.stage_fakes import Fake, FakeDecoder, FakeEncoder, FakePrior

T = TypeVar("T")
GOLDEN = Path(__file__).parents[2] / "data/golden/tiny_b4/tokenizer.json"


def counted(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """What a metric has counted, by its labels, where that is not 0."""
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return {
        tuple(each.labels.values()): each.value for each in samples if each.name == f"colaserve_{name}" and each.value
    }


async def one_by_one(answer: AsyncGenerator[list[T], None]) -> AsyncGenerator[T, None]:
    """What a call streams, message by message."""
    async with aclosing(answer):
        async for together in answer:
            for message in together:
                yield message


class World:
    """A coordinator over fake stages."""

    def __init__(self, coordinator: Coordinator, encoder: FakeEncoder, prior: FakePrior, decoder: FakeDecoder):
        self.coordinator, self.encoder, self.prior, self.decoder = coordinator, encoder, prior, decoder
        self.metrics = coordinator.services.metrics
        self.tokenizer = coordinator.services.tokenizer

    def ask(self, work: Callable[..., T], request: Any, call: Call | None = None) -> T:
        """One of the coordinator's calls, such as `generate` or `infill`; what it streams, message by message."""
        answer = work(self.coordinator.services, request, call or Call())
        return one_by_one(answer) if isinstance(answer, AsyncGenerator) else answer

    async def generate(self, call: Call | None = None, **fields: Any) -> list[generation_pb2.GenerateResponse]:
        return [response async for response in self.ask(generate, generation_pb2.GenerateRequest(**fields), call)]

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        return counted(self.metrics, name)

    @property
    def running(self) -> tuple[int, int]:
        """Sessions of the prior and of the decoder."""
        return self.prior.running, self.decoder.running


def fakes() -> dict[str, Fake]:
    return {"encoder": FakeEncoder(), "prior": FakePrior(), "decoder": FakeDecoder()}


def over(
    stages: Mapping[str, Any],
    text: Tokenizer | None = None,
    defaults: Defaults | None = None,
    targets: Mapping[str, str] | None = None,
    space: str = "",
    **limits: Any,
) -> Coordinator:
    """A coordinator over fakes, stubs or replicas, which is not connected yet."""
    stubs = {name: LocalStub(stage) if isinstance(stage, Fake) else stage for name, stage in stages.items()}
    bounds = CoordinatorLimits(**{"retry_seconds": 0.001} | limits)
    text = text or Tokenizer.open(GOLDEN, 512)
    return Coordinator(Stages(**stubs, targets=targets), text, defaults, bounds, model_name="fake", space=space)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(GOLDEN, 512)


@pytest.fixture
async def make_world(tokenizer: Tokenizer) -> Callable[..., Any]:
    async def make(
        decoder: FakeDecoder | None = None,
        patch_size: int = 1,
        block_size: int = 4,
        defaults: Defaults | None = None,
        text: Tokenizer | None = None,
        **limits: Any,
    ) -> World:
        stages = fakes() | ({"decoder": decoder} if decoder else {})
        for stage in stages.values():
            stage.patch_size, stage.block_size = patch_size, block_size
        coordinator = over(stages, text or tokenizer, defaults, **limits)
        await coordinator.connect()
        return World(coordinator, **stages)

    return make


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> World:
    return await make_world()
