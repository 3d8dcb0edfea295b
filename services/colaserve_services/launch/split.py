"""`up --split`: every role a process of its own on this machine, started, watched and stopped together.

What dies is started again on the same ports, as in Kubernetes: streams go on with another replica where there is one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field

from colaserve_services.launch.announcements import announce, flush_or_drop
from colaserve_services.launch.children import Child, ChildSettings, reachable
from colaserve_services.launch.process import keep_grpc, write_ports
from colaserve_services.launch.settings import STAGES, WatchSettings
from colaserve_services.launch.signals import Signals
from colaserve_services.rpc import logs
from colaserve_services.rpc.settings import ChannelSettings

PRIVATE = ("--host=127.0.0.1", "--grpc-port=0", "--metrics-port=0", "--drain-seconds=0")  # not for others

KEY_VARIABLES = {"COLASERVE_API_KEYS", "COLASERVE_API_KEYS_FILE"}  # clients do not reach the stages

Arguments = Mapping[str, Sequence[str]]  # role -> its command-line arguments


@dataclass(frozen=True)
class SplitSettings:
    """What the parent itself needs."""

    arguments: Arguments
    environment: Mapping[str, Mapping[str, str]]  # role -> its keys
    stop_seconds: float  # a child's drain and grace
    watch: WatchSettings
    channel: ChannelSettings  # how the roles reach each other, and this process their health
    description: str  # of the model
    replicas: Mapping[str, int] = field(default_factory=dict)  # of stages that have more than one


class Children:
    """The processes, in the order of their start."""

    def __init__(self, settings: SplitSettings):
        self._settings = settings
        self.stages = {stage: self._replicas(stage) for stage in STAGES}
        self.coordinator, self.gateway = self._child("coordinator"), self._child("gateway", "--metrics-port=0")

    def _replicas(self, stage: str) -> list[Child]:
        count = self._settings.replicas.get(stage, 1)
        names = [stage] if count == 1 else [f"{stage}-{index}" for index in range(count)]
        return [self._child(stage, *PRIVATE, name=name) for name in names]

    def _child(self, role: str, *more: str, name: str = "") -> Child:
        settings = self._settings
        shared = {key: value for key, value in os.environ.items() if key not in KEY_VARIABLES}
        environment = {**shared, **settings.environment.get(role, {})}
        arguments = [*settings.arguments[role], *more]
        return Child(ChildSettings(name or role, role, arguments, environment, settings.channel, settings.stop_seconds))

    @property
    def all(self) -> list[Child]:
        """All of them."""
        return [*(child for stage in self.stages.values() for child in stage), self.coordinator, self.gateway]

    @property
    def addresses(self) -> dict[str, dict[str, str]]:
        """Of each one, by its kind."""
        return {child.settings.name: child.addresses for child in self.all}

    async def start(self) -> None:
        """Start all and return when they serve. Raises what the first one that fails says."""
        await asyncio.gather(*(child.start() for stage in self.stages.values() for child in stage))
        for stage, replicas in self.stages.items():
            self.coordinator.told(f"--{stage}={','.join(child.addresses['grpc'] for child in replicas)}")
        await self.coordinator.start()
        self.gateway.told(f"--coordinator={reachable(self.coordinator.addresses['grpc'])}")
        await self.gateway.start()
        await asyncio.gather(*(child.serving() for child in self.all if "grpc" in child.addresses))

    async def unless_one_ends(self, work: Awaitable[None]) -> None:
        """Do the work; raise ColaserveError when a process ends meanwhile."""
        task, ends = asyncio.ensure_future(work), {asyncio.ensure_future(child.ended()): child for child in self.all}
        try:
            await asyncio.wait([task, *ends], return_when=asyncio.FIRST_COMPLETED)
            if fallen := next((child for end, child in ends.items() if end.done()), None):
                raise fallen.fault()
            await task
        finally:
            for pending in (task, *ends):
                pending.cancel()
            await asyncio.gather(task, *ends, return_exceptions=True)

    async def keep_running(self) -> None:
        """Start again what ends. Never returns."""
        await asyncio.gather(*(child.keep_running() for child in self.all))

    async def stop(self, number: int) -> None:
        """Callers before the called, so that what runs can end: gateway, coordinator, stages."""
        stages = [child for stage in self.stages.values() for child in stage]
        for children in ([self.gateway], [self.coordinator], stages):
            await asyncio.gather(*(child.stop(number) for child in children))

    async def kill(self) -> None:
        """End all at once."""
        await asyncio.gather(*(child.stop(signal.SIGKILL) for child in self.all))


def run_split(settings: SplitSettings) -> None:
    """Run all roles until a signal. Raises ColaserveError when one of them cannot start."""
    logs.configure(settings.watch.log, "colaserve")
    try:
        asyncio.run(_run(settings))
    finally:
        flush_or_drop()


async def _run(settings: SplitSettings) -> None:
    keep_grpc()
    children, signals = Children(settings), Signals()
    number: int | None = None
    try:
        number = await signals.ended(_start_and_watch(children, settings))
    finally:
        gentle = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if await signals.ended(children.stop(gentle)):
            await children.kill()


async def _start_and_watch(children: Children, settings: SplitSettings) -> None:
    started = time.monotonic()
    await children.unless_one_ends(children.start())
    if settings.watch.ports_file is not None:
        write_ports(settings.watch.ports_file, children.addresses)
    lines = [f"colaserve ready after {time.monotonic() - started:.1f} s, one process a role:"]
    for name, addresses in children.addresses.items():
        lines.append(f"  {name:12}" + ", ".join(f"{kind} {address}" for kind, address in addresses.items()))
    as_json, text = settings.watch.log.format == "json", "\n".join(lines)
    announce("colaserve", as_json, text, settings.description, addresses=children.addresses)
    await children.keep_running()
