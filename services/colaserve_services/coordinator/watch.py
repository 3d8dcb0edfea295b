"""Looks at the stages: patiently while they start, then now and again, so that readiness tells the truth."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from grpc import StatusCode

from colaserve.v1 import generation_pb2
from colaserve_services.coordinator.stages import NAMES, Stages
from colaserve_services.errors import Unavailable

_PATIENCE: Final = (0.5, 0.5, 1.0, 1.0, 2.0)  # seconds, try by try; the next one goes to another replica
_SILENT_SECONDS: Final = 15.0  # between two lines of the log about stages that are waited for
_MISSES: Final = 2  # looks in a row without an answer until a stage counts as down
_STARTING: Final = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED}

_log = logging.getLogger(__name__)


@dataclass
class View:
    """What the looks at one stage found."""

    info: Any = None  # its latest answer
    missed: int = _MISSES  # looks since then
    fault: str = "was not asked yet"

    @property
    def serving(self) -> bool:
        """Whether it answered lately."""
        return self.info is not None and self.missed < _MISSES


@dataclass
class Lookout:
    """The latest views of all stages."""

    stages: Stages
    space: str = ""  # that a stage must have to count as serving; empty: any
    views: dict[str, View] = field(default_factory=lambda: {name: View() for name in NAMES})

    @property
    def all_serving(self) -> bool:
        """Whether every stage answered lately."""
        return all(view.serving for view in self.views.values())

    @property
    def infos(self) -> dict[str, Any]:
        """The latest answer of each stage."""
        return {name: view.info for name, view in self.views.items()}

    async def look(self) -> None:
        """Ask all stages at once.

        Before the stages have agreed, raises Unavailable for an answer that waiting does not change; never later."""
        await asyncio.gather(*(self._ask(name) for name in NAMES))

    async def wait(self) -> dict[str, Any]:
        """The answers of all stages, once each has given one. The log says now and again who is waited for."""
        tell_at, pause = time.monotonic() + _SILENT_SECONDS, 0.05
        while True:
            await self.look()
            if self.all_serving:
                return self.infos
            if time.monotonic() >= tell_at:
                _log.warning("waiting for the stages: %s", self.faults())
                tell_at = time.monotonic() + _SILENT_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    def faults(self) -> str:
        """Which stages do not serve, where and why."""
        return "; ".join(
            f"{name} at {self.stages.target(name)}: {view.fault}"
            for name, view in self.views.items()
            if not view.serving
        )

    def messages(self) -> list[generation_pb2.StageInfo]:
        """All views as messages."""
        return [self._message(name, view) for name, view in self.views.items()]

    def _message(self, name: str, view: View) -> generation_pb2.StageInfo:
        message = generation_pb2.StageInfo(stage=name, target=self.stages.target(name), serving=view.serving)
        if view.info is not None:
            message.server.CopyFrom(view.info.server)
            message.limits.CopyFrom(view.info.limits)
            message.space = view.info.space
        return message

    async def _ask(self, name: str) -> None:
        view = self.views[name]
        try:
            info = await self._answer(name)
        except grpc.RpcError as error:
            code = error.code()
            view.missed, view.fault = view.missed + 1, code.name
            if not self.space and code not in _STARTING:
                where = f"{name} at {self.stages.target(name)}"
                raise Unavailable(f"{where} answers {code.name}: {error.details()}") from error
            return
        if self.space and info.space != self.space:
            view.missed, view.fault = _MISSES, f"serves space {info.space}, not {self.space}"
            return
        view.info, view.missed, view.fault = info, 0, ""

    async def _answer(self, name: str) -> Any:
        """The first answer of several tries, so that one silent replica is no miss while another one answers."""
        for seconds in _PATIENCE[:-1]:
            with suppress(grpc.RpcError):
                return await self.stages.info(name, seconds)
        return await self.stages.info(name, _PATIENCE[-1])
