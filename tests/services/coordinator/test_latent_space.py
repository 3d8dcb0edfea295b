import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve_client.arrays import lerp, slerp
from colaserve_services.coordinator.infill import Segment, infill, open_spans
from colaserve_services.coordinator.interpolation import interpolate
from colaserve_services.coordinator.latent_space import (
    decode_latents,
    encode_text,
    logprobs,
    reconstruct,
    sample_latents,
)
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import arrays
from tests.services.coordinator.stage_fakes import SPACE, D, EchoDecoder

TEXT = "He looked at the river"
SEED = types_pb2.NoiseSeed(base_seed=5)


def message(array: Any, space: str = SPACE) -> types_pb2.Latents:
    return arrays.latents_to_message(np.asarray(array, np.float32).reshape(-1, D), space)


def values(latents: types_pb2.Latents) -> np.ndarray:
    return arrays.from_message(latents.values, "latents", (None, D))


def latents_of(world: Any, text: str) -> types_pb2.Latents:
    return message(world.encoder.encode(world.tokenizer.encode(text)))


@pytest.fixture
async def echo(make_world):
    return await make_world(EchoDecoder())


async def test_texts_become_latents_with_their_ids(world):
    texts = ["a", TEXT, "日本語"]
    response = await world.ask(encode_text, pb.EncodeTextRequest(texts=texts))
    for text, encoding in zip(texts, response.encodings, strict=True):
        assert list(encoding.token_ids) == world.tokenizer.encode(text)
        assert list(encoding.tokens) == world.tokenizer.token_texts(encoding.token_ids)
        assert encoding.latents == latents_of(world, text)
        assert not encoding.HasField("log_variance")


async def test_variance_comes_when_asked_for_and_is_refused_without_one(make_world):
    world = await make_world()
    request = pb.EncodeTextRequest(texts=["ab"], with_variance=True)
    response = await world.ask(encode_text, request)
    assert response.encodings[0].HasField("log_variance")
    world.encoder.has_variance = False
    await world.coordinator.connect()
    with pytest.raises(InvalidRequest, match="with_variance"):
        await world.ask(encode_text, request)


