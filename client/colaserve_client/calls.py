"""One call: its method, its deadline and metadata, and when it is tried again."""

import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message

from colaserve.v1 import decoder_pb2, encoder_pb2, generation_pb2, latent_service_pb2, prior_pb2
from colaserve_client.channel import ClientConfig, check_timeout
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

S = TypeVar("S")
T = TypeVar("T")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_FOREVER = 1e9  # seconds; gRPC takes a deadline that is much further away for one that has passed


def _methods() -> Iterator[tuple[str, tuple[str, type[Message]]]]:
    for module in (generation_pb2, latent_service_pb2, encoder_pb2, prior_pb2, decoder_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                response = message_factory.GetMessageClass(method.output_type)
                yield method.input_type.full_name, (f"/{service.full_name}/{method.name}", response)


_METHODS = dict(_methods())  # by the name of the request, since no two methods take the same one


def method_of(request: Message) -> tuple[str, type[Message]]:
    """The path of the method that takes this request, and the type of its response."""
    return _METHODS[request.DESCRIPTOR.full_name]


def converted(convert: Callable[[S], T], answer: S, request_id: str) -> T:
    """What `convert` makes of an answer; `ServerError` when the answer is malformed."""
    try:
        return convert(answer)
    except (ModelMismatch, ValueError) as error:  # as it would be the caller's fault in a request
        raise ServerError(f"malformed answer: {error}", Details(request_id=request_id)) from error


class Attempts:
    """The attempts of one call: until when, and with what pauses. One task uses it."""

    def __init__(
        self, config: ClientConfig, timeout: float | None, request_id: str, closed: Callable[[], bool] = lambda: False
    ) -> None:
        timeout = config.timeout if timeout is None else timeout
        check_timeout(timeout)
        self.request_id = request_id or uuid.uuid4().hex
        if not _REQUEST_ID.fullmatch(self.request_id):  # the server would choose another one
            raise invalid("request_id", f"expected 1 to 128 of A-Z a-z 0-9 . _ : / + = @ -, got {request_id!r}")
        self._config, self._closed, self._failures = config, closed, 0
        self._timeout = None if timeout is None or timeout > _FOREVER else timeout
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def arguments(self) -> dict[str, Any]:
        """What gRPC is given beside the request: the seconds that are left, and the metadata."""
        key = [("authorization", f"Bearer {self._config.key}")] if self._config.key else []
        return {"timeout": self._seconds_left(), "metadata": [("x-request-id", self.request_id), *key]}

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause(self, failure: grpc.RpcError, *, started: bool) -> float:
        """Seconds to wait before the next attempt; raises the typed error when there is to be none.

        `started`: something of the answer has come already, so that a new attempt would not be the same call.
        """
        failure = failure.with_traceback(None)  # its frames would keep the call, and with it the channel
        if self._closed():
            raise Cancelled("the client was closed", Details(request_id=self.request_id)) from failure
        error = self._error(failure)
        self._failures += 1
        again = isinstance(error, Unavailable | Overloaded) and error.details.reason != STEP_FAILED
        if started or not again or self._failures >= self._config.retry.attempts:
            raise error from failure
        seconds = self._hint(error) * random.uniform(1.0, 1.2)  # apart from others that were refused just now
        left = self._seconds_left()
        if left is not None and seconds >= left:
            raise error from failure
        return seconds

    def _hint(self, error: ColaserveError) -> float:
        hint = error.retry_after if isinstance(error, Overloaded) else None
        return self._config.retry.pause(self._failures) if hint is None else hint

    def _error(self, failure: grpc.RpcError) -> ColaserveError:
        error = error_from_rpc(failure, self.request_id)
        if isinstance(error, DeadlineExceeded) and self._timeout is not None:
            return DeadlineExceeded(f"not done within the timeout of {self._timeout:g} s ({error})", error.details)
        return error
