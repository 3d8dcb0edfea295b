import asyncio
import time
from contextlib import aclosing, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colaserve.v1 import generation_pb2, types_pb2
from colaserve_client.arrays import tensor_from_array
from colaserve_services.coordinator import Call, Defaults
from colaserve_services.coordinator.defaults import sampling_seed
from colaserve_services.coordinator.generation import generate
from colaserve_services.errors import DeadlineExceeded, InvalidRequest, StepFailed
from colaserve_services.text import SpecialIds, Tokenizer
from tests.services.coordinator.stage_fakes import FakeDecoder
from tests.services.text.small_tokenizers import byte_fallback, metaspace
from tests.waiting import eventually

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
PROMPT = "He looked at the river and then he said nothing"


def ids_of(responses: list[Any]) -> list[int]:
    return [id_ for response in responses for id_ in response.token_ids]


def tokens_of(responses) -> list[str]:
    return [token for response in responses for token in response.tokens]


def text_of(responses: list[Any]) -> str:
    return "".join(response.text for response in responses)


def scripted(tokenizer: Any, text: str, prompt: str = "", **more: Any) -> FakeDecoder:
    """A decoder that repeats the prompt's tail (as repaint does) and then writes `text`."""
    tail = len(tokenizer.encode(prompt)) % 4
    return FakeDecoder(script=tokenizer.encode(prompt)[-tail:] * bool(tail) + tokenizer.encode(text), **more)


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 16, 33])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8])
async def test_exactly_max_new_tokens_come_out_in_as_few_blocks_as_it_takes(world, length: int, budget: int):
    responses = await world.generate(
        prompt_ids=types_pb2.TokenIds(ids=range(10, 10 + length)), max_new_tokens=budget, ignore_end=True
    )
    last = responses[-1]
    blocks = -(-(length % 4 + budget) // 4)
    assert len(ids_of(responses)) == budget == last.usage.completion_tokens
    assert (last.finish_reason, last.usage.prompt_tokens, last.usage.blocks) == (LENGTH, length, blocks)
    assert len(responses) == blocks
    assert text_of(responses) == world.tokenizer.decode(ids_of(responses))
    assert all(not response.HasField("usage") and not response.finish_reason for response in responses[:-1])


async def test_the_prompts_redecoded_tail_is_dropped_and_counts_as_history(world):
    ids = list(range(10, 17))
    responses = await world.generate(prompt_ids=types_pb2.TokenIds(ids=ids), max_new_tokens=9)
    opening = world.decoder.calls[0]
    assert list(opening.prefix.values.shape) == [4, 2]
    assert opening.max_latents == 4 + 3 * 4
    assert len(ids_of(responses)) == 9
    sample = world.prior.calls[0]
    assert (list(sample.canvas.latents.values.shape), sample.max_blocks, sample.first_block) == ([7, 2], 3, 0)
    assert not sample.canvas.open


@pytest.mark.parametrize(("length", "redecoded"), [(5, 5), (7, 0), (8, 0), (9, 1), (15, 0), (1, 1)])
async def test_with_patches_the_redecoded_ids_are_those_after_the_last_whole_block(make_world, length, redecoded):
    world = await make_world(FakeDecoder(script=list(range(100, 150))), patch_size=2)
    responses = await world.generate(prompt_ids=types_pb2.TokenIds(ids=range(10, 10 + length)), max_new_tokens=11)
    assert ids_of(responses) == list(range(100 + redecoded, 111 + redecoded))
    assert responses[-1].usage.blocks == -(-(redecoded + 11) // 8)


async def test_every_sampler_and_sampling_field_reaches_its_stage_unset_ones_by_the_defaults(make_world):
    world = await make_world(defaults=Defaults.of(steps=5, solver="heun", temperature=0.5, top_k=7, max_new_tokens=6))
    seed = types_pb2.NoiseSeed(base_seed=7, sample_id=3)
    responses = await world.generate(prompt="a", seed=seed)
    sampler, sampling = world.prior.calls[0].sampler, world.decoder.calls[0].sampling
    unset = {"guidance_scale": 7, "guidance_start": 1, "guidance_end": 0, "resamples": 1, "stable_steps": 0}
    assert sampler == types_pb2.Sampler(steps=5, solver=types_pb2.SOLVER_HEUN, **unset)
    assert all(sampler.HasField(name) for name in ("guidance_end", "resamples", "guidance_start"))
    expected = types_pb2.Sampling(temperature=0.5, top_k=7, top_p=0.9, repetition_penalty=1.1, seed=sampling_seed(seed))
    assert sampling == expected
    assert world.prior.calls[0].seed == seed
    assert len(ids_of(responses)) == 6


async def test_set_fields_win_over_defaults(world):
    sampler = types_pb2.Sampler(
        steps=3, guidance_scale=1, solver=types_pb2.SOLVER_AB2, guidance_start=0.5, guidance_end=0.25, resamples=2,
        stable_steps=2, stable_distance=0.5, steering=[{"direction": tensor_from_array([1.0, 2.0]), "scale": 2}],
    )  # fmt: skip
    sampling = types_pb2.Sampling(temperature=0, top_k=0, top_p=1, repetition_penalty=1, seed=0)
    await world.generate(prompt="a", sampler=sampler, sampling=sampling)
    assert world.prior.calls[0].sampler == sampler
    assert world.decoder.calls[0].sampling == sampling


async def test_a_drawn_seed_is_returned_and_repeats_the_run(world):
    first = await world.generate(prompt=PROMPT, max_new_tokens=12)
    again = await world.generate(prompt=PROMPT, max_new_tokens=12, seed=first[-1].seed)
    other = await world.generate(prompt=PROMPT, max_new_tokens=12)
    assert ids_of(first) == ids_of(again)
    assert first[-1].seed == again[-1].seed != other[-1].seed


@pytest.mark.parametrize("before", range(9))
async def test_an_end_id_ends_the_text_wherever_in_a_block_it_stands(make_world, before: int):
    world = await make_world(FakeDecoder(script=[50] * before + [1] + [51] * 20))
    responses = await world.generate(max_new_tokens=20)
    assert ids_of(responses) == [50] * before
    assert len(responses) == before // 4 + 1


async def test_end_and_pad_tokens_are_not_printed_unless_asked(make_world, tokenizer):
    text = "one<|im_end|>t<|pad|>wo<|endoftext|>"
    world = await make_world(scripted(tokenizer, text))
    asked = {"max_new_tokens": len(tokenizer.encode(text)), "ignore_end": True, "top_logprobs": 0}
    plain = await world.generate(**asked)
    assert text_of(plain) == "onetwo"
    assert ids_of(plain) == tokenizer.encode(text)
    assert tokens_of(plain) == tokenizer.token_texts(tokenizer.encode(text))
    assert "<|im_end|>" in tokens_of(plain)
    assert text_of(await world.generate(**asked, print_special=True)) == text
    assert text_of(await world.generate(**asked, stop=["tw"])) == "one", "what is not printed parts no stop string"


async def test_each_token_has_its_text_and_its_place_in_the_whole(make_world, tokenizer):
    text = "he 😀 looked"
    world = await make_world(scripted(tokenizer, text, PROMPT))
    responses = await world.generate(prompt=PROMPT, max_new_tokens=len(tokenizer.encode(text)), top_logprobs=1)
    offsets = [offset for response in responses for offset in response.text_offsets]
    named = zip(tokens_of(responses), offsets, strict=True)
    assert all(text[offset:].startswith(token) for token, offset in named if "\ufffd" not in token)
    assert {offset for token, offset in zip(tokens_of(responses), offsets, strict=True) if "\ufffd" in token} == {3}
    assert [top.tokens[0] for response in responses for top in response.top_logprobs] == tokens_of(responses)


@pytest.mark.parametrize("fallback", [False, True])
async def test_texts_tokens_and_offsets_hold_where_tokens_are_no_bytes(make_world, fallback: bool):
    library = byte_fallback() if fallback else metaspace()
    words = ["▁sea", "s", "▁the", "▁sea"]
    tokenizer = Tokenizer(library, 512, SpecialIds(library.token_to_id("<|pad|>")))
    prompt = [library.token_to_id("▁the")]
    world = await make_world(FakeDecoder(script=prompt + list(map(library.token_to_id, words))), text=tokenizer)
    prompted = await world.generate(prompt_ids=types_pb2.TokenIds(ids=prompt), max_new_tokens=4, top_logprobs=1)
    assert text_of(prompted) == " seas the sea"
    assert tokens_of(prompted) == [" sea", "s", " the", " sea"]
    assert [offset for response in prompted for offset in response.text_offsets] == [0, 4, 5, 9]
    assert [top.tokens[0] for response in prompted for top in response.top_logprobs] == tokens_of(prompted)
    free = await world.generate(max_new_tokens=3)
    assert (text_of(free), tokens_of(free)) == ("the seas", ["the", " sea", "s"])


@pytest.mark.parametrize("stop", [["river"], ["riv", "iver"], ["d the ri"], ["never", "river"]])
async def test_a_stop_string_ends_the_text_before_it_across_blocks(make_world, tokenizer, stop):
    text = "he crossed the river at night and the river took him"
    world = await make_world(scripted(tokenizer, text))
    responses = await world.generate(max_new_tokens=60, stop=stop)
    expected = text[: min(text.find(one) for one in stop if one in text)]
    assert text[len(expected) :].startswith(responses[-1].stop_string)
    assert [response.stop_string in stop for response in responses] == [False] * (len(responses) - 1) + [True]
    assert (text_of(responses), responses[-1].finish_reason) == (expected, STOP)
    ids = ids_of(responses)
    assert any(one in tokenizer.decode(ids) for one in stop), "the token that completes it is reported"
    assert not any(one in tokenizer.decode(ids[:-1]) for one in stop), "and none after it"
    assert responses[-1].usage.completion_tokens == len(ids)


async def test_logprobs_and_latents_come_only_when_asked_for_one_for_each_id(world):
    plain = await world.generate(prompt=PROMPT, max_new_tokens=6)
    rich = await world.generate(prompt=PROMPT, max_new_tokens=6, top_logprobs=3, with_latents=True, seed=plain[-1].seed)
    chosen = await world.generate(prompt=PROMPT, max_new_tokens=6, top_logprobs=0)
    assert not any(response.logprobs or response.HasField("latents") for response in plain)
    for response in rich:
        assert list(response.logprobs) == pytest.approx([-id_ / 100 for id_ in response.token_ids])
        assert [top.token_ids[0] for top in response.top_logprobs] == list(response.token_ids)
        assert all(len(top.token_ids) == 3 for top in response.top_logprobs)
        assert (list(response.latents.values.shape), response.latents.space) == ([4, 2], world.prior.space)
    assert all(len(r.logprobs) == len(r.token_ids) and not r.top_logprobs for r in chosen)


async def test_the_last_message_has_the_timing_of_the_call_whose_blocks_and_tokens_are_counted(world):
    responses = await world.generate(prompt=PROMPT, max_new_tokens=12, ignore_end=True)
    blocks, prompt = len(responses), len(world.tokenizer.encode(PROMPT))
    assert all(response.timing.compute_us == 220 for response in responses[:-1])
    assert responses[-1].timing.compute_us == 220 * blocks + 2
    assert responses[-1].timing.queue_us >= 110 * blocks + 1
    assert world.counted("time_to_first_block_seconds_count") == {(): 1}
    assert world.counted("inter_block_seconds_count") == {(): blocks - 1}
    assert world.counted("tokens_total") == {("prompt",): prompt, ("completion",): 12}


@pytest.mark.parametrize(
    ("length", "budget", "name"), [(100, 157, "max_new_tokens"), (256, 1, "prompt"), (0, 2**32 - 1, "max_new_tokens")]
)
async def test_what_can_never_fit_is_refused_with_both_numbers(world, length: int, budget: int, name: str):
    with pytest.raises(InvalidRequest) as caught:
        await world.generate(prompt_ids=types_pb2.TokenIds(ids=[5] * length), max_new_tokens=budget)
    assert caught.value.field == name
    assert all(str(number) in str(caught.value) for number in (length, budget, -(-(length + budget) // 4) * 4, 256))
    assert not world.encoder.calls
    responses = await world.generate(prompt_ids=types_pb2.TokenIds(ids=[5] * 100), max_new_tokens=156, ignore_end=True)
    assert len(ids_of(responses)) == 156, "what just fits is done"
    assert world.prior.remaining == world.decoder.remaining == world.encoder.remaining == [None], "no deadline is made"


async def test_a_default_budget_is_what_fits(make_world):
    world = await make_world(defaults=Defaults.of(max_new_tokens=100))
    [*_, last] = await world.generate(prompt_ids=types_pb2.TokenIds(ids=[5] * 230), ignore_end=True)
    assert last.usage.completion_tokens == 26
    with pytest.raises(InvalidRequest, match="prompt"):
        await world.generate(prompt_ids=types_pb2.TokenIds(ids=[5] * 256))


async def test_a_text_far_too_long_is_refused_without_tokenizing_it(world, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(world.tokenizer, "encode_all", None)
    with pytest.raises(InvalidRequest, match=r"prompt: has \d+ tokens or more, at most 256 fit"):
        await world.generate(prompt="a" * 1_000_000)


async def test_the_prior_runs_ahead_while_the_decoder_works_and_is_cancelled_at_the_end(make_world, tokenizer):
    world = await make_world(scripted(tokenizer, "a<|im_end|>"))
    world.decoder.gate.clear()
    running = asyncio.create_task(world.generate(max_new_tokens=100))
    await asyncio.sleep(0.05)
    world.decoder.gate.set()
    last = (await running)[-1]
    assert last.usage.wasted_blocks >= 1
    assert last.usage.blocks == last.usage.wasted_blocks + 1 < 6
    assert world.counted("wasted_blocks_total") == {(): last.usage.wasted_blocks}
    assert (world.prior.running, world.decoder.running) == (0, 0)


@pytest.mark.parametrize("ending", ["left", "failed"])
async def test_blocks_of_a_text_that_did_not_come_to_its_end_are_not_wasted(world, ending: str):
    request = generation_pb2.GenerateRequest(prompt="he", max_new_tokens=100, ignore_end=True)
    if ending == "failed":
        world.decoder.faults = {0: (4, StepFailed("it cannot be computed"))}
    with suppress(StepFailed):
        async with aclosing(world.ask(generate, request)) as responses:
            await anext(responses)
            await asyncio.sleep(0.05)  # the prior runs ahead meanwhile
            while ending == "failed":
                await anext(responses)
    assert world.counted("tokens_total")
    assert world.counted("wasted_blocks_total") == {}


@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_deadline_reaches_each_stage_and_ends_the_call(world, stage: str):
    getattr(world, stage).gate.clear()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=stage):
        await world.generate(prompt=PROMPT, call=Call(deadline=time.monotonic() + 1))
    assert time.monotonic() - started < 10
    assert 0 < getattr(world, stage).remaining[0] <= 1
    await eventually(lambda: (world.prior.running, world.decoder.running) == (0, 0))


@settings(max_examples=20)
@given(st.integers(0, 2**62), st.integers(0, 9999))
def test_a_derived_sampling_seed_is_a_function_of_the_noise_seed(base: int, sample: int):
    one, again, other = (types_pb2.NoiseSeed(base_seed=base + more, sample_id=sample) for more in (0, 0, 1))
    assert 0 <= sampling_seed(one) == sampling_seed(again) < 2**63
    assert sampling_seed(one) != sampling_seed(other)