@pytest.mark.parametrize("length", [1, 3, 4, 9])
async def test_latents_become_text_the_last_block_filled_with_zeros(echo, length: int):
    ids = list(range(20, 20 + length))
    latents = message(echo.encoder.encode(ids))
    request = pb.DecodeLatentsRequest(latents=latents, top_logprobs=2, target_ids=[*ids[:-1], 7])
    response = await echo.ask(decode_latents, request)
    assert list(response.token_ids) == ids
    assert response.text == echo.tokenizer.decode(ids)
    assert len(response.logprobs) == len(response.top_logprobs) == length
    assert list(response.target_logprobs) == [-1.0] * (length - 1) + [-3.0]
    assert echo.decoder.calls[0].max_latents == -(-length // 4) * 4


@pytest.mark.parametrize("count", [1, 4, 6])
async def test_decoded_latents_have_n_times_p_tokens(make_world, count: int):
    world = await make_world(patch_size=2)
    world.decoder.script = list(range(100, 120))
    request = pb.DecodeLatentsRequest(latents=message(np.ones((count, D))))
    response = await world.ask(decode_latents, request)
    assert list(response.token_ids) == list(range(100, 100 + 2 * count))


async def test_decoding_is_by_the_defaults_but_without_a_penalty_unless_set(world):
    latents = message([1, 2])
    await world.ask(decode_latents, pb.DecodeLatentsRequest(latents=latents))
    sampling = types_pb2.Sampling(repetition_penalty=1.3, temperature=0.7, seed=9)
    await world.ask(decode_latents, pb.DecodeLatentsRequest(latents=latents, sampling=sampling))
    first, second = (call.sampling for call in world.decoder.calls)
    assert first == types_pb2.Sampling(temperature=0, top_k=50, top_p=0.9, repetition_penalty=1, seed=0)
    assert second == types_pb2.Sampling(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=9)


async def test_decoded_text_ends_before_an_end_or_pad_id_unless_a_count_is_given(echo, tokenizer):
    ids = [20, 21, 2, 22, 1]
    latents = message(echo.encoder.encode(ids))
    open_ended = await echo.ask(decode_latents, pb.DecodeLatentsRequest(latents=latents))
    counted = await echo.ask(decode_latents, pb.DecodeLatentsRequest(latents=latents, token_count=4))
    assert list(open_ended.token_ids) == [20, 21]
    assert list(open_ended.tokens) == tokenizer.token_texts([20, 21])
    assert list(counted.token_ids) == ids[:4]
    assert "<|pad|>" in counted.text


async def test_an_arc_that_leads_out_of_bounds_is_the_callers_and_no_stage_hears_of_it(world):
    start, end = (pb.Endpoint(latents=message([[9_000, y]])) for y in (9_000, -9_000))
    request = pb.InterpolateRequest(start=start, end=end, points=3, interpolation=pb.INTERPOLATION_SLERP)
    with pytest.raises(InvalidRequest, match=r"interpolation: got 12727\.9, expected -10000 to 10000"):
        await world.ask(interpolate, request)
    assert world.decoder.calls == []
    request.interpolation = pb.INTERPOLATION_LERP
    assert len((await world.ask(interpolate, request)).points) == 3


async def test_sampling_continues_latents_and_repeats_with_its_seed(world):
    prefix = message(np.arange(12))  # 6 latents: a block and a half

    async def sample(**fields: Any) -> list[pb.SampleLatentsResponse]:
        request = pb.SampleLatentsRequest(prefix=prefix, max_blocks=3, **fields)
        return [response async for response in world.ask(sample_latents, request)]

    first = await sample()
    again = await sample(seed=first[0].seed)
    assert [r.block_index for r in first] == [0, 1, 2]
    assert [r.latents for r in first] == [r.latents for r in again]
    assert np.array_equal(values(first[0].latents)[:2], values(prefix)[4:])
    assert all(r.seed == first[0].seed for r in first)


async def test_a_faithful_round_trip_has_full_accuracy(echo):
    response = await echo.ask(reconstruct, pb.ReconstructRequest(texts=[TEXT, "b"]))
    for text, one in zip([TEXT, "b"], response.reconstructions, strict=True):
        assert (one.text, one.token_accuracy) == (text, 1.0)
        assert list(one.token_ids) == list(one.original_ids) == echo.tokenizer.encode(text)
        assert "".join(one.tokens) == text
        assert one.bits_per_token == pytest.approx(1 / math.log(2))


async def test_an_unfaithful_round_trip_is_reported_in_share_and_bits(make_world):
    world = await make_world(EchoDecoder())
    draw = world.decoder.draw
    world.decoder.draw = lambda *args: [id_ if id_ % 2 else id_ + 1 for id_ in draw(*args)]
    one = (await world.ask(reconstruct, pb.ReconstructRequest(texts=[TEXT]))).reconstructions[0]
    right = [a == b for a, b in zip(one.token_ids, one.original_ids, strict=True)]
    assert any(right)
    assert not all(right)
    assert one.token_accuracy == pytest.approx(sum(right) / len(right))
    wanted = sum(1 if same else 3 for same in right) / len(right) / math.log(2)
    assert one.bits_per_token == pytest.approx(wanted)


async def test_a_round_trip_is_greedy_and_without_penalty(make_world):
    world = await make_world()
    await world.ask(reconstruct, pb.ReconstructRequest(texts=["a"]))
    sampling = world.decoder.calls[0].sampling
    assert (sampling.temperature, sampling.repetition_penalty) == (0, 1)


@pytest.mark.parametrize("as_ids", [False, True])
async def test_each_token_of_a_text_has_its_log_probability_its_likely_ones_and_its_place(echo, as_ids: bool):
    text = "He looked, 日本"
    ids = echo.tokenizer.encode(text)
    given = {"ids": types_pb2.TokenIds(ids=ids)} if as_ids else {"text": text}
    response = await echo.ask(logprobs, pb.LogprobsRequest(top_logprobs=2, **given))
    assert (response.text, list(response.token_ids)) == (text, ids)
    assert list(response.logprobs) == [-1.0] * len(ids)
    assert [len(top.token_ids) for top in response.top_logprobs] == [len(top.tokens) for top in response.top_logprobs]
    assert len(response.top_logprobs) == len(response.tokens) == len(ids)
    for token, offset in zip(response.tokens, response.text_offsets, strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)


@pytest.mark.parametrize("interpolation", ["INTERPOLATION_LERP", "INTERPOLATION_SLERP", "INTERPOLATION_UNSPECIFIED"])
async def test_the_ends_of_a_walk_between_texts_are_the_texts(echo, interpolation: str):
    start, end = "a river", "he looked at the river and then"
    request = pb.InterpolateRequest(
        start=pb.Endpoint(text=start), end=pb.Endpoint(text=end), points=5, interpolation=interpolation
    )
    points = (await echo.ask(interpolate, request)).points
    assert [point.weight for point in points] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert (points[0].text, points[-1].text) == (start, end)
    length = len(echo.tokenizer.encode(end))
    assert all(list(point.latents.values.shape) == [length, D] for point in points)
    padded = echo.encoder.calls[0].sequences[0].ids
    assert list(padded) == echo.tokenizer.encode(start) + [2] * (length - len(echo.tokenizer.encode(start)))


async def test_a_walk_between_latents_and_a_text_needs_as_many_positions(echo):
    count = len(echo.tokenizer.encode(TEXT))
    latents = message(np.ones((count, D)))
    request = pb.InterpolateRequest(start=pb.Endpoint(latents=latents), end=pb.Endpoint(text=TEXT), points=2)
    points = (await echo.ask(interpolate, request)).points
    assert points[0].latents == latents
    assert points[1].text == TEXT
    request.start.latents.CopyFrom(message(np.ones((count + 1, D))))
    with pytest.raises(InvalidRequest, match=rf"end: got {count} latents, expected .* \({count + 1}\)"):
        await echo.ask(interpolate, request)


rows = hnp.arrays(np.float32, (3, 4), elements=st.floats(-10, 10, width=32))


@settings(max_examples=25)
@given(rows, rows)
def test_both_paths_end_at_their_ends_bit_for_bit(a: np.ndarray, b: np.ndarray):
    for path in (lerp, slerp):
        assert np.array_equal(path(a, b, 0.0), a)
        assert np.array_equal(path(a, b, 1.0), b)
        assert np.isfinite(path(a, b, 0.3)).all()


def test_slerp_of_parallel_and_zero_rows_is_the_straight_line():
    a = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    b = np.array([[3.0, 3.0], [2.0, 2.0], [-1.0, 0.0]], np.float32)
    assert np.allclose(slerp(a, b, 0.5), [[2, 2], [1, 1], [0, 0]])


def segments(*parts: str | int) -> list[pb.InfillSegment]:
    return [
        pb.InfillSegment(text=part) if isinstance(part, str) else pb.InfillSegment(token_count=part) for part in parts
    ]


async def filled(world: Any, *parts: str | int, **fields: Any) -> pb.InfillResponse:
    request = pb.InfillRequest(segments=segments(*parts), seed=SEED, **fields)
    return await world.ask(infill, request)


parts = st.lists(st.one_of(st.text(min_size=1, max_size=9), st.integers(1, 9)), min_size=1, max_size=6).filter(
    lambda parts: any(isinstance(part, int) for part in parts)
)


@pytest.fixture
async def worlds(make_world):
    """By their patch size."""
    return {patch_size: await make_world(patch_size=patch_size) for patch_size in (1, 2, 3)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(parts, st.sampled_from([1, 2, 3]))
async def test_kept_text_comes_back_as_it_was_and_holes_have_the_tokens_asked_for(worlds, parts, patch_size):
    world = worlds[patch_size]
    response = await filled(world, *parts)
    assert len(response.segments) == len(parts)
    assert response.text == "".join(response.segments)
    ids, rest = list(response.token_ids), []
    for part, text in zip(parts, response.segments, strict=True):
        if isinstance(part, str):
            kept = world.tokenizer.encode(part)
            assert text == part
            assert ids[: len(kept)] == kept
            ids = ids[len(kept) :]
        else:
            assert text == world.tokenizer.decode(world.tokenizer.before_end(ids[:part]))
            rest, ids = rest + ids[:part], ids[part:]
    assert not ids
    assert response.usage.completion_tokens == len(rest) == sum(part for part in parts if isinstance(part, int))
    assert response.usage.prompt_tokens == len(response.token_ids) - len(rest)


async def test_the_kept_text_is_encoded_once_with_pad_ids_in_the_holes(world):
    await filled(world, "ab", 3, "cd")
    before, after = (world.tokenizer.encode(text) for text in ("ab", "cd"))
    assert list(world.encoder.calls[0].sequences[0].ids) == [*before, 2, 2, 2, *after]
    canvas = world.prior.calls[0].canvas
    assert [(span.start, span.end) for span in canvas.open] == [(len(before), len(before) + 3)]
    assert canvas.latents.values.shape[0] == 4, "up to the last block with a hole"


async def test_blocks_after_the_last_hole_are_not_run(world):
    long = "he looked at the river and then he said nothing"
    response = await filled(world, "abcde", 2, long)
    sample = world.prior.calls[0]
    assert (sample.max_blocks, sample.canvas.latents.values.shape[0]) == (1, 8)
    assert world.decoder.calls[0].prefix.values.shape[0] == 4
    assert response.usage.blocks == 1


@pytest.mark.parametrize(
    ("patch_size", "pieces", "expected"),
    [
        (1, [("a", 2), (None, 3), ("b", 1)], [(2, 5)]),
        (2, [("a", 3), (None, 2), ("b", 4)], [(1, 3)]),
        (2, [("a", 4), (None, 2), ("b", 4)], [(2, 3)]),
        (4, [(None, 1), ("b", 2), (None, 1)], [(0, 1)]),
        (2, [(None, 2), ("b", 2), (None, 2)], [(0, 1), (2, 3)]),
        (2, [(None, 1), (None, 1), ("b", 2), (None, 1)], [(0, 1), (2, 3)]),
    ],
)
def test_a_latent_that_covers_kept_and_hole_tokens_is_open(patch_size, pieces, expected):
    found, at = [], 0
    for kept, length in pieces:
        found.append(Segment(kept, at, at + length))
        at += length
    assert open_spans(found, patch_size) == expected


async def test_a_seed_repeats_an_infill_and_is_returned(world):
    first = await filled(world, "ab", 6, "cd")
    assert first.seed == SEED
    assert (await filled(world, "ab", 6, "cd")).token_ids == first.token_ids
    drawn = await world.ask(infill, pb.InfillRequest(segments=segments("ab", 6)))
    again = await world.ask(infill, pb.InfillRequest(segments=segments("ab", 6), seed=drawn.seed))
    assert again.token_ids == drawn.token_ids


async def test_a_holes_text_ends_before_an_end_or_pad_id_and_its_ids_are_reported_in_full(make_world):
    world = await make_world()
    world.decoder.script = [20, 1, 21, 22]
    response = await filled(world, 4)
    assert list(response.token_ids) == [20, 1, 21, 22]
    assert response.text == world.tokenizer.decode([20])
    assert list(response.tokens) == world.tokenizer.token_texts([20, 1, 21, 22])
    assert response.finish_reasons == [types_pb2.FINISH_REASON_STOP]
    assert (await filled(world, 1)).finish_reasons == [types_pb2.FINISH_REASON_LENGTH]
