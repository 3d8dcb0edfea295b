"""The Open Inference Protocol over fake stages."""

from typing import Any

from colaserve_services.coordinator import Coordinator, CoordinatorLimits, Stages
from colaserve_services.inference.service import InferenceServicer
from colaserve_services.rpc.local import LocalStub
from colaserve_services.text import Tokenizer
from tests.services.coordinator.conftest import GOLDEN
from tests.services.coordinator.stage_fakes import FakeDecoder, FakeEncoder, FakePrior


async def connected(**limits: Any) -> tuple[Coordinator, FakePrior]:
    """A coordinator, and the prior behind it."""
    prior = FakePrior()
    stages = Stages(*map(LocalStub, (FakeEncoder(), prior, FakeDecoder())))
    coordinator = Coordinator(stages, Tokenizer.open(GOLDEN, 512), limits=CoordinatorLimits(**limits))
    await coordinator.connect()
    return coordinator, prior


async def served(**limits: Any) -> tuple[Any, FakePrior]:
    """A stub of the service, and the prior behind it."""
    coordinator, prior = await connected(**limits)
    return LocalStub(InferenceServicer(coordinator, lambda: True)), prior
