"""What sync and asyncio calls share: the methods, the options of a call, and when a call is tried again."""

import os
import random
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import Message

from colaserve.v1 import decoder_pb2, encoder_pb2, generation_pb2, latent_service_pb2, prior_pb2
from colaserve_client.channel import check_target
from colaserve_client.errors import (
    STEP_FAILED,
    Cancelled,
    ColaserveError,
    DeadlineExceeded,
    Details,
    ModelMismatch,
    Overloaded,
    ServerError,
    Unavailable,
    error_from_rpc,
    invalid,
)
from colaserve_client.settings import Connection, Retry, Tls

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Method(Generic[Q, R]):
    """One method of a service, and its messages."""

    path: str
    request: type[Q]
    response: type[R]

    def serialize(self, request: Q) -> bytes:
        """The request's bytes."""
        return request.SerializeToString()

    def deserialize(self, data: bytes) -> R:
        """The response of bytes."""
        return self.response.FromString(data)


def _method(name: str, request: type[Q], response: type[R]) -> Method[Q, R]:
    return Method(f"/colaserve.v1.{name}", request, response)


GENERATE = _method("GenerationService/Generate", generation_pb2.GenerateRequest, generation_pb2.GenerateResponse)
TOKENIZE = _method("GenerationService/Tokenize", generation_pb2.TokenizeRequest, generation_pb2.TokenizeResponse)
DETOKENIZE = _method(
    "GenerationService/Detokenize", generation_pb2.DetokenizeRequest, generation_pb2.DetokenizeResponse
)
MODEL_INFO = _method(
    "GenerationService/GetInfo",
    generation_pb2.GenerationServiceGetInfoRequest,
    generation_pb2.GenerationServiceGetInfoResponse,
)
ENCODE_TEXT = _method(
    "LatentService/EncodeText", latent_service_pb2.EncodeTextRequest, latent_service_pb2.EncodeTextResponse
)
DECODE_LATENTS = _method(
    "LatentService/DecodeLatents", latent_service_pb2.DecodeLatentsRequest, latent_service_pb2.DecodeLatentsResponse
)
SAMPLE_LATENTS = _method(
    "LatentService/SampleLatents", latent_service_pb2.SampleLatentsRequest, latent_service_pb2.SampleLatentsResponse
)
INTERPOLATE = _method(
    "LatentService/Interpolate", latent_service_pb2.InterpolateRequest, latent_service_pb2.InterpolateResponse
)
INFILL = _method("LatentService/Infill", latent_service_pb2.InfillRequest, latent_service_pb2.InfillResponse)
RECONSTRUCT = _method(
    "LatentService/Reconstruct", latent_service_pb2.ReconstructRequest, latent_service_pb2.ReconstructResponse
)
LATENT_INFO = _method(
    "LatentService/GetInfo",
    latent_service_pb2.LatentServiceGetInfoRequest,
    latent_service_pb2.LatentServiceGetInfoResponse,
)
ENCODE = _method("EncoderService/Encode", encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse)
ENCODER_INFO = _method(
    "EncoderService/GetInfo", encoder_pb2.EncoderServiceGetInfoRequest, encoder_pb2.EncoderServiceGetInfoResponse
)
SAMPLE = _method("PriorService/Sample", prior_pb2.SampleRequest, prior_pb2.SampleResponse)
PRIOR_INFO = _method(
    "PriorService/GetInfo", prior_pb2.PriorServiceGetInfoRequest, prior_pb2.PriorServiceGetInfoResponse
)
DECODE = _method("DecoderService/Decode", decoder_pb2.DecodeRequest, decoder_pb2.DecodeResponse)
DECODER_INFO = _method(
    "DecoderService/GetInfo", decoder_pb2.DecoderServiceGetInfoRequest, decoder_pb2.DecoderServiceGetInfoResponse
)


def converted(convert: Callable[[S], T], answer: S, request_id: str) -> T:
    """What `convert` makes of an answer; `ServerError` when it is malformed."""
    try:
        return convert(answer)
    except (ModelMismatch, ValueError) as error:  # as it would be the caller's fault in a request
        raise ServerError(f"malformed answer: {error}", Details(request_id=request_id)) from error


_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_FOR_EVER = 1e9  # seconds; gRPC takes a deadline that is much further away for one that has passed


def check_timeout(timeout: float | None) -> None:
    """`InvalidRequest` for what is no number of seconds above 0."""
    if timeout is not None and not (isinstance(timeout, Real) and timeout > 0):
        raise invalid("timeout", f"expected more than 0 seconds, got {timeout!r}")


