"""The coordinator: prompts in, text out, with the three stages doing the work. No torch."""

from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.coordinator import Coordinator
from colaserve_services.coordinator.defaults import Defaults
from colaserve_services.coordinator.limits import CoordinatorLimits
from colaserve_services.coordinator.stages import Stages

__all__ = ["Call", "Coordinator", "CoordinatorLimits", "Defaults", "Stages"]
