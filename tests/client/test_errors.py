"""Errors: every status has its type, the details arrive, and only what is safe is tried again."""

import pickle
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from colaserve_client import (
    Client,
    ColaserveError,
    Connection,
    DeadlineExceeded,
    DecoderClient,
    InvalidRequest,
    Latents,
    MessageTooLarge,
    ModelMismatch,
    NotAuthenticated,
    NotSupported,
    Overloaded,
    Retry,
    ServerError,
    Tls,
    Unavailable,
)
from tests.client.behaviour import Behaviour, Failure
from tests.client.fakes import FakeServer, start_server

Code = grpc.StatusCode
KIND = {
    Code.INVALID_ARGUMENT: InvalidRequest,
    Code.OUT_OF_RANGE: InvalidRequest,
    Code.FAILED_PRECONDITION: ModelMismatch,
    Code.UNAUTHENTICATED: NotAuthenticated,
    Code.PERMISSION_DENIED: NotAuthenticated,
    Code.RESOURCE_EXHAUSTED: Overloaded,
    Code.UNAVAILABLE: Unavailable,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.CANCELLED: Unavailable,
    Code.UNIMPLEMENTED: NotSupported,
}
FAILURES = [code for code in Code if code is not Code.OK]
SAFE = (Code.UNAVAILABLE, Code.CANCELLED, Code.RESOURCE_EXHAUSTED)


@pytest.fixture
def once(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, retry=Retry(attempts=1)) as connected:
        yield connected


@pytest.mark.parametrize("code", FAILURES)
def test_every_status_has_its_error(once: Client, behaviour: Behaviour, code: grpc.StatusCode) -> None:
    for call in (lambda: once.tokenize("a"), lambda: once.generate("a")):
        behaviour.failures.append(Failure(code, "two\n lines"))
        with pytest.raises(ColaserveError) as caught:
            call()
        assert type(caught.value) is KIND.get(code, ServerError)
        assert str(caught.value) == "two lines"
        assert isinstance(caught.value.__cause__, grpc.RpcError)
        assert len(caught.value.request_id) == 32


def test_details_arrive(server: FakeServer, behaviour: Behaviour) -> None:
    with Client(server.target, retry=Retry(attempts=1)) as client:
        behaviour.failures.append(Failure(Code.INVALID_ARGUMENT, "steps: too many", field="sampler.steps"))
        with pytest.raises(InvalidRequest) as bad:
            client.tokenize("a")
        behaviour.failures.append(Failure(Code.RESOURCE_EXHAUSTED, retry_after=0.25))
        with pytest.raises(Overloaded) as busy:
            client.tokenize("a", request_id="mine")
    assert bad.value.field == "sampler.steps"
    assert (busy.value.retry_after, busy.value.request_id) == (0.25, "mine")
    again = pickle.loads(pickle.dumps(busy.value))
    assert (str(again), again.retry_after) == (str(busy.value), 0.25)


def test_invalid_requests_are_value_errors(client: Client) -> None:
    with pytest.raises(ValueError, match="max_new_tokens: got 0, expected 1 or more"):
        client.generate("a", max_new_tokens=0)


# Retries


@pytest.mark.parametrize("code", FAILURES)
def test_only_what_is_safe_is_tried_again(client: Client, behaviour: Behaviour, code: grpc.StatusCode) -> None:
    for call in (lambda: client.tokenize("a").ids, lambda: bool(client.generate("a").text)):
        behaviour.calls = 0
        behaviour.failures.extend([Failure(code)] * 2)
        if code in SAFE:
            assert call()
            assert behaviour.calls == 3
        else:
            with pytest.raises(ColaserveError):
                call()
            assert behaviour.calls == 1
        behaviour.failures.clear()


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED])
def test_a_failed_step_is_never_tried_again(client: Client, behaviour: Behaviour, code: grpc.StatusCode) -> None:
    behaviour.failures.extend([Failure(code, reason="STEP_FAILED")] * 2)
    for call in (lambda: client.tokenize("a"), lambda: list(client.stream("a"))):
        with pytest.raises(KIND.get(code, ServerError)) as caught:
            call()
        assert caught.value.details.reason == "STEP_FAILED"
    assert behaviour.calls == 2


def test_attempts_are_bounded_and_numbers_of_numpy_are_numbers(client: Client, behaviour: Behaviour) -> None:
    behaviour.failures.extend([Failure(Code.UNAVAILABLE)] * 10)
    with pytest.raises(Unavailable):
        client.generate("a", seed=np.int64(3), max_new_tokens=np.int32(4), timeout=1e12)
    assert [request.seed.base_seed for request in behaviour.requests] == [3] * 4


def test_a_stream_is_not_tried_again_after_its_first_message(client: Client, behaviour: Behaviour) -> None:
    behaviour.fail_after = {1: Failure(Code.UNAVAILABLE, "gone")}
    stream = client.stream("a")
    assert next(stream).text
    with pytest.raises(Unavailable, match="gone"):
        next(stream)
    assert list(stream) == []
    assert behaviour.calls == 1


def test_the_hint_of_the_server_is_waited_for(client: Client, behaviour: Behaviour) -> None:
    behaviour.failures.append(Failure(Code.RESOURCE_EXHAUSTED, retry_after=0.3))
    started = time.monotonic()
    client.tokenize("a")
    assert time.monotonic() - started >= 0.3


def test_no_pause_outlasts_the_deadline(client: Client, behaviour: Behaviour) -> None:
    behaviour.failures.append(Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=30))
    started = time.monotonic()
    with pytest.raises(Overloaded, match="full"):
        client.tokenize("a", timeout=20)
    assert time.monotonic() - started < 15


