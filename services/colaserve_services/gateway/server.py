"""Runs the application in the caller's event loop, on a socket without Nagle's delay."""

import asyncio
import socket
import ssl
from functools import partial
from ipaddress import ip_address
from typing import Any

import uvicorn
from starlette.applications import Starlette

from colaserve_services.errors import UsageError
from colaserve_services.gateway.protocol import LONGEST_HEAD, HttpProtocol
from colaserve_services.gateway.settings import Bounds
from colaserve_services.rpc import network
from colaserve_services.rpc.settings import Tls
from colaserve_services.rpc.tls import server_context
from colaserve_services.rpc.watched_files import WatchedFiles

_KEEP_ALIVE = 75  # seconds that an idle connection is kept: above what clients and balancers keep theirs


class HttpServer:
    """A running server, see `serve`. `stop` ends it; leaving that to the garbage collector does not."""

    def __init__(self, app: Starlette, listener: socket.socket, tls: Tls | None, renewal_seconds: float):
        self._app, self._listener = app, listener
        self._bounds: Bounds = app.state.settings.bounds
        self._tls, self._renewal_seconds = tls, renewal_seconds
        self._files = WatchedFiles(*((tls.cert, tls.key, tls.ca) if tls else ()))
        self._server = uvicorn.Server(_config(app, tls))
        self._tasks: list[asyncio.Task[None]] = []
        self.host: str = listener.getsockname()[0]
        app.state.loopback = ip_address(self.host).is_loopback
        self.port: int = listener.getsockname()[1]

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Return when requests are taken. Signals are left to the process, which uvicorn's `serve` would not do."""
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup([self._listener])
        work = [self._server.main_loop(), self._look_at_readers()]
        if self._tls is not None:
            work.append(self._follow_certificate(self._tls))
        self._tasks = [asyncio.create_task(one) for one in work]

    async def stop(self, grace: float = 30.0, notice: float = 0.0) -> None:
        """Say not ready for `notice` seconds, take no more connections, give requests `grace` seconds to end.

        What still runs then is cancelled, and its generations with it.
        """
        self._app.state.draining = True
        await asyncio.sleep(notice)
        grace = max(grace, 0.1)  # uvicorn takes 0 as exceeded, and logs that as an error, even when nothing runs
        self._server.config.timeout_graceful_shutdown = grace  # type: ignore[assignment]  # seconds, whole or not
        await self._server.shutdown([self._listener])
        if late := set(self._server.server_state.tasks):  # cancelled; they still have their last word
            await asyncio.wait(late, timeout=self._bounds.last_word_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look_at_readers(self) -> None:
        while True:
            await asyncio.sleep(self._bounds.answer_seconds / 4)
            for connection in list(self._server.server_state.connections):
                assert isinstance(connection, HttpProtocol)
                connection.look_at_reader()

    async def _follow_certificate(self, tls: Tls) -> None:
        context = self._server.config.ssl
        assert isinstance(context, ssl.SSLContext)
        while True:
            await asyncio.sleep(self._renewal_seconds)
            if (renewed := self._files.read_again(partial(server_context, tls))) is not None:
                context.sni_callback = partial(_use, renewed)


async def serve(
    app: Starlette, host: str, port: int, tls: Tls | None = None, renewal_seconds: float = 1.0
) -> HttpServer:
    """Serve `app` in this event loop; port 0 takes a free one, see `.port`. UsageError when it cannot listen.

    The certificate's files are looked at each `renewal_seconds`, and read again when they changed."""
    try:
        listener = network.listen(host, port)
        server = HttpServer(app, listener, tls, renewal_seconds)
    except OSError as error:
        raise UsageError(f"--http-port: cannot serve on {host}:{port}: {error.strerror or error}") from error
    await server.start()
    return server


def _config(app: Starlette, tls: Tls | None) -> uvicorn.Config:
    http: Any = partial(HttpProtocol, app.state.settings.bounds)
    config = uvicorn.Config(
        app,
        http=http,
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
