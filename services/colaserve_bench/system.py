"""The system that a benchmark calls: one that runs, or `colaserve up` of our own, in one process or split; and requests
for it, and what became of each."""

import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from colaserve_bench.verbs import DEVICE_OPTION, DTYPE_OPTION, FOLDER, POSITIVE, THREADS_OPTION
from colaserve_client import AsyncClient, ColaserveError, ModelInfo, Retry, Sampler
from colaserve_services.errors import Unavailable, UsageError
from colaserve_services.launch.process import EXIT_WITH_PARENT

_STOP_SECONDS = 30.0  # after SIGTERM, then SIGKILL
_START_SECONDS = 300.0

TARGET_OPTIONS = (
    click.option("--target", help="Address of a running coordinator or `colaserve up`, host:port."),
    click.option("--key", envvar="COLASERVE_KEY", help="Bearer key for --target."),
    click.option("--model", type=FOLDER, help="Checkpoint, with --start."),
    DTYPE_OPTION,
    DEVICE_OPTION,
    THREADS_OPTION,
    click.option("--split-threads", type=POSITIVE, help="Of each process when split [`up --split` chooses]."),
    click.option("--up-option", multiple=True, help="Further option of `colaserve up`, such as --max-context=4096."),
    click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds, of one request."),
    click.option(
        "--seed", type=int, default=lambda: secrets.randbits(32),
        help="Of the prompts [random, so that no cache has seen them].",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class System:
    """The address of what runs, or what `colaserve up` is started with."""

    name: str  # as tables call it
    target: str | None = None
    up_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Running:
    """A system that runs; `session`: of the processes of one that was started, 0 for another."""

    target: str
    session: int = 0

    def cpu_seconds(self) -> float:
        """User and system time that its processes have taken (Linux; 0 elsewhere, and for a system of others)."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat") if self.session else ():
            with contextlib.suppress(OSError):  # it has just ended
                values = stat.read_text().rpartition(")")[2].split()  # from the third on, see proc(5)
                ticks += sum(map(int, values[11:13])) if int(values[3]) == self.session else 0
        return ticks / os.sysconf("SC_CLK_TCK")


def systems_of(options: Mapping[str, Any]) -> list[System]:
    """Of TARGET_OPTIONS and --start: one, or both that can be started."""
    if (options["target"] is None) == (options["start"] is None):
        raise UsageError("--target or --start: expected one of them")
    if options["target"] is not None:
        return [System(options["target"], options["target"])]
    if options["model"] is None:
        raise UsageError("--model: needed with --start")
    shared = [f"--{name}={options[name]}" for name in ("model", "dtype", "device")]

    def started(name: str, threads: int | None, *own: str) -> System:
        more = [] if threads is None else [f"--threads={threads}"]
        up = (*own, *shared, *more, *options["up_option"])
        return System(name.format(threads or "default"), up_options=up)

    systems = {
        "up": started("one process, {} threads", options["threads"]),
        "split": started("split, {} threads each", options["split_threads"], "--split"),
    }
    return [system for name, system in systems.items() if options["start"] in (name, "both")]


@asynccontextmanager
async def running(system: System) -> AsyncIterator[Running]:
    """One of our own is started, waited for and stopped. Raises Unavailable."""
    if system.target is not None:
        yield Running(system.target)
        return
    with tempfile.TemporaryDirectory(prefix="colaserve-bench-") as folder:
        ports = Path(folder) / "ports.json"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "colaserve_services.launch", "up", "--grpc-port=0", "--http-port=0",
            "--metrics-port=0", f"--ports-file={ports}", "--drain-seconds=0", "--log=auto:warning", *system.up_options,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
            env={**os.environ, EXIT_WITH_PARENT: "1"},
            start_new_session=True,  # Ctrl-C reaches this process, which stops that one
        )  # fmt: skip
        try:
            yield Running(await asyncio.wait_for(_ready(process, ports), _START_SECONDS), process.pid)
        except TimeoutError as error:
            raise Unavailable(f"colaserve up did not start within {_START_SECONDS:g} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _ready(process: asyncio.subprocess.Process, ports: Path) -> str:
    """The address, once the system has written it, which it does at once, and answers there."""
    while not await asyncio.to_thread(ports.exists):
        if process.returncode is not None:
            raise Unavailable(f"colaserve up ended with exit code {process.returncode}; its message is above")
        await asyncio.sleep(0.1)
    addresses = json.loads(await asyncio.to_thread(ports.read_text, encoding="utf-8"))
    target = str(addresses.get("coordinator", addresses)["grpc"])
    async with AsyncClient(target) as client:
        await client.wait_until_ready(_START_SECONDS)
    return target


Request = dict[str, Any]  # what `client.stream` is called with


@dataclass(frozen=True)
class Mix:
    """Lengths that requests draw from, each with equal chance, in tokens."""

    prompt_tokens: Sequence[int]
    new_tokens: Sequence[int]
    sampler: Sampler = field(default_factory=Sampler)  # unset: the server's defaults
    watched: Mapping[str, Any] = field(default_factory=dict)  # previews or probes that are asked for

    def requests(self, info: ModelInfo, seed: str) -> Iterator[Request]:
        """Endless; random prompts, so that no prefix cache knows one. None of them ends before its budget."""
        draw, usable = random.Random(seed), usable_ids(info)
        while True:
            prompt = draw.choices(usable, k=draw.choice(self.prompt_tokens))
            budget = draw.choice(self.new_tokens)
            settings = {"sampler": self.sampler, "seed": draw.getrandbits(32), "ignore_end": True, **self.watched}
            yield {"prompt": prompt, "max_new_tokens": budget, **settings}


def usable_ids(info: ModelInfo) -> list[int]:
    """All but those that end or pad."""
    return [i for i in range(info.model.vocab_size) if i not in info.end_ids and i != info.pad_id]


@dataclass
class Record:
    """One request. Times are time.monotonic() seconds."""

    due: float  # when it should have been sent: waiting for the load generator counts too
    blocks: list[float] = field(default_factory=list)  # arrivals
    tokens: list[int] = field(default_factory=list)  # of each block
    finished: float | None = None
    error: str = ""  # the status code; empty while it runs and when all went well

    @property
    def first_block(self) -> float | None:
        """Seconds until the first block."""
        return self.blocks[0] - self.due if self.blocks else None

    def is_good(self, first: float, gap: float) -> bool:
        """No error, and both time to first block and mean time between blocks within these seconds."""
        if self.error or self.first_block is None:
            return False
        mean_gap = (self.blocks[-1] - self.blocks[0]) / max(1, len(self.blocks) - 1)
        return self.first_block <= first and mean_gap <= gap


@asynccontextmanager
async def connected(system: Running, key: str | None, seconds: float) -> AsyncIterator[AsyncClient]:
    """A client that retries nothing, so that every error is seen. What ends the benchmark is Unavailable."""
    try:
        async with AsyncClient(system.target, key=key, timeout=seconds, retry=Retry(attempts=1)) as client:
            yield client
    except ColaserveError as error:
        raise Unavailable(f"{system.target}: {type(error).__name__}: {error}") from error


async def send(client: AsyncClient, request: Request, record: Record) -> None:
    """Stream one request into its record; a failure becomes its `error`."""
    try:
        async with client.stream(**request) as stream:
            async for chunk in stream:
                if chunk.token_ids:
                    record.blocks.append(time.monotonic())
                    record.tokens.append(len(chunk.token_ids))
    except ColaserveError as error:
        code = getattr(error.__cause__, "code", None)
        record.error = str(code().name) if callable(code) else type(error).__name__
    record.finished = time.monotonic()


async def closed_loop(client: AsyncClient, requests: Iterator[Request], concurrency: int, until: float) -> list[Record]:
    """So many requests at all times until then; those that run at the end are left as they are and cancelled."""
    records: list[Record] = []

    async def work() -> None:
        while time.monotonic() < until:
            records.append(record := Record(time.monotonic()))
            await send(client, next(requests), record)
            if record.error:
                await asyncio.sleep(0.1)  # a refusal comes at once; a caller would not ask again at once either

    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
    except TimeoutError:
        pass
    return records


async def open_loop(
    client: AsyncClient, requests: Iterator[Request], rate: float, until: float, seed: int
) -> list[Record]:
    """Poisson arrivals, `rate` a second until then; all are awaited, however long they take."""
    draw, due, records = random.Random(seed), time.monotonic(), list[Record]()
    async with asyncio.TaskGroup() as group:
        while (due := due + draw.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            records.append(record := Record(due))
            group.create_task(send(client, next(requests), record))
    return records
