"""Errors: every status has its type, details arrive, only what is safe is tried again. A malformed answer is the
server's fault. A proxy of the environment is passed by on the way to this machine, and used to others."""

import pickle
import re
import socket
import threading
import time
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

from colaserve_client import (
    Cancelled,
    Client,
    ColaserveError,
    Connection,
    DeadlineExceeded,
    DecoderClient,
    EncoderClient,
    InvalidRequest,
    MessageTooLarge,
    ModelMismatch,
    NotAuthenticated,
    NotSupported,
    Overloaded,
    PriorClient,
    Retry,
    Sampler,
    Sampling,
    ServerError,
    Tls,
    Unavailable,
)
from colaserve_client.cli.exits import line_of
from tests.client.behaviour import Behaviour, Failure
from tests.client.fakes import FakeServer, start_server
from tests.client.test_stages import LETTERS
from tests.waiting import wait_until as eventually

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
SAFE = (Code.UNAVAILABLE, Code.CANCELLED, Code.RESOURCE_EXHAUSTED)


# A status


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_every_status_has_its_error_and_only_what_is_safe_is_tried_again(client, behaviour, code):
    for call in (lambda: client.tokenize("a"), lambda: client.generate("a")):
        behaviour.calls = 0
        behaviour.failures.extend([Failure(code, "two\n lines")] * 4)
        with pytest.raises(ColaserveError, match=r"two lines\)?$") as caught:
            call()
        assert type(caught.value) is KIND.get(code, ServerError)
        assert isinstance(caught.value.__cause__, grpc.RpcError)
        assert (len(caught.value.request_id), behaviour.calls) == (32, 4 if code in SAFE else 1)
        behaviour.failures.clear()


def test_details_arrive_and_the_hint_of_the_server_is_waited_for(client: Client, behaviour: Behaviour) -> None:
    behaviour.failures.append(Failure(Code.INVALID_ARGUMENT, "steps: too many", field="sampler.steps"))
    with pytest.raises(ValueError, match="steps: too many") as bad:
        client.tokenize("a")
    behaviour.failures.append(Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=30))
    started = time.monotonic()
    with pytest.raises(Overloaded, match="full") as busy:  # no pause outlasts the deadline
        client.tokenize("a", request_id="mine", timeout=20)
    assert time.monotonic() - started < 15
    assert isinstance(bad.value, InvalidRequest)
    assert bad.value.field == "sampler.steps"
    again = pickle.loads(pickle.dumps(busy.value))
    assert (str(again), again.retry_after, again.request_id) == ("full", 30, "mine")
    behaviour.failures.append(Failure(Code.RESOURCE_EXHAUSTED, retry_after=0.3))
    started = time.monotonic()
    assert client.tokenize("a").ids
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED])
def test_a_failed_step_is_never_tried_again(client: Client, behaviour: Behaviour, code: grpc.StatusCode) -> None:
    behaviour.failures.extend([Failure(code, reason="STEP_FAILED")] * 2)
    for call in (lambda: client.tokenize("a"), lambda: list(client.stream("a"))):
        with pytest.raises(KIND.get(code, ServerError)) as caught:
            call()
        assert caught.value.details.reason == "STEP_FAILED"
    assert behaviour.calls == 2


def test_a_stream_is_not_tried_again_after_its_first_message(client: Client, behaviour: Behaviour) -> None:
    behaviour.fail_after = {1: Failure(Code.UNAVAILABLE, "gone")}
    stream = client.stream("a")
    assert next(stream).text
    with pytest.raises(Unavailable, match="gone"):
        next(stream)
    assert list(stream) == []
    assert behaviour.calls == 1


@pytest.mark.parametrize(
    ("call", "delay"),
    [
        (lambda client: client.generate("a", timeout=0.5), 0),
        (lambda client: list(client.stream("a", timeout=0.5)), 0),
        (lambda client: client.tokenize("a", timeout=0.5), 3),
        (lambda client: DecoderClient(client.target, timeout=0.5).session().decode([[97.0, 0.0]]), 0),
    ],
    ids=["generate", "stream", "tokenize", "session"],
)
def test_the_deadline_ends_a_call_and_frees_the_server(client, behaviour, call, delay):
    assert client.tokenize("a").ids  # connected
    behaviour.wait_after, behaviour.delay = 0, delay
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"not done within the timeout of 0.5 s"):
        call(client)
    assert 0.4 < time.monotonic() - started < 15
    eventually(lambda: behaviour.running == 0 and behaviour.cancelled == (not delay))


