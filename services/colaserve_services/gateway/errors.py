"""Errors as answers, in OpenAI's shape or, on its paths, in Anthropic's. Nothing else makes such bodies."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Final

import grpc
from starlette.responses import Response

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
from colaserve_services.rpc.errors import error_from_rpc, http_status
from colaserve_services.rpc.requests import current_request_id

_log = logging.getLogger(__name__)

_CODES: Final[Mapping[type[ColaserveError], str]] = {
    ModelMismatch: "model_mismatch",
    NotAuthenticated: "invalid_api_key",
    Overloaded: "rate_limit_exceeded",
    Unavailable: "unavailable",
    DeadlineExceeded: "deadline_exceeded",
    StepFailed: "step_failed",
}
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
_TYPES: Final = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}

# Fields of GenerationService as a client of the gateway calls them; a request's own names go before these.
FIELD_NAMES: Final[Mapping[str, str]] = {
    "max_new_tokens": "max_tokens",
    "choices": "guided_choice",
    **{f"choices[{index}]": f"guided_choice[{index}]" for index in range(64)},
    "ids": "prompt",
    "prompt_ids": "prompt",
    "sampling.seed": "sampling_seed",
    "seed.base_seed": "seed",
    "text": "prompt",
    "token_ids": "tokens",
    "ignore_end": "ignore_eos",
    "print_special": "skip_special_tokens",
}


class ApiError(Exception):
    """An answer of status 400 and above; `param` is the field at fault, where there is one."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def content(self) -> dict[str, Any]:
        """As OpenAI has it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> Response:
        """The JSON, in the shape of the path's API, in ASCII: a message may quote anything a client sent."""
        content = self.content()
        if f"{path}/".startswith("/v1/messages/"):
            content = anthropic_error(self)
        elif f"{path}/".startswith("/v2/"):
            content = {"error": self.message}  # the Open Inference Protocol's
        return Response(json.dumps(content), self.status, self.headers, "application/json")


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """As Anthropic has it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    about = {"type": kind, "message": error.message}
    return {"type": "error", "error": about, "request_id": current_request_id() or None}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, f"{param}: {message}", code, param)


def api_error(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """Any exception as an answer; an unexpected one is logged and answered as an internal error.

    `names` translates the coordinator's field names where they differ from FIELD_NAMES.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, grpc.RpcError):
        error = _of_rpc(error, "what this needs")
    if isinstance(error, InvalidRequest):
        return _invalid_upstream(error, {**FIELD_NAMES, **(names or {})})
    if isinstance(error, TimeoutError):
        error = DeadlineExceeded("the request's deadline passed")
    if isinstance(error, Cancelled):  # by the server: a client that has left gets no answer
        error = Unavailable("the generation was broken off by the server; a retry may succeed")
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), None)
    if code is None:
        _log.error("request failed: %s", type(error).__name__, exc_info=error)
        message = f"internal error; the server's log has it under request id {current_request_id() or 'none'}"
        return ApiError(500, message, "internal_error")
    return ApiError(http_status(error), str(error), code, headers=_headers(error))


def with_own_names(error: grpc.RpcError, lacking: str) -> Exception:
    """The error of a call that has the client's field names. `lacking`: what a coordinator without the method lacks."""
    known = _of_rpc(error, lacking)
    return ApiError(400, str(known), "invalid_value", known.field) if isinstance(known, InvalidRequest) else known


def _of_rpc(error: grpc.RpcError, lacking: str) -> ColaserveError:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Unavailable(f"the coordinator is of an earlier version, without {lacking}")
    return error_from_rpc(error)


def _invalid_upstream(error: InvalidRequest, names: Mapping[str, str]) -> ApiError:
    field = error.field.partition("[")[0]
    within = error.field.removeprefix(field)
    own = field.rpartition(".")[2] + (within if "." in within else "")
    param = names.get(error.field) or names.get(field) or own
    return invalid(param, str(error).removeprefix(f"{error.field}: "))


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, Overloaded):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, Unavailable):
        return {"retry-after": "1"}
    if isinstance(error, StepFailed):  # it would fail again; OpenAI's clients try other 500s again
        return {"x-should-retry": "false"}
    if isinstance(error, NotAuthenticated):
        return {"www-authenticate": "Bearer"}
    return {}
