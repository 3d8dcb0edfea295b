"""The Open Inference Protocol over fake stages."""

from typing import Any

from colaserve_services.coordinator import Coordinator
from colaserve_services.inference.service import InferenceServicer
from colaserve_services.rpc.local import LocalStub
from tests.services.coordinator.conftest import fakes, over
from tests.services.coordinator.stage_fakes import FakePrior


async def connected(**limits: Any) -> tuple[Coordinator, FakePrior]:
    """A coordinator, and the prior behind it."""
    stages = fakes()
    coordinator = over(stages, **limits)
    await coordinator.connect()
    return coordinator, stages["prior"]


async def served(**limits: Any) -> tuple[Any, FakePrior]:
    """A stub of the service, and the prior behind it."""
    coordinator, prior = await connected(**limits)
    return LocalStub(InferenceServicer(coordinator, lambda: True)), prior
