"""A role's process under `up --split`: started, reached, started again when it dies."""

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve_services.errors import ColaserveError, UsageError
from colaserve_services.launch.process import EXIT_WITH_PARENT
from colaserve_services.rpc.channels import open_channel
from colaserve_services.rpc.server import LIVENESS
from colaserve_services.rpc.settings import ChannelSettings

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
        """Start it and learn its addresses. Raises UsageError or ColaserveError when it ends before."""
        self._pipes.close()  # of the one before
        self._ready = None
        reading, writing = os.pipe()
        reader = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
        )
        self._pipes.callback(pipe.close)
        await self._execute(writing)
        text = (await reader.read(1 << 16)).decode()
        if not text:
            await self.ended()
            raise self.fault()
        self.addresses, end = json.JSONDecoder().raw_decode(text)
        self._ready = asyncio.ensure_future(_more(reader, text[end:]))
        self._pipes.callback(self._ready.cancel)

    async def _execute(self, writing: int) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "colaserve_services.launch", self.role, *self.arguments,
                *self._same_ports(), f"--ports-file=/dev/fd/{writing}",
                stdin=asyncio.subprocess.PIPE,  # closed by the system if this process dies: the child then ends too
                env={**self.environment, EXIT_WITH_PARENT: "1"},
                pass_fds=(writing,),
                start_new_session=True,  # Ctrl-C reaches this process, which stops the others in order
            )  # fmt: skip
        finally:
            os.close(writing)
        self._running.set()

    def _same_ports(self) -> list[str]:
        """The ports that it had: others know them."""
        ports = {kind: re.search(r":(\d+)(?:/|$)", address) for kind, address in self.addresses.items()}
        return [f"--{kind}-port={found[1]}" for kind, found in ports.items() if found]

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
        self.kill()

    async def stop(self, number: int) -> None:
        """End it by a signal; by force when it takes longer than its drain and its grace."""
        if self._process is None:
            return
        self.signal(number)
        try:
            await asyncio.wait_for(self._process.wait(), self.stop_seconds + KILL_SECONDS)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        self._pipes.close()

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send it a signal, where it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


async def _more(reader: asyncio.StreamReader, rest: str) -> None:
    """Return when something follows: a process tells its ports once more when it is ready."""
    if not rest and not await reader.read(1 << 16):
        await asyncio.Event().wait()  # it ended instead


def reachable(address: str) -> str:
    """Where a server that listens on all addresses is found from here."""
    return address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
