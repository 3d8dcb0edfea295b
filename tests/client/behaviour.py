"""What a fake service does beside its work: it fails, waits, and tells what reached it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


@dataclass(frozen=True)
class Failure:
    """A status that a call ends with."""

    code: grpc.StatusCode
    message: str = "it failed"
    field: str = ""
    retry_after: float | None = None
    reason: str = ""

    def abort(self, context: grpc.ServicerContext) -> None:
        details = []
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromTimedelta(timedelta(seconds=self.retry_after))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.reason:
            details.append(error_details_pb2.ErrorInfo(reason=self.reason, domain="colaserve"))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))


def invalid(name: str, message: str) -> Failure:
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, f"{name}: {message}", name)


@dataclass
class Behaviour:
    """What the fakes do beside their work, and what they saw."""

    failures: deque[Failure] = field(default_factory=deque)  # the next calls end with these, one each
    fail_after: dict[int, Failure] = field(default_factory=dict)  # a stream ends with this after so many messages
    delay: float = 0  # seconds until a call does anything
    wait_after: int | None = None  # a stream stands still after so many messages, until it is cancelled or `go_on`
    spoil: Callable[[Any], None] | None = None  # what is done to each answer before it is sent
    go_on: threading.Event = field(default_factory=threading.Event)
    logprob: float = -0.25  # of every token of a generation
    calls: int = 0
    running: int = 0
    most_running: int = 0
    cancelled: int = 0  # streams that ended because the client left, or its deadline passed
    metadata: list[dict[str, Any]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, request: Any, context: grpc.ServicerContext) -> None:
        with self.lock:
            self.calls += 1
            self.metadata.append(dict(context.invocation_metadata()))
            self.requests.append(request)
            failure = self.failures.popleft() if self.failures else None
        self.go_on.wait(self.delay)
        if failure is not None:
            failure.abort(context)

    def sent(self, answer: Any) -> Any:
        """An answer, spoilt where that is asked for."""
        if self.spoil is not None:
            self.spoil(answer)
        return answer

    def messages(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Pass a stream's messages on, with the failures and pauses asked for."""
        ended = threading.Event()
        context.add_callback(ended.set)
        with self.lock:
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        finished = False
        try:
            for index, message in enumerate(messages):
                if index in self.fail_after:
                    self.fail_after[index].abort(context)
                while self.wait_after == index and not ended.is_set() and not self.go_on.wait(0.01):
                    pass
                if ended.is_set():
                    return
                yield self.sent(message)
            finished = True
        finally:
            with self.lock:
                self.running -= 1
                self.cancelled += not finished and (ended.is_set() or not context.is_active())
