"""Looks at the stages: patiently while they start, then now and again, so that readiness tells the truth."""

import asyncio
import logging
import time
from collections import Counter
from typing import Any

from colaserve.v1 import generation_pb2
from colaserve_services.coordinator.pool import Pool
from colaserve_services.coordinator.stages import NAMES, Model, Stages
from colaserve_services.errors import Unavailable
from colaserve_services.rpc.metrics import Metrics

_log = logging.getLogger(__name__)


class HealthMonitor:
    """The pools of all stages."""

    def __init__(self, stages: Stages, metrics: Metrics):
        self.pools = {name: Pool(name, stages.replicas[name], stages.targets[name], metrics) for name in NAMES}

    @property
    def all_serving(self) -> bool:
        """Whether of every stage a replica answered lately that serves the model."""
        return all(pool.infos for pool in self.pools.values())

    @property
    def infos(self) -> list[Any]:
        """The latest answers of all stages' replicas that serve the model; of a stage that is down, its last one."""
        return [info for pool in self.pools.values() for info in pool.infos or filter(None, [pool.last])]

    @property
    def capacities(self) -> dict[str, int]:
        """Sessions that the replicas of each stage take together; 0: they do not say."""
        return {name: pool.capacity for name, pool in self.pools.items()}

    async def look(self) -> None:
        """Ask all replicas of all stages at once."""
        await asyncio.gather(*(pool.look() for pool in self.pools.values()))

    async def wait(self, space: str, silent_seconds: float) -> dict[str, Any]:
        """An answer of each stage, of a replica of that latent space where there is one (empty: of the space that most
        replicas tell), once all have answered.

        The log says every so many seconds which stages are waited for. Raises Unavailable for an answer that waiting
        does not change."""
        tell_at, pause = time.monotonic() + silent_seconds, 0.05
        while True:
            await self.look()
            if self._settled(space):
                spaces = Counter(info.space for info in self.infos if info.space)
                return self._chosen(space or next((each for each, _ in spaces.most_common(1)), ""))
            for pool in self.pools.values():
                if refusal := pool.refusal():
                    raise Unavailable(f"{pool.stage} at {pool.target} answers {refusal}")
            if time.monotonic() >= tell_at:
                _log.warning("waiting for the stages: %s", self.faults())
                tell_at = time.monotonic() + silent_seconds
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    def settle(self, model: Model) -> None:
        """From now on only replicas that serve this model count."""
        for pool in self.pools.values():
            pool.model = model

    def faults(self) -> str:
        """Which stages do not serve, where and why."""
        return "; ".join(pool.faults() for pool in self.pools.values() if not pool.infos)

    def messages(self) -> list[generation_pb2.StageInfo]:
        """All stages as messages, each by one of its replicas."""
        return [self._message(pool) for pool in self.pools.values()]

    def _message(self, pool: Pool) -> generation_pb2.StageInfo:
        message = generation_pb2.StageInfo(stage=pool.stage, target=pool.target, serving=bool(pool.infos))
        if (info := pool.last) is not None:
            message.server.CopyFrom(info.server)
            message.limits.CopyFrom(info.limits)
            message.space = info.space
        return message

    def _settled(self, space: str) -> bool:
        """Whether of each stage a replica of the space has answered, or all replicas have."""
        return all(
            pool.all_answered or any(info.space == (space or info.space) for info in pool.infos)
            for pool in self.pools.values()
        )

    def _chosen(self, space: str) -> dict[str, Any]:
        return {
            name: next((info for info in pool.infos if info.space == space), pool.infos[0])
            for name, pool in self.pools.items()
        }
