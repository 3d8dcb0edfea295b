"""The one table of the services: our errors to gRPC statuses (with google.rpc details) and HTTP statuses, and back."""

import asyncio
import logging
import traceback
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from colaserve_client.errors import STEP_FAILED, details_of
from colaserve_services.errors import (
    Cancelled,
    ColaserveError,
    DeadlineExceeded,
    InvalidRequest,
    ModelMismatch,
    NotAuthenticated,
    Overloaded,
    StepFailed,
    Unavailable,
)
from colaserve_services.rpc.requests import REQUEST_ID, current_request_id

TABLE: Final[dict[type[ColaserveError], tuple[StatusCode, int]]] = {
    InvalidRequest: (StatusCode.INVALID_ARGUMENT, 400),
    ModelMismatch: (StatusCode.FAILED_PRECONDITION, 400),
    NotAuthenticated: (StatusCode.UNAUTHENTICATED, 401),
    Overloaded: (StatusCode.RESOURCE_EXHAUSTED, 429),
    Cancelled: (StatusCode.CANCELLED, 499),
    Unavailable: (StatusCode.UNAVAILABLE, 503),
    DeadlineExceeded: (StatusCode.DEADLINE_EXCEEDED, 504),
    StepFailed: (StatusCode.INTERNAL, 500),  # other errors of this status carry no ErrorInfo
}
INTERNAL: Final = (StatusCode.INTERNAL, 500)
DETAILS_KEY: Final = "grpc-status-details-bin"
STATUS_SECONDS: Final = 2.0  # that the sending of a status may take
LONGEST_MESSAGE: Final = 1000  # characters; a status travels in a header, whose size is bounded

_log = logging.getLogger(__name__)


def grpc_code(error: Exception) -> StatusCode:
    """The status code of an error; INTERNAL for what is not in the table."""
    return TABLE.get(_known(error), INTERNAL)[0]


def http_status(error: Exception) -> int:
    """The HTTP status of an error; 500 for what is not in the table."""
    return TABLE.get(_known(error), INTERNAL)[1]


def status_proto(error: Exception) -> status_pb2.Status:
    """The google.rpc.Status of an error, with the details that a caller may read; never with internals."""
    status = status_pb2.Status(code=grpc_code(error).value[0], message=_message(error))
    detail = _detail(error)
    if detail is not None:
        status.details.add().Pack(detail)
    return status


def error_from_rpc(error: Any) -> ColaserveError:
    """Our error for the grpc.RpcError that another service answered with, its details kept; `raise ... from error`."""
    code, text = error.code(), error.details() or error.code().name
    details = details_of(error)
    if code == StatusCode.INVALID_ARGUMENT:
        named = text.removeprefix(f"{details.field}: ") if details.field else text
        return InvalidRequest(details.field or "request", named)
    if code == StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(text, 1.0 if details.retry_after is None else details.retry_after)
    if code == StatusCode.INTERNAL:
        return StepFailed(text) if details.reason == STEP_FAILED else ColaserveError(f"{code.name}: {text}")
    for kind, (known, _) in TABLE.items():
        if known == code:
            return kind(text)
    return ColaserveError(f"{code.name}: {text}")


async def end_with(error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
    """End the call with the status of this error: the only place where errors become statuses.

    A status that was set already passes. An unknown exception becomes INTERNAL with the request id; its traceback is
    logged and not sent.
    """
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.UsageError)):
        raise error
    status = rpc_error(error)
    _forget_frames(error)
    try:
        async with asyncio.timeout(STATUS_SECONDS):
            await context.abort(status.code(), status.details() or "", tuple(status.trailing_metadata()))
    except TimeoutError:  # the status is queued behind responses that are not read: the handler ends without it
        raise asyncio.CancelledError from error
    raise AssertionError("abort returned") from error


def rpc_error(error: Exception) -> AioRpcError:
    """What the caller of a call that fails with `error` gets. Errors that are not in the table are logged here."""
    known = error_from_rpc(error) if isinstance(error, grpc.RpcError) else error
    if _known(known) not in TABLE:
        _log.error("call failed: %s", type(error).__name__, exc_info=error)
    status = status_proto(known)
    trailing = ((DETAILS_KEY, status.SerializeToString()), (REQUEST_ID, current_request_id()))
    return AioRpcError(grpc_code(known), Metadata(), Metadata(*trailing), status.message)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, such as whole messages: grpc.aio keeps the exception of an aborted
    call in a reference cycle, and all of that with it, until the garbage collector finds it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _known(error: Exception) -> type[ColaserveError]:
    return next((kind for kind in TABLE if isinstance(error, kind)), ColaserveError)


def _message(error: Exception) -> str:
    if _known(error) not in TABLE:
        return f"internal error; the server's log has it under request id {current_request_id() or 'none'}"
    text = str(error)
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 3] + "..."


def _detail(error: Exception) -> Any:
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field[:200], description=_message(error))
        return error_details_pb2.BadRequest(field_violations=[violation])
    if isinstance(error, Overloaded):
        delay = Duration()
        delay.FromNanoseconds(round(max(error.retry_after, 0.0) * 1e9))
        return error_details_pb2.RetryInfo(retry_delay=delay)
    if isinstance(error, StepFailed):
        return error_details_pb2.ErrorInfo(reason=STEP_FAILED, domain="colaserve")
    if _known(error) not in TABLE:
        return error_details_pb2.RequestInfo(request_id=current_request_id())
    return None
