"""Exit codes, and how an error becomes one line and one of them."""

import errno
import os
import re
from collections.abc import Mapping

import click

from colaserve_client import errors
from colaserve_client.errors import ColaserveError, InvalidRequest, NotAuthenticated, Unavailable
from colaserve_client.reading import Unreadable

OK, ERROR, USAGE, UNAVAILABLE, DEADLINE, NOT_AUTHENTICATED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

MEANINGS: Mapping[int, str] = {
    OK: "done",
    ERROR: "something failed",
    USAGE: "the command, or a value in it, is wrong",
    UNAVAILABLE: "the server is overloaded or not to be reached: try again later",
    DEADLINE: "the timeout passed",
    NOT_AUTHENTICATED: "the server needs a key, or another one",
    INTERRUPTED: "interrupted by Ctrl-C",
}

_CODE_BY_ERROR: Mapping[type[ColaserveError], int] = {
    InvalidRequest: USAGE,
    errors.Overloaded: UNAVAILABLE,
    Unavailable: UNAVAILABLE,
    errors.DeadlineExceeded: DEADLINE,
    NotAuthenticated: NOT_AUTHENTICATED,
    Unreadable: USAGE,
}

_AWAY = re.compile(r"the (encoder|prior|decoder) is not available\b")  # as the coordinator words it
_STOPPED = "Cancelling all calls"  # as gRPC words it
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # the variables that gRPC reads, in its order


def code_of(error: BaseException) -> int:
    """The exit code of an error."""
    if isinstance(error, click.ClickException):
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return INTERRUPTED
    return _CODE_BY_ERROR.get(type(error), ERROR) if isinstance(error, ColaserveError) else ERROR


def _hint(error: Unavailable) -> str:
    """What to check when a service cannot be reached: the stage that the server names, or the server itself."""
    if away := _AWAY.match(str(error)):
        return f"the server answers, its {away[1]} does not: `colaserve status` shows all services"
    if str(error) == _STOPPED:
        return "the server was stopped while it answered"
    proxies = [name for name in _PROXIES if os.environ.get(name)]
    proxy = f"; {proxies[0]} is set, and used for servers on other machines" if proxies else ""
    return f"is a server running? `colaserve up` starts one, --target says where it is{proxy}"


def line_of(error: BaseException) -> str:
    """What to say about an error, in one line; empty for Ctrl-C."""
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return ""
    if isinstance(error, click.NoSuchOption):
        return f"{error.format_message()} (a text that begins with - goes behind --)"
    if isinstance(error, click.UsageError):
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return f"{error.format_message()}{where}"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, Unavailable):
        return f"{error} ({_hint(error)})"
    if isinstance(error, NotAuthenticated):
        return f"{error} (--key or COLASERVE_KEY holds the key)"
    if isinstance(error, ColaserveError):
        searchable = error.request_id and not isinstance(error, InvalidRequest)
        return f"{error} (request id {error.request_id})" if searchable else str(error)
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        where = "standard output" if error.errno == errno.ENOSPC else ""
        return f"{error.filename or where}: {error.strerror}" if error.filename or where else str(error)
    return f"{type(error).__name__}: {error} (COLASERVE_DEBUG=1 shows where)"
