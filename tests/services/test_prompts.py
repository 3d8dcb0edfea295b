"""Prompts of every kind are continued as documented."""

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


async def test_a_prompt_of_any_kind_is_continued_by_exactly_what_was_asked(tiny: Golden) -> None:
    async with system(tiny, split=True) as served:
        for name, prompt in PROMPTS.items():
            responses, ids = await write(served, prompt), served.tokenizer.encode(prompt)
            assert len(ids_of(responses)) == 6, name
            assert responses[-1].usage.prompt_tokens == len(ids), name
            assert text_of(responses) == served.tokenizer.decode(ids_of(responses)), name
            as_ids = await write(served, "", prompt_ids=types_pb2.TokenIds(ids=ids)) if ids else responses
            assert ids_of(as_ids) == ids_of(responses), name


async def test_four_thousand_tokens_are_a_prompt_like_any_other(tiny: Golden) -> None:
    async with system(tiny, split=True, max_context=8192) as served:
        ids = served.tokenizer.encode(FOUR_THOUSAND)
        assert len(ids) >= 4000
        responses = await write(served, FOUR_THOUSAND)
        assert len(ids_of(responses)) == 6
        assert responses[-1].usage.prompt_tokens == len(ids)
