"""Everything a call can raise, and the one table that turns a gRPC status into it.

All errors derive from `ColaserveError`; those that came over the wire are raised `from` the `grpc.RpcError`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

STEP_FAILED = "STEP_FAILED"  # reason of a google.rpc.ErrorInfo
_TOO_LARGE = "larger than max"  # how gRPC itself words a message above the limit, under RESOURCE_EXHAUSTED


@dataclass(frozen=True)
class Details:
    """What a status says beside its message."""

    field: str = ""  # the request's field that was refused; empty when the server named none
    retry_after: float | None = None  # seconds; None when the server gave no hint
    reason: str = ""  # STEP_FAILED: the server cannot compute this request, though it computes others
    request_id: str = ""  # to be found again in the server's logs; empty for errors found before a call was made


_NO_DETAILS = Details()


class ColaserveError(Exception):
    """Base of all errors of this library; the message says what to do."""

    def __init__(self, message: str, details: Details = _NO_DETAILS) -> None:
        super().__init__(message)
        self.details = details

    @property
    def request_id(self) -> str:
        """The call's x-request-id."""
        return self.details.request_id


class InvalidRequest(ColaserveError, ValueError):
    """The caller's fault: a field holds something else than expected. Trying again does not help."""

    @property
    def field(self) -> str:
        """The field at fault, such as "sampler.steps"; empty when the server named none."""
        return self.details.field


class ModelMismatch(ColaserveError):
    """Latents of one latent space were given to a service of another."""


class NotAuthenticated(ColaserveError):
    """No key, or one that the server does not know."""


class Overloaded(ColaserveError):
    """Queue or cache of the server are full; nothing ran, so trying again is safe."""

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the server suggests to try again; None when it gave no hint."""
        return self.details.retry_after


class Unavailable(ColaserveError):
    """The server is down, going down, not ready yet, or the connection broke."""


class DeadlineExceeded(ColaserveError):
    """The call's timeout passed; the server has freed what it held."""


class Cancelled(ColaserveError):
    """The call was cancelled by this side."""


class MessageTooLarge(ColaserveError):
    """A message is above this side's or the server's limit; see `Connection.max_message_bytes`."""


class NotSupported(ColaserveError):
    """The server at this address does not offer the method: it has another role, or is older."""


class ServerError(ColaserveError):
    """The server failed in a way that it should not; its logs have the request id."""


ERROR_BY_CODE: Mapping[grpc.StatusCode, type[ColaserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthenticated,
    grpc.StatusCode.PERMISSION_DENIED: NotAuthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Unavailable,  # by the server: what reaches it while it goes down, or outlasts its grace
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
}  # every other code is a ServerError


def invalid(field: str, message: str) -> InvalidRequest:
    """The error of a value that is refused before it is sent."""
    return InvalidRequest(f"{field}: {message}", Details(field=field))


def error_from_rpc(failure: grpc.RpcError, request_id: str = "") -> ColaserveError:
    """The typed error of a failed call, sync or asyncio; raise it `from` the failure."""
    code, message = failure.code(), failure.details() or ""
    kind = ERROR_BY_CODE.get(code, ServerError)
    if kind is Overloaded and _TOO_LARGE in message:
        kind = MessageTooLarge
    return kind(" ".join(message.split()) or code.name, details_of(failure, request_id))


def details_of(failure: grpc.RpcError, request_id: str = "") -> Details:
    """What google.rpc.BadRequest, RetryInfo and ErrorInfo in the trailing metadata say."""
    try:
        status: Any = rpc_status.from_call(failure)
    except Exception:  # details are an extra: broken ones, of a proxy say, must not hide the status itself
        status = None
    field, retry_after, reason = "", None, ""
    for packed in status.details if status else ():
        bad, retry, info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
        if packed.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        elif packed.Unpack(info):
            reason = info.reason
    return Details(field, retry_after, reason, request_id)
