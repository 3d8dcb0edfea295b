"""What goes wrong, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}. The only place that makes it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Final

import grpc
from starlette.responses import Response

from colaserve_services.errors import (
    Cancelled,
    ColaserveError,
    Corrupted,
    DeadlineExceeded,
    InvalidRequest,
    ModelMismatch,
    NotAuthenticated,
    Overloaded,
    StepFailed,
    Unavailable,
)
from colaserve_services.rpc.errors import error_from_rpc, http_status
from colaserve_services.rpc.requests import current_request_id

_log = logging.getLogger(__name__)

_KINDS: Final[dict[type[ColaserveError], tuple[str, str]]] = {
    InvalidRequest: ("invalid_request_error", "invalid_value"),
    ModelMismatch: ("invalid_request_error", "model_mismatch"),
    NotAuthenticated: ("invalid_request_error", "invalid_api_key"),
    Overloaded: ("rate_limit_error", "rate_limit_exceeded"),
    Unavailable: ("server_error", "unavailable"),
    Corrupted: ("server_error", "unavailable"),
    DeadlineExceeded: ("server_error", "deadline_exceeded"),
    StepFailed: ("server_error", "step_failed"),
}
_INTERNAL: Final = ("server_error", "internal_error")

# Fields of GenerationService as a client of the gateway calls them; a request's own names go before these.
FIELD_NAMES: Final[Mapping[str, str]] = {
    "max_new_tokens": "max_tokens",
    "prompt_ids": "prompt",
    "sampling.seed": "sampling_seed",
    "seed.base_seed": "seed",
    "text": "prompt",
    "token_ids": "tokens",
    "ignore_end": "ignore_eos",
    "print_special": "skip_special_tokens",
}


class ApiError(Exception):
    """An answer in OpenAI's error shape; `param` is the field at fault, where there is one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> bytes:
        """The JSON, in ASCII: a message may quote anything a client sent."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def api_error(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """Any exception as an answer; one that nobody foresaw is logged and told as internal.

    `names` translates the coordinator's field names where they differ from FIELD_NAMES.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, grpc.RpcError):
        error = error_from_rpc(error)
    if isinstance(error, InvalidRequest):
        return _invalid_upstream(error, {**FIELD_NAMES, **(names or {})})
    if isinstance(error, TimeoutError):
        error = DeadlineExceeded("the request's deadline passed")
    if isinstance(error, Cancelled):  # by the server: the client is still there, or nobody would read this
        error = Unavailable("the generation was broken off by the server; a retry may succeed")
    return _from_kind(error)


def _invalid_upstream(error: InvalidRequest, names: Mapping[str, str]) -> ApiError:
    field = error.field.partition("[")[0]
    param = names.get(error.field) or names.get(field) or field.rpartition(".")[2]
    return invalid(param, str(error).removeprefix(f"{error.field}: "))


def _from_kind(error: Exception) -> ApiError:
    known = next((kind for kind in _KINDS if isinstance(error, kind)), None)
    if known is None:
        _log.error("request failed: %s", type(error).__name__, exc_info=error)
        message = f"internal error; the server's log has it under request id {current_request_id() or 'none'}"
        return ApiError(500, message, kind=_INTERNAL[0], code=_INTERNAL[1])
    kind, code = _KINDS[known]
    return ApiError(http_status(error), str(error), kind=kind, code=code, headers=_headers(error))


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, Overloaded):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, Unavailable | Corrupted):
        return {"retry-after": "1"}
    if isinstance(error, StepFailed):  # it would fail again; OpenAI's clients try other 500s again
        return {"x-should-retry": "false"}
    if isinstance(error, NotAuthenticated):
        return {"www-authenticate": "Bearer"}
    return {}
