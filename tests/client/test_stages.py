"""The latent service, its forks and vectors, and the three stages."""

import asyncio
import sys
import time
from dataclasses import replace

import grpc
import grpc.aio
import numpy as np
import pytest

from colaserve.v1 import types_pb2
from colaserve.v1.decoder_pb2 import DecodeRequest
from colaserve_client import (
    AsyncDecoderClient,
    AsyncDecodeSession,
    Branch,
    Cancelled,
    Client,
    DecoderClient,
    EncoderClient,
    InvalidRequest,
    Latents,
    NoiseSeed,
    PriorClient,
    Retry,
    Sampler,
    Sampling,
    Unavailable,
)
from colaserve_client.calls import Attempts
from tests.client.behaviour import Behaviour, Failure
from tests.client.fakes import SPACE, FakeServer
from tests.waiting import wait_until as eventually

FAST = Retry(attempts=3, first_pause=0.01)
LETTERS = Latents([[97.0, 0.0], [98.0, 0.0], [99.0, 0.0], [100.0, 0.0]], SPACE)


# The latent service


def test_a_text_goes_to_latents_and_back(client: Client) -> None:
    first, second = client.encode_text(["héllo", "b"], with_variance=True)
    assert first.latents.space == SPACE
    assert first.log_variance.shape == first.latents.values.shape
    assert second.token_ids == (98,)
    decoded = client.decode_latents(first.latents, top_logprobs=1, target_ids=[1, 2], token_count=3)
    assert (decoded.text, len(decoded.logprobs), decoded.target_logprobs) == ("hé", 3, (-0.75, -0.75))


def test_wherever_token_ids_come_their_texts_come(client: Client) -> None:
    [encoding], points = client.encode_text(["fox"]), client.interpolate("fox", "fox", points=2)
    found = [encoding, *points, *client.reconstruct(["fox"]), client.decode_latents(encoding.latents)]
    assert all(one.tokens == ("f", "o", "x") for one in found)
    filled = client.infill(["fo", 1])
    assert (filled.tokens, filled.finish_reasons) == (("f", "o", "_"), ("length",))


@pytest.mark.parametrize("kind", [list, np.array, Latents])
def test_an_array_is_taken_wherever_latents_are(server, client, kind):
    values = kind(LETTERS.values.tolist())
    assert client.decode_latents(values).text == "abcd"
    assert next(client.sample_latents(values, max_blocks=1)).index == 0
    points = client.interpolate("aaaa", values, points=2, interpolation="slerp", temperature=0.5)
    assert [(point.weight, point.text) for point in points] == [(0, "aaaa"), (1, "abcd")]
    asked = server.behaviour.requests[-1]
    assert (asked.interpolation, asked.sampling.temperature) == (2, 0.5)
    with PriorClient(server.target) as prior, DecoderClient(server.target) as decoder:
        assert [block.index for block in prior.sample(values, max_blocks=1, seed=1)] == [0]
        with decoder.session(values) as session:
            assert session.decode(values).token_ids == (97, 98, 99, 100)


def test_sampled_latents_stream_and_cancel(client: Client, behaviour: Behaviour) -> None:
    blocks = list(client.sample_latents(LETTERS, max_blocks=2, sampler=Sampler(steps=3), seed=5))
    assert [block.index for block in blocks] == [0, 1]
    assert blocks[0].seed == NoiseSeed(5)
    request = behaviour.requests[-1]
    assert (request.max_blocks, request.sampler.steps, Latents.from_proto(request.prefix)) == (2, 3, LETTERS)
    behaviour.wait_after = 1
    with client.sample_latents(max_blocks=5) as stream:
        next(stream)
    eventually(lambda: behaviour.cancelled == 1)


def test_infill_keeps_texts_counts_holes_and_passes_a_salt(client: Client, behaviour: Behaviour) -> None:
    result = client.infill(["a", 2, "b", 1], seed=NoiseSeed(3, 4), sampler=Sampler(resamples=2))
    assert (result.text, result.seed, result.usage.completion_tokens) == ("a__b_", NoiseSeed(3, 4), 3)
    assert behaviour.requests[-1].sampler.resamples == 2
    client.infill(["a", 2], cache_salt="mine")
    assert behaviour.requests[-1].cache_salt == "mine"
    list(client.sample_latents(max_blocks=1, cache_salt="ours"))
    assert behaviour.requests[-1].cache_salt == "ours"


def test_info_describes_the_stage(client: Client, server: FakeServer) -> None:
    info = client.info()
    assert (info.name, info.space, info.end_ids, info.pad_id) == ("fake", SPACE, (0,), 1)
    assert info.default_sampler == Sampler(steps=16, guidance_scale=7, solver="euler")
    assert info.default_sampling == Sampling(temperature=0, top_k=50, top_p=0.9)
    assert info.stages[0].serving
    assert (info.server.running, info.server.waiting, info.limits.max_context) == (1, 2, 64)
    assert client.latent_info().has_variance is None
    with EncoderClient(server.target) as encoder:
        assert encoder.info().has_variance is True


# The stages


def test_a_seed_gives_its_noise() -> None:
    torch = pytest.importorskip("torch")
    noise = NoiseSeed(7, 2).noise(2, 4, 3, first_block=1)
    generator = torch.Generator().manual_seed(7 + 2_000 + 20_000_000)
    np.testing.assert_array_equal(noise[1], torch.randn(4, 3, generator=generator).numpy())
    assert (noise.shape, noise.dtype) == ((2, 4, 3), np.float32)


def test_the_noise_of_a_seed_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        NoiseSeed(7).noise(1, 4, 2)