_OFF = {"0", "false", "no", "n", "f"}


def forked(process: int) -> bool:
    """Whether this is a child of the process with this id, where what that one opened cannot be used.

    Raises `Unavailable` in a child where gRPC was told not to survive a fork: a call would never return.
    """
    if process == os.getpid():
        return False
    if os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in _OFF:
        raise Unavailable(
            "this process was forked from one that had used gRPC, and GRPC_ENABLE_FORK_SUPPORT switches gRPC's support "
            "of that off: remove the variable, or start the process with the spawn method"
        )
    return True


def check_same_process(process: int, what: str) -> None:
    """`Cancelled` for what was opened before a fork and is used after it."""
    if forked(process):
        raise Cancelled(f"the {what} was opened before this process was forked and belongs to its parent; open another")


def checked_key(key: str) -> str:
    """The key without the blanks around it; `InvalidRequest` for none, and for one that HTTP cannot carry."""
    key = key.strip()
    if not (key and key.isascii() and key.isprintable()):
        raise invalid("key", "expected printable ASCII characters")
    return key


@dataclass(frozen=True)
class ClientConfig:
    """How a client reaches its server."""

    target: str
    key: str | None = field(default=None, repr=False)  # sent as "authorization: Bearer KEY"
    tls: Tls | None = None  # None: not encrypted
    timeout: float | None = None  # seconds, of calls that give none; None: no deadline
    retry: Retry = field(default_factory=Retry)
    connection: Connection = field(default_factory=Connection)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", check_target(self.target.strip()))
        check_timeout(self.timeout)
        if self.key is not None:  # of a file or a variable, which often ends with a newline
            object.__setattr__(self, "key", checked_key(self.key))


@dataclass(frozen=True)
class CallOptions:
    """What a caller may say about one call."""

    timeout: float | None = None  # seconds, retries included; None: the client's; math.inf: no deadline
    request_id: str = ""  # empty: drawn at random

    def resolved(self, config: ClientConfig) -> "CallOptions":
        """With the client's timeout and a request id; a timeout of None now means no deadline."""
        timeout = config.timeout if self.timeout is None else self.timeout
        check_timeout(timeout)
        request_id = self.request_id or uuid.uuid4().hex
        if not _REQUEST_ID.fullmatch(request_id):  # the server would choose another one
            raise invalid("request_id", f"expected 1 to 128 of A-Z a-z 0-9 . _ : / + = @ -, got {request_id!r}")
        return replace(self, timeout=None if timeout is None or timeout > _FOR_EVER else timeout, request_id=request_id)

    def metadata(self, config: ClientConfig) -> list[tuple[str, str]]:
        """The call's metadata."""
        key = [("authorization", f"Bearer {config.key}")] if config.key else []
        return [("x-request-id", self.request_id), *key]


class Attempts:
    """The tries of one call: until when, and with what pauses. One thread or task uses it."""

    def __init__(self, retry: Retry, options: CallOptions, closed: Callable[[], bool]) -> None:
        self._retry, self._options, self._closed, self._failures = retry, options, closed, 0
        self._deadline = None if options.timeout is None else time.monotonic() + options.timeout

    def remaining(self) -> float | None:
        """Seconds left for the next try; None: no deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause(self, failure: grpc.RpcError, *, started: bool) -> float:
        """Seconds to wait before the next try; raises the typed error when there is to be none.

        `started`: something of the answer has come already, so that a new try would not be the same call.
        """
        if self._closed():
            raise Cancelled("the client was closed", Details(request_id=self._options.request_id)) from failure
        error = self._error(failure)
        self._failures += 1
        again = isinstance(error, Unavailable | Overloaded) and error.details.reason != STEP_FAILED
        if started or not again or self._failures >= self._retry.attempts:
            raise error from failure
        seconds = self._hint(error) * random.uniform(1.0, 1.2)  # apart from others that were refused just now
        left = self.remaining()
        if left is not None and seconds >= left:
            raise error from failure
        return seconds

    def _hint(self, error: ColaserveError) -> float:
        hint = error.retry_after if isinstance(error, Overloaded) else None
        return self._retry.pause(self._failures) if hint is None else hint

    def _error(self, failure: grpc.RpcError) -> ColaserveError:
        error, timeout = error_from_rpc(failure, self._options.request_id), self._options.timeout
        if isinstance(error, DeadlineExceeded) and timeout is not None:
            return DeadlineExceeded(f"not done within the timeout of {timeout:g} s ({error})", error.details)
        return error
