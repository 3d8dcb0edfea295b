from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from colaserve.v1 import generation_pb2
from colaserve_services.coordinator import Call, Coordinator, CoordinatorLimits, CoordinatorObserver, Defaults, Stages
from colaserve_services.coordinator.generation import generate
from colaserve_services.rpc.local import LocalStub
from colaserve_services.text import Tokenizer
from tests.services.coordinator.stage_fakes import FakeDecoder, FakeEncoder, FakePrior

T = TypeVar("T")
GOLDEN = Path(__file__).parents[2] / "data/golden/tiny_b4/tokenizer.json"


class Heard(CoordinatorObserver):
    """Remembers what was reported to it."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]

    def __getattribute__(self, name: str) -> Any:
        if name in ("events", "of") or name.startswith("__"):
            return super().__getattribute__(name)
        return lambda *reported: self.events.append((name, *reported))


class World:
    """A coordinator over fake stages."""

    def __init__(self, coordinator: Coordinator, encoder: FakeEncoder, prior: FakePrior, decoder: FakeDecoder):
        self.coordinator, self.encoder, self.prior, self.decoder = coordinator, encoder, prior, decoder
        self.heard: Heard = coordinator.services.observer  # type: ignore[assignment]
        self.tokenizer = coordinator.services.tokenizer

    def ask(self, work: Callable[..., T], request: Any, call: Call | None = None) -> T:
        """One of the coordinator's calls, such as `generate` or `infill`."""
        return work(self.coordinator.services, request, call or Call())

    async def generate(self, call: Call | None = None, **fields: Any) -> list[generation_pb2.GenerateResponse]:
        return [response async for response in self.ask(generate, generation_pb2.GenerateRequest(**fields), call)]

    @property
    def running(self) -> tuple[int, int]:
        """Sessions of the prior and of the decoder."""
        return self.prior.running, self.decoder.running


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
        fakes = FakeEncoder(), FakePrior(), decoder or FakeDecoder()
        for fake in fakes:
            fake.patch_size, fake.block_size = patch_size, block_size
        coordinator = Coordinator(
            Stages(*map(LocalStub, fakes)),
            text or tokenizer,
            defaults,
            CoordinatorLimits(**{"retry_seconds": 0.001} | limits),
            Heard(),
            "fake",
        )
        await coordinator.connect()
        return World(coordinator, *fakes)

    return make


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> World:
    return await make_world()
