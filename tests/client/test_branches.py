"""A fork's branches and a text's vectors, as the client asks for them."""

import numpy as np
import pytest

from colaserve_client import Branch, Client, InvalidRequest, Latents, Sampler, Sampling
from tests.client.fakes import SPACE, FakeServer


def test_a_fork_sends_each_branch_its_own_and_all_what_they_share(client: Client, server: FakeServer) -> None:
    noise, written = np.ones((1, 4, 2)), Latents(np.ones((4, 2)), SPACE)
    branches = [
        Branch(),
        Branch(seed=7, sampler=Sampler(steps=3), sampling=Sampling(top_k=5), stop=["x"], written=written),
        Branch(noise=noise, max_new_tokens=4),
    ]
    results = client.fork_all([1, 2], branches, steps=8, temperature=0.5, seed=9, stop=["y"], max_new_tokens=8)
    assert [result.text for result in results] == [" there w", " there w", " the"]
    [asked] = server.behaviour.requests
    assert (list(asked.ids.ids), asked.sampler.steps, asked.sampling.temperature) == ([1, 2], 8, 0.5)
    assert (asked.seed.base_seed, list(asked.stop), asked.max_new_tokens) == (9, ["y"], 8)
    first, second, third = asked.branches
    assert first.ByteSize() == 0
    assert (second.seed.base_seed, second.sampler.steps, second.sampling.top_k, list(second.stop)) == (7, 3, 5, ["x"])
    assert (list(second.written.values.shape), second.written.space) == ([4, 2], SPACE)
    assert (list(third.noise.shape), third.max_new_tokens) == ([1, 4, 2], 4)


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("text", "text"), ([1, 2], "ids"), (np.ones((3, 2)), "latents"), (Latents(np.ones((3, 2)), SPACE), "latents")],
)
def test_a_prefix_is_a_text_ids_or_latents(client: Client, server: FakeServer, prefix: object, kind: str) -> None:
    assert len(client.fork_all(prefix, 3, max_new_tokens=4)) == 3  # type: ignore[arg-type]
    assert [asked.WhichOneof("prefix") for asked in server.behaviour.requests] == [kind]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        client.fork(prefix, 3, ids=[3])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("branches", "field"),
    [
        ([Branch(seed=-1)], "branches[0].seed.base_seed"),
        ([Branch(), Branch(stop="x")], "branches[1].stop"),
        ([Branch(), "seed"], "branches[1]"),
        ([Branch(max_new_tokens=0)], "branches[0].max_new_tokens"),
        ([Branch(written=[[float("nan")]])], "branches[0].written"),
    ],
)
def test_a_branch_that_cannot_be_sent_is_named(client: Client, branches: list[Branch], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.fork("x", branches)
    assert refused.value.details.field.startswith(field)


def test_texts_and_ids_are_embedded(client: Client, server: FakeServer) -> None:
    by_text = client.embed(["fox", "a hen"], pooling="per_block", normalize=True)
    by_ids = client.embed([list(b"fox"), list(b"a hen")], pooling="per_block", normalize=True)
    assert [each.values.tolist() for each in by_text] == [each.values.tolist() for each in by_ids]
    assert [(each.values.shape, each.token_count, each.space) for each in by_text] == [
        ((1, 2), 3, SPACE), ((1, 2), 5, SPACE),
    ]  # fmt: skip
    first, second = server.behaviour.requests
    assert list(first.texts) == ["fox", "a hen"]
    assert [bytes(each.ids) for each in second.sequences] == [b"fox", b"a hen"]
    assert first.pooling == second.pooling == 3
    with pytest.raises(InvalidRequest, match="texts: expected a list of strings"):
        client.embed("fox")
    with pytest.raises(InvalidRequest, match="pooling: expected one of mean"):
        client.embed(["fox"], pooling="max")  # type: ignore[arg-type]
