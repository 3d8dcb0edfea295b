"""Ctrl-C and the blocking client: what the main thread waits for is cancelled, nothing is left behind."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from colaserve_client import Cancelled, Client, DecoderClient
from tests.client.behaviour import Behaviour
from tests.client.fakes import FakeServer
from tests.client.test_stages import LETTERS
from tests.waiting import wait_until as eventually


@contextmanager
def ctrl_c_when(holds: Callable[[], bool]) -> Iterator[None]:
    """Sends SIGINT once something holds, and expects that it is raised, soon."""
    sent: list[float] = []

    def send() -> None:
        eventually(holds)
        time.sleep(0.1)  # the main thread waits by now
        sent.append(time.monotonic())
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # no wait of the main thread is interrupted by it

    sender = threading.Thread(target=send)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it must be expected before it can be sent
        sender.start()
        yield
    sender.join()
    assert time.monotonic() - sent[0] < 10


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.generate("Once"),
        lambda client: list(client.stream("Once")),
        lambda client: next(client.generate_many(["a", "b", "c"], concurrency=1)),
    ],
    ids=["generate", "stream", "batch"],
)
def test_ctrl_c_cancels_what_runs_and_the_client_continues(client, behaviour, call):
    behaviour.wait_after = 1
    with ctrl_c_when(lambda: behaviour.running == 1):
        call(client)
    eventually(lambda: behaviour.running == 0)
    behaviour.wait_after = None
    assert client.generate("Once").text


def test_ctrl_c_cancels_a_call_with_one_answer_and_ends_a_stream(client: Client, behaviour: Behaviour) -> None:
    stream = client.stream("Once")
    next(stream)
    behaviour.delay, behaviour.calls = 30, 0
    with ctrl_c_when(lambda: behaviour.calls == 1):
        client.tokenize("fox")
    behaviour.delay, behaviour.wait_after = 0, 0
    stream = client.stream("Once")
    with ctrl_c_when(lambda: behaviour.running == 1):
        next(stream)
    assert list(stream) == []


def test_an_interrupted_session_is_closed(server: FakeServer) -> None:
    with DecoderClient(server.target) as decoder, decoder.session() as session:
        session.decode(LETTERS)
        server.behaviour.wait_after = 1
        with ctrl_c_when(lambda: server.behaviour.running == 1):
            session.decode(LETTERS)
        with pytest.raises(Cancelled, match="session is closed"):
            session.decode(LETTERS)
        eventually(lambda: server.behaviour.running == 0)


@pytest.mark.parametrize("delay", [number * 2e-5 for number in range(1, 41)])
def test_ctrl_c_at_any_moment_of_a_read_is_nothing_but_that(client: Client, behaviour: Behaviour, delay: float) -> None:
    behaviour.wait_after = 1
    stream = client.stream("Once")
    next(stream)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come before the read has begun
            signal.setitimer(signal.ITIMER_REAL, delay)
            next(stream)
    finally:
        signal.signal(signal.SIGALRM, before)
    eventually(lambda: behaviour.running == 0)
