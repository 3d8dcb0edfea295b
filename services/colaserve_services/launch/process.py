"""One process: its servers from the first bind to the last byte of a drain."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
import grpc

from colaserve_client.reading import Unreadable, read_text
from colaserve_client.writing import write_file
from colaserve_services.errors import UsageError
from colaserve_services.launch.settings import Process
from colaserve_services.rpc import logs, tracing
from colaserve_services.rpc.garbage import keep_what_is_there
from colaserve_services.rpc.metrics import Aliases, Metrics, MetricsEndpoint
from colaserve_services.rpc.network import address, listen
from colaserve_services.rpc.server import RpcServer
from colaserve_services.rpc.settings import ServerSettings

LONGEST_DESCRIPTION = 1000  # characters
EXIT_WITH_PARENT = "COLASERVE_EXIT_WITH_PARENT"  # set: end when standard input does, which a dead parent closes

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Signals:
    """SIGTERM, SIGHUP and SIGINT as they come, none lost. Made inside of an event loop, which it is for.

    SIGHUP, which a closing terminal sends, stays ignored where the process was started so, as by nohup.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number in (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,))):
            loop.add_signal_handler(number, self._queue.put_nowait, number)

    async def next(self) -> int:
        """The next one."""
        return await self._queue.get()

    async def ended(self, work: Awaitable[None]) -> int | None:
        """Do the work. The signal that ended it; None when it came to its own end. Raises what the work raises."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.next())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        number = stop.result() if stop.done() else None
        if number is not None and task.done():
            self._queue.put_nowait(number)  # for what comes next
            number = None
        for pending in (task, stop):
            pending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return number


class Host:
    """What a role is assembled on. Everything entered into `stack` ends after the servers, in reverse order."""

    def __init__(self, role: str, settings: Process):
        self.role, self.metrics, self.settings = role, Metrics(), settings
        self.stack = contextlib.AsyncExitStack()
        self.addresses: dict[str, Any] = {}  # by their kind; of several processes by their name, then by their kind
        # One for each server; its argument is for how many seconds it reports not ready before it takes no more calls.
        self.drains: list[Callable[[float], Awaitable[None]]] = []
        self.description = ""  # of the model; announced with the addresses
        self.started = time.monotonic()
        self._grpc: RpcServer | None = None
        self._said_ready, self._behind_ready = False, True
        self._following: asyncio.Future[None] | None = None

    async def open_ports(self, grpc: ServerSettings | None) -> None:
        """Take the metrics port and, if there is to be one, the gRPC port: a taken one is found before any work."""
        settings = self.settings
        self.metrics.watch_process()
        if settings.otlp_endpoint is not None:
            stop_tracing = tracing.start(settings.otlp_endpoint, self.role)
            self.stack.push_async_callback(asyncio.to_thread, stop_tracing)
        if settings.metrics_aliases:
            self.metrics.registry.register(Aliases(self.metrics))
        health = None if grpc is None else self._serves
        endpoint = MetricsEndpoint.start(self.metrics, settings.host, settings.metrics_port, health)
        self.stack.callback(endpoint.close)
        self.addresses["metrics"] = f"http://{address(settings.host, endpoint.port)}/metrics"
        if grpc is not None:
            self._grpc = RpcServer(grpc, self.metrics, settings.keys)
            self.stack.push_async_callback(self._grpc.stop)
            self.drains.append(self._grpc.drain)
            self.addresses["grpc"] = address(grpc.host, self._grpc.bind())

    def is_ready(self) -> bool:
        """Whether calls should come to the gRPC port."""
        return self._grpc is not None and self._grpc.ready

    async def _serves(self, question: str) -> bool:
        """What probes ask for at the metrics port: "live" or "ready"."""
        return self.is_ready() if question == "ready" else self._grpc is not None and self._grpc.alive

    async def serve_grpc(self, *servicers: object, context_bytes: int) -> None:
        """Answer calls; health says NOT_SERVING until `ready`. `context_bytes`: the longest context's latents."""
        assert self._grpc is not None, "open_ports comes first"
        self._grpc.bound_latents(context_bytes)
        for servicer in servicers:
            self._grpc.add(servicer)
        await self._grpc.start()

    def serve_http(self, server: Any, scheme: str = "http") -> None:
        """An HttpServer of the gateway, running."""
        self.drains.append(lambda seconds: server.stop(self.settings.grace_seconds, seconds))
        self.stack.push_async_callback(partial(server.stop, 0.0))
        self.addresses["http"] = f"{scheme}://{address(server.host, server.port)}"

    def publish(self) -> None:
        """Write the ports file; `ready` does it too: this is for those who need them earlier. UsageError: it cannot."""
        if (path := self.settings.ports_file) is None:
            return
        try:
            write_file(path, json.dumps(self.addresses))
        except OSError as error:
            raise UsageError(f"--ports-file: cannot write {path}: {error.strerror or error}") from error

    def follow(self, ready: bool) -> None:
        """Say SERVING or NOT_SERVING from now on, as what lies behind comes and goes."""
        self._behind_ready = ready
        if self._grpc is not None and self._said_ready:
            self._following = asyncio.ensure_future(self._grpc.serving(ready))

    async def failing(self, failing: bool) -> None:
        """What computes here fails, or works again: health tells."""
        if self._grpc is not None:
            await self._grpc.failing(failing)

    async def ready(self) -> None:
        """Say SERVING, and where."""
        self._said_ready = True
        keep_what_is_there()
        if self._grpc is not None:
            await self._grpc.serving(self._behind_ready)
        text = f"{self.role} ready after {time.monotonic() - self.started:.1f} s: {_shown(self.addresses)}"
        self.publish()
        line = "\n".join(filter(None, (text, self.description)))
        if self.settings.log.format == "json":
            said = {"description": self.description} if self.description else {}
            line = _json(self.role, logging.INFO, text.splitlines()[0], {"addresses": self.addresses, **said})
        _print(sys.stdout, line)

    async def drain(self, drain_seconds: float) -> None:
        """Not ready; wait; let what runs end within the grace."""
        message = "draining: running calls have %g s to end, a second signal ends them at once"
        _log.info(message, self.settings.grace_seconds, extra={"fields": {"drain_seconds": drain_seconds}})
        await asyncio.gather(*(drain(drain_seconds) for drain in self.drains))


