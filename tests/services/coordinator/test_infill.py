from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve_services.coordinator.infill import Segment, infill, open_spans

SEED = types_pb2.NoiseSeed(base_seed=5)


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
