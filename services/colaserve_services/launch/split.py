"""`up --split`: every role a process of its own on this machine, started, watched and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve_services.errors import ColaserveError
from colaserve_services.launch import threads
from colaserve_services.launch.process import EXIT_WITH_PARENT, keep_grpc, write_ports
from colaserve_services.launch.signals import Signals
from colaserve_services.rpc.channels import open_channel
from colaserve_services.rpc.settings import ChannelSettings

STAGES = ("encoder", "prior", "decoder")
LOOK_SECONDS = 0.1  # between two looks at a child that starts
PRIVATE = ("--host=127.0.0.1", "--grpc-port=0")  # only the coordinator and the gateway are for others
KILL_SECONDS = 10.0  # beyond the drain and the grace, then SIGKILL

KEY_VARIABLES = {"COLASERVE_API_KEYS", "COLASERVE_API_KEYS_FILE"}  # clients do not reach the stages

Arguments = Mapping[str, Sequence[str]]  # role -> its command-line arguments


@dataclass(frozen=True)
class SplitSettings:
    """What the parent itself needs."""

    arguments: Arguments
    environment: Mapping[str, Mapping[str, str]]  # role -> its keys
    threads: int | None
    stop_seconds: float  # a child's drain and grace
    ports_file: Path | None
    channel: ChannelSettings  # how the roles reach each other, and this process their health


class Children:
    """The processes, in the order of their start."""

    def __init__(self, settings: SplitSettings, folder: Path):
        self._settings, self._folder = settings, folder
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self.addresses: dict[str, dict[str, str]] = {}

    async def start(self, role: str, *more: str) -> None:
        """Start a role; its ports are known later, see `wait_for_ports`."""
        arguments = [*self._settings.arguments[role], *more, "--ports-file", str(self._file(role))]
        self._running[role] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "colaserve_services.launch",
            role,
            *arguments,
            stdin=asyncio.subprocess.PIPE,  # closed by the system if this process dies: the child then ends too
            env=self._environment(role),
            start_new_session=True,  # Ctrl-C reaches this process, which stops the others in order
        )

    def _environment(self, role: str) -> dict[str, str]:
        shared = {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}
        own = self._settings.environment.get(role, {})
        return {**shared, **threads.share(self._settings.threads), **own, EXIT_WITH_PARENT: "1"}

    async def wait_for_ports(self, role: str) -> dict[str, str]:
        """The addresses that a role took. Raises ColaserveError when a child ends instead."""
        while not self._file(role).exists():
            self.check()
            await asyncio.sleep(LOOK_SECONDS)
        self.addresses[role] = json.loads(self._file(role).read_text(encoding="utf-8"))
        return self.addresses[role]

    async def wait_for_health(self, role: str) -> None:
        """Until a role says SERVING."""
        target = _reachable(self.addresses[role]["grpc"])
        async with open_channel(target, self._settings.channel, service="") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                self.check()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(LOOK_SECONDS)

    def check(self) -> None:
        """Raise ColaserveError when a child has ended."""
        for role, process in self._running.items():
            if process.returncode is not None:
                raise ColaserveError(f"{role} ended with exit code {process.returncode}; stopping the others")

    async def wait_for_any_end(self) -> None:
        """Return when a child has ended."""
        waits = [asyncio.ensure_future(process.wait()) for process in self._running.values()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def stop(self, number: int = signal.SIGTERM) -> None:
        """Callers before the called, so that what runs can end: gateway, coordinator, stages."""
        for roles in (("gateway",), ("coordinator",), STAGES):
            await asyncio.gather(*(self._stop(self._running[role], number) for role in roles if role in self._running))

    async def _stop(self, process: asyncio.subprocess.Process, number: int) -> None:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        try:
            await asyncio.wait_for(process.wait(), self._settings.stop_seconds + KILL_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def kill(self) -> None:
        """End all at once."""
        for process in self._running.values():
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*(process.wait() for process in self._running.values()))

    def _file(self, role: str) -> Path:
        return self._folder / f"{role}.json"


def _reachable(address: str) -> str:
    """Where a server that listens on all addresses is found from here."""
    return address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")


def run_split(settings: SplitSettings) -> None:
    """Run all roles until a signal. Raises ColaserveError when one of them ends by itself."""
    with tempfile.TemporaryDirectory(prefix="colaserve-") as folder:
        asyncio.run(_run(settings, Path(folder)))


async def _run(settings: SplitSettings, folder: Path) -> None:
    keep_grpc()
    children, signals = Children(settings, folder), Signals()
    number: int | None = None
    try:
        number = await signals.ended(_start_and_watch(children, settings))
    finally:
        if await signals.ended(children.stop(number or signal.SIGTERM)):
            await children.kill()


async def _start_and_watch(children: Children, settings: SplitSettings) -> None:
    started = time.monotonic()
    for stage in STAGES:
        await children.start(stage, *PRIVATE, "--metrics-port=0", "--drain-seconds=0")
    targets = [f"--{stage}={(await children.wait_for_ports(stage))['grpc']}" for stage in STAGES]
    await children.start("coordinator", *targets)
    coordinator = (await children.wait_for_ports("coordinator"))["grpc"]
    await children.start("gateway", "--metrics-port=0", f"--coordinator={_reachable(coordinator)}")
    await children.wait_for_ports("gateway")
    for role in (*STAGES, "coordinator"):
        await children.wait_for_health(role)
    if settings.ports_file is not None:
        write_ports(settings.ports_file, children.addresses)
    print(f"colaserve ready after {time.monotonic() - started:.1f} s, one process a role:", flush=True)
    for role, addresses in children.addresses.items():
        print(f"  {role:12}" + ", ".join(f"{kind} {address}" for kind, address in addresses.items()), flush=True)
    await children.wait_for_any_end()
    children.check()
