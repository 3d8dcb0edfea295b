"""A fleet of real processes, one thread each, on fixed ports: started, killed, drained and started again.

async with Fleet(FleetSettings(folder)) as fleet:
    await fleet.replicas["prior"][0].kill()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import GOLDEN

STAGES = ("encoder", "prior", "decoder")
ROLES = (*STAGES, "coordinator", "gateway")
SIZES = {"encoder": 2, "prior": 3, "decoder": 3, "coordinator": 2, "gateway": 1}
SMALL = {"encoder": 2, "prior": 2, "decoder": 2, "coordinator": 2, "gateway": 1}
SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True)
class FleetSettings:
    """Which processes, and how they are started."""

    folder: Path  # of the logs
    model: Path = GOLDEN / "tiny_b4"
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)
    through: Mapping[str, str] = field(default_factory=dict)  # stage: address that its callers get instead
    environment: Mapping[str, str] = field(default_factory=dict)
    tls: Path | None = None  # a folder of stages' and one of coordinators' --tls: the stages are called with TLS
    drain_seconds: float = 2.0
    grace_seconds: float = 20.0
    start_seconds: float = 180.0


class Replica:
    """One process of a role. It keeps its ports over all its lives."""

    def __init__(self, role: str, index: int, settings: FleetSettings):
        self.role, self.name, self.settings = role, f"{role}-{index}", settings
        self.port, self.metrics_port = free_port(), free_port()
        self.arguments: tuple[str, ...] = ()
        self.lives = 0
        self.process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def start(self) -> None:
        """Start it; it serves some seconds later."""
        assert not self.running
        port = "--http-port" if self.role == "gateway" else "--grpc-port"
        model = () if self.role == "gateway" else (f"--model={self.settings.model}",)
        self.lives += 1
        with self._log().open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "colaserve_services.launch", self.role, f"{port}={self.port}",
                f"--metrics-port={self.metrics_port}", f"--drain-seconds={self.settings.drain_seconds}",
                f"--grace-seconds={self.settings.grace_seconds}", *model, *self.arguments,
                *(("--threads=1",) if self.role in STAGES else ()), *self._tls(),
                stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output, env=self._environment(),
            )  # fmt: skip

    def _tls(self) -> tuple[str, ...]:
        folder = self.settings.tls
        if folder is None or self.role == "gateway":
            return ()
        return (f"--tls={folder / ('coordinators' if self.role == 'coordinator' else 'stages')}",)

    async def kill(self) -> None:
        """SIGKILL: it says goodbye to nobody."""
        await self._end(signal.SIGKILL)

    async def terminate(self) -> int:
        """SIGTERM: it drains. The exit code."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: int) -> int:
        process = self.process
        if process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        return await process.wait()

    async def serving(self) -> bool:
        """Whether it says so itself."""
        if not self.running:
            return False
        return await (self._ready_over_http() if self.role == "gateway" else self._healthy())

    async def until_serving(self) -> None:
        """Raise what its log says when it ends instead."""
        end = time.monotonic() + self.settings.start_seconds
        while not await self.serving():
            if not self.running or time.monotonic() > end:
                code = self.process.returncode if self.process else None
                raise RuntimeError(f"{self.name} does not serve, exit code {code}:\n{self.log_text()[-3000:]}")
            await asyncio.sleep(0.1)

    def memory(self) -> psutil.Process:
        """The running process, to be looked at."""
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def log_text(self) -> str:
        return self._log().read_text(encoding="utf-8", errors="replace")

    async def _healthy(self) -> bool:
        async with self._channel() as channel:
            try:
                check = health_pb2_grpc.HealthStub(channel).Check
                return bool((await check(health_pb2.HealthCheckRequest(), timeout=2)).status == SERVING)
            except grpc.aio.AioRpcError:
                return False

    def _channel(self) -> grpc.aio.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if self.settings.tls is None or self.role not in STAGES:
            return grpc.aio.insecure_channel(self.address, options)
        ca = (self.settings.tls / "coordinators" / "ca.crt").read_bytes()
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(ca), options)

    async def _ready_over_http(self) -> bool:
        return bool(await get(self.port, "/ready"))

    def _log(self) -> Path:
        return self.settings.folder / f"{self.name}.log"

    def _environment(self) -> dict[str, str]:
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLASERVE_EXIT_WITH_PARENT": "1"}
        return {**os.environ, **quiet, **self.settings.environment}


class Fleet:
    """All replicas, by role. Entering starts them and waits until all serve; leaving kills what is left."""

    def __init__(self, settings: FleetSettings):
        self.settings = settings
        self.replicas = {
            role: [Replica(role, index, settings) for index in range(settings.sizes[role])] for role in ROLES
        }
        self._tell_addresses()

    @property
    def all(self) -> list[Replica]:
        return [replica for role in ROLES for replica in self.replicas[role]]

    @property
    def target(self) -> str:
        """The coordinators, as a gRPC client calls them."""
        return "ipv4:" + self._list("coordinator")

    async def __aenter__(self) -> Fleet:
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        try:
            for replica in self.all:
                await replica.start()
            await asyncio.gather(*(replica.until_serving() for replica in self.all))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(replica.kill() for replica in self.all))

    async def serving(self, role: str) -> list[Replica]:
        """The replicas of a role that serve now."""
        answers = await asyncio.gather(*(replica.serving() for replica in self.replicas[role]))
        return [replica for replica, serves in zip(self.replicas[role], answers, strict=True) if serves]

    async def metric(self, name: str, roles: tuple[str, ...] = ROLES, label: str = "") -> dict[str, float]:
        """The sum of a metric's samples (those with a label, such as 'stage="prior"') by the replica's name."""
        wanted = [replica for role in roles for replica in self.replicas[role]]
        pages = await asyncio.gather(*(get(replica.metrics_port, "/metrics") for replica in wanted))
        return {replica.name: total(page, name, label) for replica, page in zip(wanted, pages, strict=True)}

    def _list(self, role: str) -> str:
        return ",".join(replica.address for replica in self.replicas[role])

    def _tell_addresses(self) -> None:
        through = {stage: self.settings.through.get(stage) or self._list(stage) for stage in STAGES}
        for replica in self.replicas["coordinator"]:
            replica.arguments = tuple(f"--{stage}={address}" for stage, address in through.items())
        for replica in self.replicas["gateway"]:
            replica.arguments = (f"--coordinator={self._list('coordinator')}",)


def free_port() -> int:
    """A port that nobody listens on now, given out once, and below those that the system gives to connections.

    A replica that is killed must find its port free again: out of the system's range, no connection takes it meanwhile.
    """
    while True:
        port = random.randrange(16_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


_given: set[int] = set()


async def get(port: int, path: str) -> str:
    """A page, empty when there is none."""
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{port}{path}")
    except httpx.HTTPError:
        return ""
    return answer.text if answer.is_success else ""


def total(page: str, name: str, label: str = "") -> float:
    """The sum over the samples `name` or `name{...}` of a metrics page."""
    samples = (line for line in page.splitlines() if line.startswith((f"{name} ", f"{name}{{")) and label in line)
    return sum(float(line.rpartition(" ")[2]) for line in samples)


async def eventually(condition: Any, seconds: float) -> bool:
    """Whether an async condition comes true within the seconds."""
    end = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.2)
    return True
