"""Runs the application in the caller's event loop, on a socket without Nagle's delay."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from functools import partial

import uvicorn
from fastapi import FastAPI

from colaserve_services.errors import UsageError
from colaserve_services.gateway.gateway import Gateway
from colaserve_services.gateway.protocol import LONGEST_HEAD, HttpProtocol
from colaserve_services.rpc import network
from colaserve_services.rpc.settings import ServerTls
from colaserve_services.rpc.tls import server_context
from colaserve_services.rpc.watched_files import WatchedFiles

_KEEP_ALIVE = 75  # seconds that an idle connection is kept: above what clients and balancers keep theirs
_LOOK_SECONDS = 1.0  # between two looks at the certificate's files


class HttpServer:
    """A running server. `stop` ends it; leaving that to the garbage collector does not."""

    def __init__(self, app: FastAPI, listener: socket.socket, tls: ServerTls | None):
        self._gateway: Gateway = app.state.gateway
        self._listener, self._tls = listener, tls
        self._files = WatchedFiles(*((tls.cert, tls.key, tls.client_ca) if tls else ()))
        self._server = _Server(_config(app, tls))
        self._tasks: list[asyncio.Task[None]] = []
        self.host: str = listener.getsockname()[0]
        self.port: int = listener.getsockname()[1]

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Return when requests are taken."""
        self._tasks = [asyncio.create_task(self._server.serve([self._listener]))]
        while not self._server.started:
            if self._tasks[0].done():
                await self._tasks[0]
                raise UsageError("the HTTP server ended before it served")
            await asyncio.sleep(0.005)
        if self._tls is not None:
            self._tasks.append(asyncio.create_task(self._follow_certificate(self._tls)))

    async def stop(self, grace: float = 30.0, notice: float = 0.0) -> None:
        """Say not ready for `notice` seconds, take no more connections, give requests `grace` seconds to end.

        What still runs then is cancelled, and its generations with it.
        """
        self._gateway.draining = True
        await asyncio.sleep(notice)
        self._server.config.timeout_graceful_shutdown = max(grace, 0)  # type: ignore[assignment]  # seconds, whole or not
        self._server.should_exit = True
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if late := set(self._server.server_state.tasks):  # cancelled; they still have their last word
            await asyncio.wait(late, timeout=self._gateway.settings.bounds.last_word_seconds)

    async def _follow_certificate(self, tls: ServerTls) -> None:
        context = self._server.config.ssl
        assert isinstance(context, ssl.SSLContext)
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if (renewed := self._files.read_again(partial(server_context, tls))) is not None:
                context.sni_callback = partial(_use, renewed)


async def serve(app: FastAPI, host: str, port: int, tls: ServerTls | None = None) -> HttpServer:
    """Serve `app` in this event loop; port 0 takes a free one, see `.port`. UsageError when it cannot listen."""
    try:
        listener = network.listen(host, port)
        server = HttpServer(app, listener, tls)
    except OSError as error:
        raise UsageError(f"--http-port: cannot serve on {host}:{port}: {error.strerror or error}") from error
    await server.start()
    return server


def _config(app: FastAPI, tls: ServerTls | None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=partial(HttpProtocol, app.state.gateway.settings.bounds),  # type: ignore[arg-type]  # a factory does
        ws="none",
        h11_max_incomplete_event_size=LONGEST_HEAD,
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,  # a client's address is its connection's, whatever it says
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
    )
    config.load()
    config.ssl = None if tls is None else server_context(tls)
    return config


def _use(context: ssl.SSLContext, connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
    """Go on with another context in a handshake that began."""
    connection.context = context


class _Server(uvicorn.Server):
    """Leaves signals to the process it lives in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