# Connecting


def test_a_server_that_is_not_there_is_unavailable_and_health_is_what_it_says(server: FakeServer) -> None:
    with Client("127.0.0.1:1", retry=Retry(attempts=2, first_pause=0.01)) as nobody:
        with pytest.raises(Unavailable, match="onnect"):
            nobody.info()
        assert not nobody.healthy(1)
        for seconds in (0.2, 0):
            with pytest.raises(Unavailable, match=rf"127\.0\.0\.1:1 was not ready within {seconds} s"):
                nobody.wait_until_ready(seconds)
    with Client(server.target) as client:
        assert client.healthy()
        client.wait_until_ready(0)  # it is called once even without time
        server.health.set("", 2)  # NOT_SERVING
        assert not client.healthy()


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


@pytest.mark.parametrize("target", ["localhost:1", "10.0.0.1:50051", "[::1]:50051", "dns:///a.b.c:1", "unix:/tmp/x"])
def test_targets_of_all_kinds_are_taken(target: str) -> None:
    with Client(target) as client:
        assert client.target == target


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
        (lambda client: client.generate("\ud800"), "prompt"),
        (lambda client: client.generate("a", stop=None), "stop"),
        (lambda client: client.generate("a", stop="end"), "stop"),
        (lambda client: client.generate("a", max_new_tokens=-1), "max_new_tokens"),
        (lambda client: client.generate("a", max_new_tokens=0), "max_new_tokens"),
        (lambda client: client.generate("a", max_new_tokens=1 << 40), "max_new_tokens"),
        (lambda client: client.generate("a", max_new_tokens=1.5), "max_new_tokens"),
        (lambda client: client.generate("a", seed=-3), "seed.base_seed"),
        (lambda client: client.generate("a", sampler={"steps": 2}), "sampler"),
        (lambda client: client.generate("a", sampler=Sampler(steps=-1)), "sampler.steps"),
        (lambda client: client.generate("a", sampler=Sampler(solver="dpm")), "sampler.solver"),
        (lambda client: client.generate("a", sampling=Sampling(top_p="half")), "sampling.top_p"),
        (lambda client: client.generate("a", steps=8, sampler=Sampler(steps=8)), "steps"),
        (lambda client: client.generate("a", sampling_seed=2, sampling=Sampling(seed=1)), "sampling_seed"),
        (lambda client: client.generate("a", timeout="5"), "timeout"),
        (lambda client: client.generate("a", timeout=0), "timeout"),
        (lambda client: client.generate("a", request_id="my request"), "request_id"),
        (lambda client: client.generate("a", request_id="new\nline"), "request_id"),
        (lambda client: client.generate("a", request_id="a" * 129), "request_id"),
        (lambda client: list(client.generate_many(["a"], concurrency=0)), "concurrency"),
        (lambda client: client.tokenize(None), "text"),
        (lambda client: client.encode_text(None), "texts"),
        (lambda client: client.encode_text("one text"), "texts"),
        (lambda client: client.reconstruct("one text"), "texts"),
        (lambda client: client.infill("one text"), "segments"),
        (lambda client: client.generate("a", steering=[{"direction": [[1], [1, 2]]}]), "sampler.steering[0].direction"),
        (lambda client: client.generate("a", steering=[{"directions": [1]}]), "sampler.steering[0]"),
        (lambda client: client.generate("a", steering={"direction": [1]}), "sampler.steering"),
        (lambda client: client.generate("a", steering=3), "sampler.steering"),
        (lambda client: client.generate("a", steering=[{"direction": [1], "end": 2}]), "sampler.steering[0].end"),
        (lambda client: client.infill(["a", -1]), "segments[1].token_count"),
        (lambda client: client.decode_latents([1.0, 2.0]), "latents"),
        (lambda client: client.decode_latents(None), "latents"),
        (lambda client: client.sample_latents("text", max_blocks=1), "prefix"),
        (lambda client: client.interpolate("a", np.zeros((2, 2, 2))), "end"),
        (lambda client: client.interpolate(None, "a"), "start"),
        (lambda client: client.interpolate("a", "b", interpolation="cubic"), "interpolation"),
        (lambda client: EncoderClient(client.target).encode([[1], [-1]]), "sequences[1]"),
        (lambda client: PriorClient(client.target).sample(max_blocks=1), "noise_source"),
        (lambda client: PriorClient(client.target).sample(max_blocks=1, seed=1, noise=[[[1.0]]]), "noise_source"),
        (lambda client: Client("127.0.0.1:93536"), "target"),
        (lambda client: Client(""), "target"),
        (lambda client: Client("localhost"), "target"),
        (lambda client: Client("http://localhost:50051"), "target"),
        (lambda client: Client("a b:1"), "target"),
        (lambda client: Client("host:port"), "target"),
        (lambda client: Client("127.0.0.1:1", timeout=-1), "timeout"),
        (lambda client: Client("127.0.0.1:1", key=""), "key"),
        (lambda client: Client("127.0.0.1:1", key="a\nb"), "key"),
        (lambda client: Client("127.0.0.1:1", key="é"), "key"),
        (lambda client: Retry(attempts=0), "retry.attempts"),
        (lambda client: Tls(cert="cert.pem"), "tls"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name_before_it_is(client, behaviour, call, field):
    with pytest.raises(InvalidRequest, match=rf"^{re.escape(field)}: ") as caught:
        call(client)
    assert (caught.value.field, behaviour.calls) == (field, 0)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(Client("localhost:1", key="secret").__dict__)


def shorten_latents(answer: Any) -> None:
    answer.latents.values.data = answer.latents.values.data[:-1]


def shorten_encodings(answer: Any) -> None:
    for encoding in answer.encodings:
        shorten_latents(encoding)


def drop_a_logprob(answer: Any) -> None:
    del answer.logprobs[0]


def test_one_malformed_answer_is_the_servers_fault(client: Client, server: FakeServer, behaviour: Behaviour) -> None:
    behaviour.spoil = shorten_encodings
    said = r"malformed answer: latents\.values: shape \(1, 2\) needs 8 bytes"
    with EncoderClient(server.target) as encoder:
        for call in (partial(client.encode_text, ["a"]), partial(encoder.encode, [[97]])):
            with pytest.raises(ServerError, match=said) as bad:
                call(request_id="mine")
            assert bad.value.request_id == "mine"
            assert not isinstance(bad.value, ValueError)


def test_a_stream_with_a_malformed_answer_is_cancelled(client: Client, behaviour: Behaviour) -> None:
    behaviour.spoil, behaviour.wait_after = shorten_latents, 1
    stream = client.sample_latents(max_blocks=5, request_id="mine")
    with pytest.raises(ServerError, match="malformed answer") as bad:
        next(stream)
    assert bad.value.request_id == "mine"
    eventually(lambda: behaviour.cancelled == 1)
    assert list(stream) == []


def test_a_session_with_a_malformed_answer_is_closed(server: FakeServer, behaviour: Behaviour) -> None:
    behaviour.spoil = drop_a_logprob
    with DecoderClient(server.target) as decoder:
        session = decoder.session()
        with pytest.raises(ServerError, match="malformed answer") as bad:
            session.decode(LETTERS)
        assert bad.value.request_id == session.request_id
        eventually(lambda: behaviour.running == 0)
        with pytest.raises(Cancelled, match="session is closed"):
            session.decode(LETTERS)


def test_blocks_of_different_spaces_are_a_malformed_answer(client: Client, behaviour: Behaviour) -> None:
    spaces = iter("abcdefgh")

    def rename(answer: Any) -> None:
        answer.latents.space = next(spaces) * 16

    behaviour.spoil = rename
    with pytest.raises(ServerError, match="latents of different spaces") as bad:
        client.generate("a", with_latents=True, request_id="mine")
    assert bad.value.request_id == "mine"


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "dns:///localhost", "ipv4:127.0.0.1"])
def test_servers_on_this_machine_are_reached_past_a_proxy(server, host, monkeypatch):
    monkeypatch.setenv("http_proxy", NOBODY)
    port = server.target.rpartition(":")[2]
    with Client(f"{host}:{port}", retry=Retry(attempts=1), timeout=20) as client:
        assert client.info().name


def test_servers_elsewhere_are_reached_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        client = Client("colaserve.example:50051", retry=Retry(attempts=1), timeout=20)
        with client, pytest.raises(Unavailable) as caught:
            client.info()
        thread.join(20)
    assert asked[0].startswith(b"CONNECT colaserve.example:50051 ")
    assert "http_proxy is set" in line_of(caught.value)
