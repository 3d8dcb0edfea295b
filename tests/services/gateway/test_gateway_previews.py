"""Previews, probes and latents in the chunks of streamed completions."""

from __future__ import annotations

import json
from typing import Any

from tests.services.gateway.fake_generation import SAYS
from tests.services.gateway.running_gateway import Running

LATENTS = {"shape": [2, 1], "dtype": "float32", "data": "AACAPwAAAEA=", "space": ""}  # 1 and 2


async def choices(gateway: Running, **fields: Any) -> list[dict[str, Any]]:
    response = await gateway.complete(stream=True, max_tokens=100, **fields)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [choice for event in events for choice in json.loads(event)["choices"]]


async def test_previews_are_chunks_of_their_own_without_text(gateway: Running):
    plain = await choices(gateway)
    watched = await choices(gateway, preview_every=2)
    looks = [choice for choice in watched if "preview" in choice]
    assert [choice for choice in watched if "preview" not in choice] == plain
    assert watched[0] == looks[0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": None,
        "preview": {"block_index": 0, "step": 2, "text": "?"},
    }  # fmt: skip
    assert [look["preview"]["block_index"] for look in looks] == list(range(len(looks)))
    assert "".join(choice["text"] for choice in watched) == SAYS


async def test_probes_and_latents_come_with_their_block(gateway: Running):
    for choice in await choices(gateway, preview_every=1, with_probes=True, with_latents=True):
        where = choice.get("preview", choice)
        assert where["latents"] == LATENTS
        if where is choice:
            assert choice["probes"] == {"norm": 1.25, "entropy": 0.1, "end_probability": 0}


async def test_a_preview_is_no_first_block(gateway: Running):
    """The text of an echoed prompt still comes first."""
    first, *_ = await choices(gateway, preview_every=1, echo=True)
    assert first["text"] == "Where?"