def _shown(addresses: Mapping[str, Any]) -> str:
    """On one line; those of several processes on a line each."""
    if all(isinstance(each, str) for each in addresses.values()):
        return ", ".join(f"{kind} {address}" for kind, address in addresses.items())
    return "".join(f"\n  {name:12}{_shown(own)}" for name, own in addresses.items())


Assemble = Callable[[Host], Awaitable[None]]


def run(role: str, settings: Process, assemble: Assemble) -> None:
    """Assemble a role, serve until SIGTERM, SIGHUP or SIGINT, drain. A second signal ends at once.

    Raises what `assemble` raises: CheckpointError and UsageError are for the operator.
    """
    logs.configure(settings.log, role)
    if os.environ.pop(EXIT_WITH_PARENT, ""):
        threading.Thread(target=_end_with_stdin, daemon=True, name="parent-watch").start()

    async def serve() -> None:
        keep_grpc()
        signals, host = Signals(), Host(role, settings)
        async with host.stack:
            if await signals.ended(assemble(host)) or await signals.ended(host.ready()):
                return
            number = await signals.next()
            await signals.ended(host.drain(settings.drain_seconds if number != signal.SIGINT else 0.0))

    try:
        asyncio.run(serve())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # what a full disk does not take is dropped: else the exit code would be another
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def keep_grpc() -> None:
    """Keep grpc.aio's poller for the life of this process: giving it up, which the garbage collector does with the last
    channel or server, waits for ever where an operation never ended. Called inside of an event loop."""
    grpc.aio.init_grpc_aio()


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run blocking work in a thread that does not keep the process alive when a signal ends it."""
    future: Future[T] = Future()

    def body() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True, name="start").start()
    return await asyncio.wrap_future(future)


def _end_with_stdin() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def check_ports(settings: Process) -> None:
    """Raise one UsageError that names every port that cannot be listened on. 0 takes a free one."""
    ports = {name: getattr(settings, f"{name}_port", 0) for name in ("grpc", "http", "metrics")}
    host, faults = settings.host, []
    with contextlib.ExitStack() as held:  # until all were looked at, so that a port given twice is found
        for name, port in ports.items():
            try:
                if port:
                    held.enter_context(contextlib.closing(listen(host, port)))
            except OSError as error:
                faults.append(f"--{name}-port: cannot listen on {address(host, port)}: {error.strerror or error}")
    if faults:
        raise UsageError("; ".join(faults))


def description(directory: Path) -> str:
    """What the model can and cannot do: the first paragraph of MODEL_CARD.md; empty where there is none."""
    try:
        text = read_text(directory / "MODEL_CARD.md")
    except Unreadable:  # a card is for people: one that cannot be read stops no server
        return ""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    first = next((part for part in paragraphs if part and not part.startswith("#")), "")
    return first.replace("*", "").replace("`", "")[:LONGEST_DESCRIPTION]


# What a process says beside its log: where it serves, and why it ends. A full disk behind it stops nothing.


@contextlib.contextmanager
def errors_as_json(role: str) -> Iterator[None]:
    """An error that ends the command is one JSON object on standard error, with the exit code that it has."""
    try:
        yield
    except click.ClickException as error:
        _print(sys.stderr, _json(role, logging.ERROR, error.format_message()))
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        _print(sys.stderr, _json(role, logging.CRITICAL, str(error), exc_info=sys.exc_info()))
        raise SystemExit(1) from error


def _print(stream: TextIO, line: str) -> None:
    with contextlib.suppress(OSError):
        stream.write(line + "\n")
        stream.flush()


def _json(role: str, level: int, message: str, fields: Any = None, exc_info: Any = None) -> str:
    record = logging.LogRecord("colaserve_services.launch", level, "", 0, message, None, exc_info)
    record.fields = fields
    return logs.JsonFormatter(role).format(record)
