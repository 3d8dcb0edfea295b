"""The server under attack, a process of its own, and the well-behaved caller beside the attacks, another one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import psutil

KEY = "abuse-key"
OURS = f"{shlex.quote(sys.executable)} -m colaserve_services.launch up"
START_SECONDS = 180.0
_GAUGES = re.compile(
    r"^colaserve_(requests_in_progress|engine_running|engine_queue_depth|engine_kv_bytes)\S* (\S+)$", re.M
)
_KV = re.compile(r"^colaserve_(engine_kv|prefix_cache)_bytes\{\S* (\S+)$", re.M)  # held, and kept for others


class Server:
    """`command` with a key, one thread and free ports."""

    def __init__(self, command: str, folder: Path):
        self._command, self._folder = command, folder

    async def start(self) -> None:
        ports, log = self._folder / "ports", self._folder / "log"
        arguments = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
        ports.unlink(missing_ok=True)
        keys = self._folder / "keys"
        keys.write_text(f"{KEY}\n", encoding="utf-8")
        with log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *shlex.split(self._command), *arguments, f"--ports-file={ports}", "--threads=1", "--idle-seconds=3",
                stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output,
                env=os.environ | {"COLASERVE_API_KEYS_FILE": str(keys), "COLASERVE_EXIT_WITH_PARENT": "1"},
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while not ports.exists():
            if self._process.returncode is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            await asyncio.sleep(0.1)
        addresses = json.loads(ports.read_text(encoding="utf-8"))
        self.grpc = addresses["grpc"].replace("0.0.0.0", "127.0.0.1")
        self.grpc_port, self.http_port, self.metrics_port = (
            int(re.findall(r":(\d+)", addresses[name])[-1]) for name in ("grpc", "http", "metrics")
        )
        self.level = 0  # bytes of memory after the warm-up

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    def note_level(self) -> None:
        """What it takes now is what attacks are compared with."""
        self.level = psutil.Process(self._process.pid).memory_info().rss

    def forget_peak(self) -> None:
        """Measure the peak of memory anew from here on."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5", encoding="ascii")

    def peak_above_level(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return max(0, int(found[1]) * 1024 - self.level) if found else 0

    @contextlib.asynccontextmanager
    async def watching_kv(self) -> AsyncIterator[list[int]]:
        """A list that grows by the bytes in use of all KV caches, about once a second."""
        seen = [0]

        async def watch() -> None:
            while True:
                with contextlib.suppress(OSError):
                    text = await asyncio.to_thread(self._metrics)
                    held: Counter[str] = Counter()
                    for kind, value in _KV.findall(text):
                        held[kind] += round(float(value))
                    seen.append(max(held.values(), default=0))  # most pages that are kept are held, too, or were
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        try:
            yield seen
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def left_over(self, seconds: float = 20.0) -> str:
        """What does not come back to zero: calls, sessions, queues, KV."""
        end, left = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            left = await asyncio.to_thread(self._left_over)
            if not left:
                return ""
            await asyncio.sleep(0.3)
        return left

    def _left_over(self) -> str:
        try:
            text = self._metrics()
        except OSError as error:
            return f"no metrics: {error}"
        held = {line[0]: line[1] for line in _GAUGES.findall(text) if float(line[1])}
        return ", ".join(f"{name} {float(value):g}" for name, value in held.items())

    def _metrics(self) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        text: str = urllib.request.urlopen(url, timeout=10).read().decode()
        return text

    async def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 3)
                return


class Delay(NamedTuple):
    """One call of the bystander."""

    code: str
    seconds: float


class Bystander:
    """A caller in a process of its own: 8 tokens, back to back."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process, self._delays = process, asyncio.Queue[Delay]()
        self._begun: float | None = None  # of the call that runs
        self._reading = asyncio.create_task(self._read())

    @staticmethod
    async def start(server: Server) -> Bystander:
        """A process that calls nobody yet."""
        return Bystander(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.abuse.bystander", server.grpc, KEY,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )
        )  # fmt: skip

    async def answers(self, count: int, seconds: float) -> list[Delay]:
        """So many more, or as many as come in time and the one that has not come, as it stands."""
        while not self._delays.empty():  # of a call that was not waited for
            self._delays.get_nowait()
        self._want(count)
        delays: list[Delay] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(delays) < count:
                    delays.append(await self._delays.get())
        self._want(0)
        if len(delays) < count and self._begun is not None:
            delays.append(Delay("unfinished", time.monotonic() - self._begun))
        return delays

    async def end(self) -> None:
        """Whatever it still waits for."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def _want(self, count: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n".encode())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            code, seconds = line.decode().split()
            self._begun = float(seconds) if code == "begun" else None
            if code != "begun":
                self._delays.put_nowait(Delay(code, float(seconds)))
