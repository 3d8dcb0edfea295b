"""A colaserve system of our own for the time of a benchmark: `colaserve up`, in one process or split."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colaserve_bench.stages import ComputeSettings
from colaserve_client import AsyncClient
from colaserve_services.errors import Unavailable
from colaserve_services.launch.process import EXIT_WITH_PARENT

_STOP_SECONDS = 30.0  # after SIGTERM, then SIGKILL


@dataclass(frozen=True)
class SystemSettings:
    """How `colaserve up` is started."""

    compute: ComputeSettings  # threads: of each process
    split: bool = False
    arguments: tuple[str, ...] = ()  # further ones, as on the command line
    start_seconds: float = 300.0

    @property
    def name(self) -> str:
        """As tables call it."""
        threads = self.compute.threads or "default"
        return f"split, {threads} threads each" if self.split else f"one process, {threads} threads"


@asynccontextmanager
async def running(settings: SystemSettings) -> AsyncIterator[str]:
    """Start it, wait until it serves, give the coordinator's address, stop it. Raises Unavailable."""
    with tempfile.TemporaryDirectory(prefix="colaserve-bench-") as folder:
        ports = Path(folder) / "ports.json"
        process = await _start(settings, ports)
        try:
            target = await asyncio.wait_for(_address(process, ports), settings.start_seconds)
            async with AsyncClient(target) as client:
                await client.wait_until_ready(settings.start_seconds)
            yield target
        except TimeoutError as error:
            raise Unavailable(f"colaserve up did not start within {settings.start_seconds:g} s") from error
        finally:
            await _stop(process)


async def _start(settings: SystemSettings, ports: Path) -> asyncio.subprocess.Process:
    compute = settings.compute
    threads = [] if compute.threads is None else [f"--threads={compute.threads}"]
    split = ["--split"] if settings.split else []
    free = ["--grpc-port=0", "--http-port=0", "--metrics-port=0"]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "colaserve_services.launch", "up", *split, f"--model={compute.model}",
        f"--dtype={compute.dtype}", f"--device={compute.device}", *threads, *free, f"--ports-file={ports}",
        "--drain-seconds=0", "--log-level=warning", *settings.arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, EXIT_WITH_PARENT: "1"},
        start_new_session=True,  # Ctrl-C reaches this process, which stops that one
    )  # fmt: skip


async def _address(process: asyncio.subprocess.Process, ports: Path) -> str:
    while not (addresses := await asyncio.to_thread(_addresses, ports)):
        if process.returncode is not None:
            raise Unavailable(f"colaserve up ended with exit code {process.returncode}; its message is above")
        await asyncio.sleep(0.1)
    return str(addresses.get("coordinator", addresses)["grpc"])


def _addresses(ports: Path) -> dict[str, Any]:
    """Empty until the system has written them, which it does at once."""
    return json.loads(ports.read_text(encoding="utf-8")) if ports.exists() else {}


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
