"""Previews and probes as the client gives them, in streams and in results."""

import re

import pytest

from colaserve_client import Client, DecoderClient, InvalidRequest, PriorClient, Probes
from tests.client.behaviour import Behaviour
from tests.client.fakes import STORY, FakeServer

PROBES = Probes(1.5, None, None, None, 0.1, None)


def test_previews_come_between_the_chunks_of_blocks_and_in_the_result(client: Client) -> None:
    chunks = list(client.stream("Once", preview_every=2, with_latents=True))
    assert [chunk.preview is not None for chunk in chunks] == [True, False] * 7
    looks = [chunk.preview for chunk in chunks if chunk.preview is not None]
    assert [(look.index, look.step, look.text) for look in looks[:2]] == [(0, 2, " t??"), (1, 2, "re??")]
    assert looks[0].latents.shape == (4, 2)
    assert "".join(map(str, chunks)) == STORY.decode()
    whole = client.generate("Once", preview_every=2, with_latents=True)
    assert (whole.text, list(whole.previews), whole.probes) == (STORY.decode(), looks, ())
    assert client.generate("Once").previews == ()


def test_a_result_has_the_probes_of_its_blocks_alone(client: Client) -> None:
    assert client.generate("Once", with_probes=True, preview_every=1).probes == (PROBES,) * 7
    chunks = list(client.stream("Once", with_probes=True, preview_every=2))
    assert all(chunk.probes == PROBES for chunk in chunks)
    assert {chunk.probes for chunk in client.stream("Once")} == {None}


def test_sampled_latents_and_the_stages_have_them_too(server: FakeServer, client: Client, behaviour: Behaviour) -> None:
    blocks = list(client.sample_latents(max_blocks=2, preview_every=2, with_probes=True))
    found = [(block.index, block.step, block.provisional, block.probes) for block in blocks]
    assert found == [(index, *rest) for index in range(2) for rest in ((2, True, PROBES), (4, False, PROBES))]
    with PriorClient(server.target) as prior, DecoderClient(server.target) as decoder:
        list(prior.sample(max_blocks=1, seed=1, preview_every=3, with_probes=True))
        assert (behaviour.requests[-1].preview_every, behaviour.requests[-1].with_probes) == (3, True)
        with decoder.session(with_probes=True) as session:
            look, block = session.preview(blocks[0].latents), session.decode(blocks[1].latents)
        assert (look.provisional, look.token_ids, look.probes) == (True, block.token_ids, PROBES)
        assert not block.provisional


@pytest.mark.parametrize(("value", "fault"), [(1001, "got 1001, expected 0 to 1000"), (-1, "got -1"), (True, "True")])
def test_malformed_values_are_refused_by_name(client: Client, value: int, fault: str) -> None:
    for ask in (client.stream, client.generate):
        with pytest.raises(InvalidRequest, match=f"^preview_every: .*{re.escape(fault)}"):
            ask("Once", preview_every=value)
    with pytest.raises(InvalidRequest, match=r"^preview_every: "):
        client.sample_latents(max_blocks=1, preview_every=value)
    with pytest.raises(InvalidRequest, match=r"^with_probes: got 1, expected true or false"):
        client.generate("Once", with_probes=1)  # type: ignore[arg-type]