# Deadlines


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_the_deadline_ends_a_call_and_frees_the_server(
    client: Client, behaviour: Behaviour, call: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    assert client.tokenize("a").ids  # connected
    behaviour.wait_after = 1
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"not done within the timeout of 1 s"):
        list(getattr(client, call)("a", timeout=1))
    assert 0.9 < time.monotonic() - started < 15
    eventually(lambda: behaviour.running == 0 and behaviour.cancelled == 1)


def test_the_deadline_ends_a_call_of_one_answer(client: Client, behaviour: Behaviour) -> None:
    behaviour.delay = 3
    with pytest.raises(DeadlineExceeded):
        client.tokenize("a", timeout=0.3)
    with DecoderClient(client.target, timeout=0.3) as decoder:
        session = decoder.session()
        with pytest.raises(DeadlineExceeded):
            session.decode(Latents([[97.0, 0.0]]))


# Connecting


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1", retry=Retry(attempts=2, first_pause=0.01)) as client:
        with pytest.raises(Unavailable, match="onnect"):
            client.info()
        assert not client.healthy(1)
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 was not ready within 0\.2 s"):
            client.wait_until_ready(0.2)


def test_a_server_that_comes_later_is_waited_for(server: FakeServer, behaviour: Behaviour) -> None:
    port = server.port
    server.stop()
    with Client(f"127.0.0.1:{port}", retry=Retry(attempts=20, first_pause=0.1, growth=1)) as client:
        assert not client.healthy(1)
        later = start_server(port=port)
        try:
            client.wait_until_ready(10)
            assert client.tokenize("a").ids == (97,)
        finally:
            later.stop()


def test_a_server_that_was_away_long_is_found_again_within_the_retries(server: FakeServer) -> None:
    with Client(server.target, retry=Retry(attempts=5)) as client:
        assert client.healthy()
        server.stop()
        end = time.monotonic() + 4.5  # connecting is tried at ever longer intervals meanwhile
        while time.monotonic() < end:
            assert not client.healthy(1)
            time.sleep(0.1)
        later = start_server(port=server.port)
        try:
            assert client.tokenize("a").ids == (97,)
        finally:
            later.stop()


def test_a_new_client_does_not_share_the_fate_of_one_that_could_not_connect(server: FakeServer) -> None:
    server.stop()
    once = Retry(attempts=1)
    with Client(server.target, retry=once) as older:
        with pytest.raises(Unavailable, match="refused"):
            older.tokenize("a")
        later = start_server(port=server.port)
        try:
            with Client(server.target, retry=once) as newer:
                assert newer.tokenize("a").ids == (97,)
        finally:
            later.stop()


def test_health_is_what_the_server_says(client: Client, server: FakeServer) -> None:
    assert client.healthy()
    server.health.set("", 2)  # NOT_SERVING
    assert not client.healthy()


@pytest.mark.parametrize("target", ["", "localhost", "http://localhost:50051", "a b:1", "host:port"])
def test_a_target_that_is_none_is_refused(target: str) -> None:
    with pytest.raises(InvalidRequest, match="target: expected"):
        Client(target)


@pytest.mark.parametrize("target", ["localhost:1", "10.0.0.1:50051", "[::1]:50051", "dns:///a.b.c:1", "unix:/tmp/x"])
def test_targets_of_all_kinds_are_taken(target: str) -> None:
    with Client(target) as client:
        assert client.target == target


@pytest.mark.parametrize("settings", [{"key": ""}, {"key": "a\nb"}, {"key": "é"}])
def test_a_key_that_cannot_be_sent_is_refused(settings: dict) -> None:
    with pytest.raises(InvalidRequest, match="key"):
        Client("localhost:1", **settings)
    assert "secret" not in repr(Client("localhost:1", key="secret").__dict__)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="attempts"):
        Retry(attempts=0)
    with pytest.raises(InvalidRequest, match="cert and key"):
        Tls(cert="cert.pem")


def test_messages_above_the_limit_are_an_error_of_their_own(server: FakeServer, behaviour: Behaviour) -> None:
    with Client(server.target, connection=Connection(max_message_bytes=1000)) as client:
        with pytest.raises(MessageTooLarge, match="larger than max"):
            client.tokenize("a" * 2000)
        with pytest.raises(MessageTooLarge, match="larger than max"):
            client.tokenize("a" * 500)  # the answer is longer
    assert behaviour.calls == 1


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.generate(None), "prompt"),
        (lambda client: client.generate("a", stop=None), "stop"),
        (lambda client: client.generate("a", sampler={"steps": 2}), "sampler"),
        (lambda client: client.generate("a", timeout="5"), "timeout"),
        (lambda client: client.generate("a", request_id="my request"), "request_id"),
        (lambda client: client.generate("a", request_id="a" * 129), "request_id"),
        (lambda client: client.tokenize(None), "text"),
        (lambda client: client.encode_text(None), "texts"),
        (lambda client: client.decode_latents(np.zeros(4, np.float32)), "latents"),
        (lambda client: Client("127.0.0.1:93536"), "target"),
        (lambda client: Client("127.0.0.1:1", timeout=-1), "timeout"),
    ],
)
def test_arguments_of_another_kind_are_invalid_requests(
    client: Client, behaviour: Behaviour, call: Callable[[Client], object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call(client)
    assert (caught.value.field, behaviour.calls) == (field, 0)


def test_a_server_is_asked_once_even_without_time(server: FakeServer) -> None:
    with Client(server.target) as client:
        client.tokenize("a")
        client.wait_until_ready(0)
    assert server.behaviour.calls == 1  # health is asked of another service
    with Client("127.0.0.1:1") as nobody, pytest.raises(Unavailable, match="was not ready within 0 s"):
        nobody.wait_until_ready(0)
