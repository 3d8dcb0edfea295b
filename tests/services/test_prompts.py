"""Prompts of every kind are continued as documented, or refused before any work with the field's name."""

import grpc
import pytest

from colaserve.v1 import types_pb2
from tests.conftest import Golden
from tests.services.systems import System, ids_of, system, text_of

FOUR_THOUSAND = "he said " * 2000

PROMPTS = {
    "empty": "",
    "one token": "a",
    "emoji": "I 🙂 you 👩‍👩‍👧 and 🇫🇷",
    "CJK": "東京は日本の首都です。",
    "NUL byte": "before\x00after",
    "text of a special token": "a<|im_end|>b<|pad|><|endoftext|>",
    "only white space": " \n\t ",
    "right to left": "שלום עולם",
    "combining characters": "e\u0301 \u200b\ufeff",
}


async def write(served: System, prompt: str, **fields: object) -> list:
    sampler = {"steps": 2, "guidance_scale": 3}
    seed = {"base_seed": 1}
    return await served.generate(
        **{"prompt": prompt, "max_new_tokens": 6, "ignore_end": True, "sampler": sampler, "seed": seed} | fields
    )


@pytest.mark.parametrize("name", PROMPTS)
async def test_a_prompt_of_any_kind_is_continued_by_exactly_what_was_asked(name: str, tiny: Golden) -> None:
    async with system(tiny, split=True) as served:
        responses = await write(served, PROMPTS[name])
        ids = served.tokenizer.encode(PROMPTS[name])
        assert len(ids_of(responses)) == 6
        assert responses[-1].usage.prompt_tokens == len(ids)
        assert text_of(responses) == served.tokenizer.decode(ids_of(responses))
        as_ids = await write(served, "", prompt_ids=types_pb2.TokenIds(ids=ids)) if ids else responses
        assert ids_of(as_ids) == ids_of(responses)


async def test_the_text_of_a_special_token_is_that_token(tiny: Golden) -> None:
    async with system(tiny, split=False) as served:
        assert list(served.tokenizer.encode("<|im_end|>")) == [tiny.meta["im_end_token_id"]]
        responses = await write(served, "<|im_end|>")
        assert responses[-1].usage.prompt_tokens == 1


@pytest.mark.parametrize("extra", [0, 1, 3])
async def test_prompts_that_fill_their_blocks_or_do_not_are_continued(extra: int, tiny: Golden) -> None:
    async with system(tiny, split=True) as served:
        ids = list(range(10, 18 + extra))
        responses = await write(served, "", prompt_ids=types_pb2.TokenIds(ids=ids), with_latents=True)
        assert len(ids_of(responses)) == 6
        assert responses[-1].usage.blocks == -(-(extra + 6) // 4) + responses[-1].usage.wasted_blocks


async def test_four_thousand_tokens_are_a_prompt_like_any_other(tiny: Golden) -> None:
    async with system(tiny, split=True, max_context=8192) as served:
        ids = served.tokenizer.encode(FOUR_THOUSAND)
        assert len(ids) >= 4000
        responses = await write(served, FOUR_THOUSAND)
        assert len(ids_of(responses)) == 6
        assert responses[-1].usage.prompt_tokens == len(ids)


async def test_what_can_never_fit_is_refused_before_any_work_with_both_numbers(tiny: Golden) -> None:
    async with system(tiny, split=True) as served:
        for prompt, budget in ((FOUR_THOUSAND, 6), ("a", 10_000)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await write(served, prompt, max_new_tokens=budget)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            said = refused.value.details() or ""
            assert "256" in said
            assert "prompt" in said or "max_new_tokens" in said
