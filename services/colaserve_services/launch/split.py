"""`up` in several processes on this machine, started, watched and stopped together: with --split one a role; with a
GPU one for the stages of each, beside the coordinator and the gateway, which share the first process.

What dies is started again on the same ports, as in Kubernetes: streams go on with another replica where there is one.
"""

import asyncio
import os
import secrets
import signal
from collections.abc import Awaitable, Mapping, Sequence

from colaserve_services.launch.children import Child, reachable
from colaserve_services.launch.options import STAGES
from colaserve_services.launch.process import Host, check_ports, description, in_thread, run
from colaserve_services.launch.settings import ROLE_KEY, UpSettings, check_tls, role_key

PRIVATE = ("--host=127.0.0.1", "--grpc-port=0", "--metrics-port=0", "--drain-seconds=0")  # not for others
KEYS_FILE = "COLASERVE_API_KEYS_FILE"  # clients do not reach the stages
EDGES = ("coordinator", "gateway")
OWN = ("COLASERVE_PORTS_FILE", "COLASERVE_SPLIT", "COLASERVE_REPLICAS")  # of the process that starts the others


def groups(devices: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Which stages, each on its device, share a process: those on one GPU; those on the CPU join the decoder's."""
    found: dict[str, list[str]] = {}
    for stage, device in devices.items():
        found.setdefault({"cuda": "cuda:0"}.get(device, device), []).append(stage)
    on_cpu = found.pop("cpu", []) if len(found) > 1 else []
    for stages in found.values():
        if "decoder" in stages or "decoder" in on_cpu:
            stages += on_cpu
            break
    return [tuple(stages) for stages in found.values()]


class Launcher:
    """Makes the processes of one `up`, which share its settings, its environment and a key."""

    def __init__(self, settings: UpSettings, said: Mapping[str, str]):
        """`said`: what the command line says, as variables."""
        self._settings = settings
        self.key = role_key() or secrets.token_urlsafe(32)  # gateway and coordinator send it to what they call
        self._environment = {**os.environ, **said, ROLE_KEY: self.key}

    def stages(self, stages: tuple[str, ...], name: str = "") -> Child:
        """The process that runs these stages."""
        devices = ",".join(f"{stage}={self._settings.device_of(stage)}" for stage in stages)
        return self.child("+".join(stages), *PRIVATE, f"--device={devices}", name=name)

    def child(self, role: str, *arguments: str, name: str = "") -> Child:
        """The process of a role."""
        settings = self._settings
        kept = {key: value for key, value in self._environment.items() if role in EDGES or key != KEYS_FILE}
        environment = {key: value for key, value in kept.items() if key not in OWN}
        stop_seconds = settings.drain_seconds + settings.grace_seconds
        return Child(name or role, role, list(arguments), environment, settings.channel, stop_seconds)


class Children:
    """The processes, in the order of their start."""

    def __init__(self, settings: UpSettings, said: Mapping[str, str]):
        """`said`: what the command line says, as variables."""
        launcher = Launcher(settings, said)
        self.stages = {stage: _replicas(launcher, stage, settings.replicas.get(stage, 1)) for stage in STAGES}
        self.coordinator, self.gateway = launcher.child("coordinator"), launcher.child("gateway", "--metrics-port=0")

    @property
    def all(self) -> list[Child]:
        """All processes."""
        return [*(child for stage in self.stages.values() for child in stage), self.coordinator, self.gateway]

    @property
    def addresses(self) -> dict[str, dict[str, str]]:
        """The addresses of each process by their kind."""
        return {child.name: child.addresses for child in self.all}

    async def start(self) -> None:
        """Start all and return when they serve. Raises what the first one that fails says."""
        await asyncio.gather(*(child.start() for stage in self.stages.values() for child in stage))
        for stage, replicas in self.stages.items():
            self.coordinator.arguments.append(f"--{stage}={','.join(child.addresses['grpc'] for child in replicas)}")
        await self.coordinator.start()
        self.gateway.arguments.append(f"--coordinator={reachable(self.coordinator.addresses['grpc'])}")
        await self.gateway.start()
        await asyncio.gather(*(child.serving() for child in self.all if "grpc" in child.addresses))

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


def _replicas(launcher: Launcher, stage: str, count: int) -> list[Child]:
    names = [stage] if count == 1 else [f"{stage}-{index}" for index in range(count)]
    return [launcher.stages((stage,), name) for name in names]


def run_split(settings: UpSettings, said: Mapping[str, str]) -> None:
    """Run all roles until a signal. Raises ColaserveError when one of them cannot start."""
    check_ports(settings)
    check_tls(settings)

    async def assemble(host: Host) -> None:
        children = Children(settings, said)
        host.stack.push_async_callback(children.kill)
        folder = await in_thread(settings.folder)  # fetched once; where the bundled one is missing, this says so once
        for child in children.all[:-1]:  # all but the gateway
            child.arguments.append(f"--model={folder}")
        await unless_one_ends(children.all, children.start())
        host.addresses, host.description = children.addresses, description(folder)
        watch = asyncio.ensure_future(children.keep_running())

        async def drain(seconds: float) -> None:
            watch.cancel()
            await children.stop(signal.SIGTERM if seconds else signal.SIGINT)

        host.drains.append(drain)

    run("colaserve", settings, assemble)


async def unless_one_ends(children: Sequence[Child], work: Awaitable[None]) -> None:
    """Do the work; raise ColaserveError when one of the processes ends before it is done."""
    task, ends = asyncio.ensure_future(work), {asyncio.ensure_future(child.ended()): child for child in children}
    try:
        await asyncio.wait([task, *ends], return_when=asyncio.FIRST_COMPLETED)
        if fallen := next((child for end, child in ends.items() if end.done()), None):
            raise fallen.fault()
        await task
    finally:
        for pending in (task, *ends):
            pending.cancel()
        await asyncio.gather(task, *ends, return_exceptions=True)
