"""`up` in several processes on this machine, started, watched and stopped together: with --split one a role; with a
GPU one for the stages of each, beside the coordinator and the gateway, which share the first process.

What dies is started again on the same ports, as in Kubernetes: streams go on with another replica where there is one.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve_services.errors import ColaserveError, UsageError
from colaserve_services.launch.options import STAGES
from colaserve_services.launch.process import EXIT_WITH_PARENT, Host, check_ports, description, in_thread, run
from colaserve_services.launch.settings import ROLE_KEY, UpSettings, check_tls, role_key
from colaserve_services.rpc.channels import open_channel
from colaserve_services.rpc.server import LIVENESS
from colaserve_services.rpc.settings import ChannelSettings

PRIVATE = ("--host=127.0.0.1", "--grpc-port=0", "--metrics-port=0", "--drain-seconds=0")  # not for others
KEYS_FILE = "COLASERVE_API_KEYS_FILE"  # clients do not reach the stages
EDGES = ("coordinator", "gateway")
OWN = ("COLASERVE_PORTS_FILE", "COLASERVE_SPLIT", "COLASERVE_REPLICAS")  # of the process that starts the others
LOOK_SECONDS = 0.1  # between two looks at the health of a child that starts
REACH_SECONDS = 15.0  # in which one that says that it is ready is to be reached
KILL_SECONDS = 10.0  # beyond the drain and the grace, then SIGKILL
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a child that died again starts again; the first time none
CALM_SECONDS = 600.0  # a child that ran so long has not died again, but anew

_MISUSE = 2  # exit code: the options do not fit this machine or each other
_WAITING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Liveness:
    """When a child that runs but does not answer, or says that it cannot compute, is ended: as in Kubernetes."""

    period: float = 10.0  # seconds between two questions
    timeout: float = 5.0  # of one
    failures: int = 6  # in a row


@dataclass(eq=False)
class Child:
    """One process, and the ones that take its place on the same ports."""

    name: str  # the role, with a number where it has several replicas
    role: str
    arguments: list[str]
    environment: Mapping[str, str]
    channel: ChannelSettings  # how its health is asked for
    stop_seconds: float  # its drain and grace
    liveness: Liveness = Liveness()
    addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._running = asyncio.Event()
        self._pipes = contextlib.ExitStack()
        self._ready: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Start it, on the ports that it had, if it had any: others know them; and learn its addresses. Raises
        UsageError or ColaserveError when it ends before."""
        self._pipes.close()  # of the one before
        self._ready = None
        ports = {kind: re.search(r":(\d+)(?:/|$)", address) for kind, address in self.addresses.items()}
        same = [f"--{kind}-port={found[1]}" for kind, found in ports.items() if found]
        reading, writing = os.pipe()
        reader = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
        )
        self._pipes.callback(pipe.close)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "colaserve_services.launch", self.role, *self.arguments, *same,
                f"--ports-file=/dev/fd/{writing}",
                stdin=asyncio.subprocess.PIPE,  # closed by the system if this process dies: the child then ends too
                env={**self.environment, EXIT_WITH_PARENT: "1"},
                pass_fds=(writing,),
                start_new_session=True,  # Ctrl-C reaches this process, which stops the others in order
            )  # fmt: skip
        finally:
            os.close(writing)
        self._running.set()
        text = (await reader.read(1 << 16)).decode()
        if not text:
            await self.ended()
            raise self.fault()
        self.addresses, end = json.JSONDecoder().raw_decode(text)

        async def ready() -> None:
            """Return when something follows: a process tells its ports once more when it is ready."""
            if not text[end:] and not await reader.read(1 << 16):
                await asyncio.Event().wait()  # it ended instead

        self._ready = asyncio.ensure_future(ready())
        self._pipes.callback(self._ready.cancel)

    async def ended(self) -> None:
        """Return when it has ended."""
        await self._running.wait()
        assert self._process is not None
        await self._process.wait()

    def fault(self) -> ColaserveError:
        """What to tell of one that ended by itself: its options do not fit, or it cannot serve."""
        code = None if self._process is None else self._process.returncode
        kind = UsageError if code == _MISUSE else ColaserveError
        return kind(f"{self.name} ended with exit code {code}; stopping the others")

    async def serving(self) -> None:
        """Return when its health says SERVING. Raises ColaserveError where waiting will not help: it refuses to answer,
        or says that it is ready and is not reached."""
        target, ready_at = reachable(self.addresses["grpc"]), math.inf
        async with open_channel(target, self.channel, service="") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                try:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _WAITING or time.monotonic() > ready_at + REACH_SECONDS:
                        why = error.details() or error.code().name
                        message = f"the {self.name} at {target} cannot be reached: {why}"
                        raise ColaserveError(message) from error
                if self._ready is not None and self._ready.done():
                    ready_at = min(ready_at, time.monotonic())
                await asyncio.sleep(LOOK_SECONDS)

    async def keep_running(self) -> None:
        """Start it again whenever it ends or is not alive; pauses grow while it dies soon. Never returns."""
        deaths = 0
        while True:
            began = time.monotonic()
            watch = asyncio.ensure_future(self._end_if_not_alive())
            try:
                await self.ended()
            finally:
                watch.cancel()
            deaths = 1 if time.monotonic() - began > CALM_SECONDS else deaths + 1
            pause = 0.0 if deaths == 1 else min(FIRST_PAUSE * 2 ** (deaths - 2), LONGEST_PAUSE)
            _log.error("%s: it starts again in %g s", str(self.fault()).partition(";")[0], pause)
            await asyncio.sleep(pause)
            with contextlib.suppress(ColaserveError):  # it ended before it had its ports: so again
                await self.start()

    async def _end_if_not_alive(self) -> None:
        if "grpc" not in self.addresses:
            return
        failures = 0
        async with open_channel(reachable(self.addresses["grpc"]), self.channel, service="") as channel:
            stub, question = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service=LIVENESS)
            started = False  # while it reads weights nobody answers
            while failures < self.liveness.failures:
                await asyncio.sleep(self.liveness.period)
                try:
                    answer = await stub.Check(question, timeout=self.liveness.timeout)
                    alive = answer.status == health_pb2.HealthCheckResponse.SERVING
                except grpc.aio.AioRpcError:
                    alive = False
                started = started or alive
                failures = 0 if alive or not started else failures + 1
        _log.error("%s is not alive: ending it", self.name)
        self.signal(signal.SIGKILL)

    async def stop(self, number: int) -> None:
        """End it by a signal; by force when it takes longer than its drain and its grace."""
        if self._process is None:
            return
        self.signal(number)
        try:
            await asyncio.wait_for(self._process.wait(), self.stop_seconds + KILL_SECONDS)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self._process.wait()
        self._pipes.close()

    def signal(self, number: int) -> None:
        """Send it a signal, where it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def reachable(address: str) -> str:
    """Where a server that listens on all addresses is found from here."""
    return address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")


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
        launcher, self.stages = Launcher(settings, said), dict[str, list[Child]]()
        for stage in STAGES:
            count = settings.replicas.get(stage, 1)
            names = [stage] if count == 1 else [f"{stage}-{index}" for index in range(count)]
            self.stages[stage] = [launcher.stages((stage,), name) for name in names]
        self.coordinator, self.gateway = launcher.child("coordinator"), launcher.child("gateway", "--metrics-port=0")

    @property
    def all(self) -> list[Child]:
        """All processes."""
        return [*(child for stage in self.stages.values() for child in stage), self.coordinator, self.gateway]

    async def start(self) -> None:
        """Start all and return when they serve. Raises what the first one that fails says."""
        await asyncio.gather(*(child.start() for stage in self.stages.values() for child in stage))
        for stage, replicas in self.stages.items():
            self.coordinator.arguments.append(f"--{stage}={','.join(child.addresses['grpc'] for child in replicas)}")
        await self.coordinator.start()
        self.gateway.arguments.append(f"--coordinator={reachable(self.coordinator.addresses['grpc'])}")
        await self.gateway.start()
        await asyncio.gather(*(child.serving() for child in self.all if "grpc" in child.addresses))

    async def stop(self, number: int) -> None:
        """Callers before the called, so that what runs can end: gateway, coordinator, stages."""
        stages = [child for stage in self.stages.values() for child in stage]
        for children in ([self.gateway], [self.coordinator], stages):
            await asyncio.gather(*(child.stop(number) for child in children))

    async def kill(self) -> None:
        """End all at once."""
        await asyncio.gather(*(child.stop(signal.SIGKILL) for child in self.all))


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
        host.addresses = {child.name: child.addresses for child in children.all}
        host.description = description(folder)
        watches = [asyncio.ensure_future(child.keep_running()) for child in children.all]

        async def drain(seconds: float) -> None:
            for watch in watches:
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