def test_the_prior_takes_seed_or_noise(server: FakeServer, behaviour: Behaviour) -> None:
    with PriorClient(server.target) as prior:
        blocks = list(prior.sample(LETTERS, open_spans=[(1, 3)], max_blocks=2, first_block=4, seed=NoiseSeed(1, 2)))
        assert [block.index for block in blocks] == [4, 5]
        request = behaviour.requests[-1]
        assert list(request.canvas.open) == [types_pb2.Span(start=1, end=3)]
        assert Latents.from_proto(request.canvas.latents) == LETTERS
        list(prior.sample(max_blocks=1, noise=np.ones((1, 4, 2)), cache_salt="ours"))
        assert (list(behaviour.requests[-1].noise.shape), behaviour.requests[-1].cache_salt) == ([1, 4, 2], "ours")


def test_the_prior_scores_all_positions_or_those_that_are_open(server: FakeServer, behaviour: Behaviour) -> None:
    with PriorClient(server.target) as prior:
        found = prior.score(LETTERS, probes=2, steps=4, solver="ab2", seed=7)
        assert (found.log_densities, found.standard_errors, found.evaluations) == ((-3.5,), (0.25,), 64)
        request = behaviour.requests[-1]
        assert (list(request.canvas.open), request.seed.base_seed) == ([types_pb2.Span(start=0, end=4)], 7)
        assert (request.probes, request.steps, request.solver) == (2, 4, types_pb2.SOLVER_AB2)
        prior.score(LETTERS, open_spans=[(1, 3)], cache_salt="ours")
        request = behaviour.requests[-1]
        assert (list(request.canvas.open), request.cache_salt) == ([types_pb2.Span(start=1, end=3)], "ours")


def test_a_session_decodes_block_by_block(server: FakeServer, behaviour: Behaviour) -> None:
    with DecoderClient(server.target) as decoder:
        with decoder.session(
            LETTERS, sampling=Sampling(seed=3), history_ids=[1, 2], with_logits=True, top_logprobs=2, max_latents=16
        ) as session:
            first, second = session.decode(LETTERS), session.decode(LETTERS)
        assert first == second
        assert first.token_ids == (97, 98, 99, 100)
        assert first.logits.shape == (4, 2)
        assert len(first.logprobs[0].top) == 2
        opening = behaviour.requests[-1].open
        assert (list(opening.history_ids), opening.max_latents, opening.sampling.seed) == ([1, 2], 16, 3)
        eventually(lambda: behaviour.running == 0)
        with pytest.raises(Cancelled, match="session is closed"):
            session.decode(LETTERS)


def test_a_session_that_failed_before_its_first_answer_is_opened_again(server, behaviour):
    behaviour.failures.extend([Failure(grpc.StatusCode.UNAVAILABLE), Failure(grpc.StatusCode.RESOURCE_EXHAUSTED)])
    with DecoderClient(server.target, retry=FAST) as decoder, decoder.session() as session:
        assert session.decode(LETTERS).token_ids == (97, 98, 99, 100)
    assert behaviour.calls == 3


def test_a_session_that_broke_later_is_not(server: FakeServer, behaviour: Behaviour) -> None:
    behaviour.fail_after = {1: Failure(grpc.StatusCode.UNAVAILABLE, "gone")}
    with DecoderClient(server.target, retry=FAST) as decoder, decoder.session() as session:
        session.decode(LETTERS)
        with pytest.raises(Unavailable, match="gone"):
            session.decode(LETTERS)
    assert behaviour.calls == 1


@pytest.mark.parametrize("pause", [0, 0.01, 0.05])
async def test_a_session_reports_how_it_ended_though_its_loop_is_busy(server, behaviour, pause):
    """grpc.aio forgets the status of a stream that ended while the loop did something else."""
    behaviour.failures.extend([Failure(grpc.StatusCode.INVALID_ARGUMENT, "no block", field="block")] * 100)

    async def keep_busy() -> None:
        while True:
            time.sleep(pause)  # noqa: ASYNC251 - the loop is to be busy
            await asyncio.sleep(0)

    busy = asyncio.create_task(keep_busy())
    async with AsyncDecoderClient(server.target, retry=replace(FAST, attempts=25)) as decoder:
        for _ in range(4):
            async with decoder.session() as session:
                with pytest.raises(InvalidRequest, match="no block"):
                    await session.decode(LETTERS)
    busy.cancel()


async def test_a_status_that_was_lost_counts_as_a_server_that_was_lost() -> None:
    calls: list[LosesItsStatus] = []

    def start() -> LosesItsStatus:
        calls.append(LosesItsStatus())
        return calls[-1]

    attempts = Attempts(Retry(attempts=3, first_pause=0))
    session = AsyncDecodeSession(start, DecodeRequest(), lambda answer: answer, attempts)
    with pytest.raises(Unavailable, match="while a request was being sent"):
        await session.decode(LETTERS)
    assert len(calls) == 3


class LosesItsStatus:
    """A call of grpc.aio whose stream has ended just before it is written to."""

    async def write(self, request: DecodeRequest) -> None:
        if request.HasField("block"):
            metadata = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, "Internal error from Core")

    def cancel(self) -> None:
        pass


async def test_a_session_that_was_left_while_it_waited_is_closed(server: FakeServer, behaviour: Behaviour) -> None:
    async with AsyncDecoderClient(server.target) as decoder, decoder.session() as session:
        await session.decode(LETTERS)
        behaviour.wait_after = 1
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.decode(LETTERS), 0.2)
        with pytest.raises(Cancelled, match="session is closed"):
            await session.decode(LETTERS)


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
