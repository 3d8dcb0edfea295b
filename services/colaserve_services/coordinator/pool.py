"""The replicas of one stage: what each says of itself, and which of them a call goes to."""

import asyncio
import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import grpc
from grpc import StatusCode

from colaserve_services.coordinator.stages import INFO_REQUESTS, Model, Replica
from colaserve_services.errors import Unavailable
from colaserve_services.rpc.metrics import Metrics

_LOOK_SECONDS: Final = 2.5  # that a replica has to describe itself
_MISSES: Final = 2  # looks in a row without an answer until a replica counts as silent
_STARTING: Final = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED}

_log = logging.getLogger(__name__)


class NoReplica(Unavailable):
    """No replica of a stage can take the call now."""


class Brand(NamedTuple):
    """What a run has to stay with: another brand would write another text."""

    weights: str
    dtype: str

    def suits(self, other: "Brand") -> bool:
        """Whether they are the same, as far as both report them: earlier versions do not report their weights."""
        return all(ours == theirs or not ours or not theirs for ours, theirs in zip(self, other, strict=True))


class Choice(NamedTuple):
    """The replica that a call was sent to, and when (time.monotonic)."""

    replica: Replica
    brand: Brand
    at: float


@dataclass
class View:
    """What the looks at one replica found."""

    info: Any = None  # its latest answer
    life: int = -1  # of the replica, that gave it
    missed: int = _MISSES  # looks since then
    fault: str = "was not asked yet"
    code: StatusCode | None = None  # of the latest look, when it failed

    @property
    def answers(self) -> bool:
        """Whether it answered lately."""
        return self.info is not None and self.missed < _MISSES

    @property
    def brand(self) -> Brand:
        """Its weights and dtype, as it reported them last."""
        return Brand(self.info.weights, self.info.server.dtype)


class Pool:
    """`await pool.look()` now and again; `pool.choose(...)` for each call."""

    def __init__(self, stage: str, replicas: Iterable[Replica], target: str, metrics: Metrics):
        self.stage, self.target = stage, target
        self.model: Model | None = None  # that a replica must serve to be chosen; None: any
        self._replicas, self._faults = replicas, metrics.stage_faults
        self._views: dict[str, View] = {}  # by address
        self._next = 0

    @property
    def infos(self) -> list[Any]:
        """The latest answers of the replicas that answered lately and serve the model."""
        return [view.info for view in self._views.values() if view.answers and self._suits(view)]

    @property
    def last(self) -> Any:
        """An answer of `infos`, else the latest one of a replica that does not answer any more, else None."""
        known = [view.info for view in self._views.values() if view.info is not None and self._suits(view)]
        return (self.infos or known or [None])[0]

    @property
    def all_answered(self) -> bool:
        """Whether there are replicas and each has answered lately."""
        return bool(self._views) and all(view.answers for view in self._views.values())

    def faults(self) -> str:
        """Why its replicas do not serve."""
        found = dict.fromkeys(view.fault for view in self._views.values() if view.fault)
        return f"{self.stage} at {self.target}: {', '.join(found) or 'no address is known'}"

    def refusal(self) -> str:
        """What all its replicas answer, where that is nothing that waiting changes; else empty."""
        codes = {view.code for view in self._views.values()}
        return ", ".join(code.name for code in codes if code) if codes and not codes & {None, *_STARTING} else ""

    async def look(self) -> None:
        """Ask every replica what it is."""
        replicas = list(self._replicas)
        self._views = {each.address: self._views.get(each.address) or View() for each in replicas}
        await asyncio.gather(*(self._ask(each, self._views[each.address]) for each in replicas))

    def choose(self, brand: Brand | None, avoided: Collection[str] = (), near: str | None = None) -> Choice:
        """The next replica in turn that can take a call of a run of that brand (None: of any), or the one of address
        `near`. While there are others, it is none of the `avoided` (addresses) and none that is silent. Raises
        NoReplica."""
        fitting = [each for each in self._replicas if self._can_take(each, brand)]
        fresh = [each for each in fitting if each.address not in avoided]
        fitting = self.offers(brand, avoided) or fresh or fitting
        if not fitting:
            kept = " of the weights and dtype that began this run" if brand else ""
            raise NoReplica(f"no replica of the {self.stage}{kept} is ready")
        self._next += not avoided and near is None  # a failure does not send the next call there again
        in_turn = fitting[self._next % len(fitting)]
        chosen = next((each for each in fitting if each.address == near), in_turn)
        return Choice(chosen, self._views[chosen.address].brand, time.monotonic())

    def offers(self, brand: Brand | None, avoided: Collection[str]) -> list[Replica]:
        """The replicas that answer, are none of the `avoided` and can take a call of a run of that brand."""
        taking = [each for each in self._replicas if each.address not in avoided and self._can_take(each, brand)]
        return [each for each in taking if self._views[each.address].answers]

    @property
    def capacity(self) -> int:
        """Sessions that its replicas take together; 0: they do not say."""
        return sum(info.limits.max_running for info in self.infos)

    async def outlived(self, choice: Choice) -> bool:
        """Whether the replica serves on, and is the same process that the call was sent to."""
        try:
            info = await self._info(choice.replica)
        except grpc.RpcError:
            return False
        uptime = info.server.uptime_seconds  # 0: it does not say
        return not uptime or uptime >= time.monotonic() - choice.at

    def _can_take(self, replica: Replica, brand: Brand | None) -> bool:
        """What it said of itself holds as long as its connection does."""
        view = self._views.get(replica.address)
        if view is None or view.info is None or view.life != replica.lives or not replica.serving:
            return False
        return self._suits(view) and (brand is None or brand.suits(view.brand))

    def _suits(self, view: View) -> bool:
        return self.model is None or self.model.difference(view.info) is None

    async def _ask(self, replica: Replica, view: View) -> None:
        life = replica.lives
        try:
            info = await self._info(replica)
        except grpc.RpcError as error:
            view.missed, view.fault, view.code = view.missed + 1, error.code().name, error.code()
            return
        view.info, view.life, view.missed, view.code = info, life, 0, None
        before, view.fault = view.fault, ""
        if not self._suits(view):
            view.fault = f"{replica.address} serves another checkpoint (space {info.space})"
            self._faults.labels(self.stage, "model").inc()
            if view.fault != before:
                _log.warning("the %s at %s; it is left out", self.stage, view.fault)

    async def _info(self, replica: Replica) -> Any:
        return await replica.stub.GetInfo(INFO_REQUESTS[self.stage](), timeout=_LOOK_SECONDS)
