"""What a server sends and what does not fit is the server's fault, and ends the call."""

from functools import partial
from typing import Any

import pytest

from colaserve_client import Cancelled, Client, DecoderClient, EncoderClient, ServerError
from tests.client.behaviour import Behaviour
from tests.client.fakes import FakeServer
from tests.client.test_stages import LETTERS
from tests.waiting import wait_until as eventually


def shorten_latents(answer: Any) -> None:
    answer.latents.values.data = answer.latents.values.data[:-1]


def shorten_encodings(answer: Any) -> None:
    for encoding in answer.encodings:
        shorten_latents(encoding)


def drop_a_logprob(answer: Any) -> None:
    del answer.logprobs[0]


def test_one_answer(client: Client, server: FakeServer, behaviour: Behaviour) -> None:
    behaviour.spoil = shorten_encodings
    said = r"malformed answer: latents\.values: shape \(1, 2\) needs 8 bytes"
    with EncoderClient(server.target) as encoder:
        for call in (partial(client.encode_text, ["a"]), partial(encoder.encode, [[97]])):
            with pytest.raises(ServerError, match=said) as bad:
                call(request_id="mine")
            assert bad.value.request_id == "mine"
            assert not isinstance(bad.value, ValueError)


def test_a_stream_is_cancelled(client: Client, behaviour: Behaviour) -> None:
    behaviour.spoil, behaviour.wait_after = shorten_latents, 1
    stream = client.sample_latents(max_blocks=5, request_id="mine")
    with pytest.raises(ServerError, match="malformed answer") as bad:
        next(stream)
    assert bad.value.request_id == "mine"
    eventually(lambda: behaviour.cancelled == 1)
    assert list(stream) == []


def test_a_session_is_closed(server: FakeServer, behaviour: Behaviour) -> None:
    behaviour.spoil = drop_a_logprob
    with DecoderClient(server.target) as decoder:
        session = decoder.session()
        with pytest.raises(ServerError, match="malformed answer") as bad:
            session.decode(LETTERS)
        assert bad.value.request_id == session.request_id
        eventually(lambda: behaviour.running == 0)
        with pytest.raises(Cancelled, match="session is closed"):
            session.decode(LETTERS)


def test_blocks_of_different_spaces(client: Client, behaviour: Behaviour) -> None:
    spaces = iter("abcdefgh")

    def rename(answer: Any) -> None:
        answer.latents.space = next(spaces) * 16

    behaviour.spoil = rename
    with pytest.raises(ServerError, match="latents of different spaces") as bad:
        client.generate("a", with_latents=True, request_id="mine")
    assert bad.value.request_id == "mine"
