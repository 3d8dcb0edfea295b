"""Every field of a GenerateRequest reaches what honours it, through real stages: setting it changes what comes back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from colaserve.v1 import generation_pb2, types_pb2
from tests.conftest import load_golden
from tests.services.systems import ids_of, recorded, system, text_of

Request = generation_pb2.GenerateRequest


@dataclass
class Answer:
    """What came back, in the forms that fields act on."""

    ids: list[int]
    text: str
    latents: list[bytes]
    responses: list[Any]

    @classmethod
    def of(cls, responses: list[Any]) -> "Answer":
        latents = [response.latents.values.data for response in responses]
        return cls(ids_of(responses), text_of(responses), latents, responses)


Check = Callable[[Answer, Answer], bool]


def other_latents(base: Answer, got: Answer) -> bool:
    return base.latents[0] != got.latents[0]


def other_ids_from_the_same_latents(base: Answer, got: Answer) -> bool:
    return base.latents == got.latents and base.ids != got.ids


def cut_at_stop(base: Answer, got: Answer) -> bool:
    return got.text == base.text[: base.text.index(STOP)] and got.responses[-1].finish_reason == 1


def of_length(count: int) -> Check:
    return lambda base, got: len(got.ids) == count and got.ids == base.ids[:count]


def with_top(base: Answer, got: Answer) -> bool:
    first = got.responses[0]
    return not base.responses[0].logprobs and len(first.logprobs) == len(first.token_ids) == len(first.top_logprobs)


def beyond_the_end(base: Answer, got: Answer) -> bool:
    return len(got.ids) > len(base.ids) and got.ids[: len(base.ids)] == base.ids and got.ids[len(base.ids)] in (0, 1)


STOP = "STOP"  # replaced by a part of the base's text

# Field path -> (the change to the base request, what must differ).
WALK: dict[str, tuple[dict[str, Any], Check]] = {
    "prompt": ({"prompt": "A guardian angel walked in"}, other_latents),
    "prompt_ids": ({"prompt": "", "prompt_ids": {"ids": [77, 78, 79]}}, other_latents),
    "max_new_tokens": ({"max_new_tokens": 5}, of_length(5)),
    "sampler.steps": ({"sampler": {"steps": 3}}, other_latents),
    "sampler.guidance_scale": ({"sampler": {"guidance_scale": 1.5}}, other_latents),
    "sampler.solver": ({"sampler": {"solver": types_pb2.SOLVER_HEUN}}, other_latents),
    "sampler.guidance_start": ({"sampler": {"guidance_start": 0.5}}, other_latents),
    "sampler.guidance_end": ({"sampler": {"guidance_end": 0.5}}, other_latents),
    "sampler.resamples": ({"sampler": {"resamples": 2}}, other_latents),
    "sampling.temperature": ({"sampling": {"temperature": 0}}, other_ids_from_the_same_latents),
    "sampling.top_k": ({"sampling": {"top_k": 1}}, other_ids_from_the_same_latents),
    "sampling.top_p": ({"sampling": {"top_p": 0.01}}, other_ids_from_the_same_latents),
    "sampling.repetition_penalty": ({"sampling": {"repetition_penalty": 50}}, other_ids_from_the_same_latents),
    "sampling.seed": ({"sampling": {"seed": 4}}, other_ids_from_the_same_latents),
    "seed.base_seed": ({"seed": {"base_seed": 6}}, other_latents),
    "seed.sample_id": ({"seed": {"sample_id": 3}}, other_latents),
    "stop": ({"stop": [STOP]}, cut_at_stop),
    "with_latents": ({"with_latents": False}, lambda base, got: not any(got.latents) and all(base.latents)),
    "top_logprobs": ({"top_logprobs": 2}, with_top),
}
BASE: dict[str, Any] = {
    "prompt": "He looked at the river and then he said",
    "max_new_tokens": 14,
    "sampler": {"steps": 4, "guidance_scale": 3},
    "sampling": {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 1},
    "seed": {"base_seed": 5},
    "with_latents": True,
    "ignore_end": True,
}


def leaves(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.name != "TokenIds":
            yield from leaves(field.message_type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_the_walk_covers_every_field() -> None:
    assert {*WALK, "ignore_end", "print_special"} == set(leaves(Request.DESCRIPTOR))


def changed(change: dict[str, Any], text: str) -> dict[str, Any]:
    merged = dict(BASE)
    for name, value in change.items():
        merged[name] = BASE.get(name, {}) | value if isinstance(value, dict) else value
    if "stop" in merged:
        merged["stop"] = [text[4:7]]
    return merged


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
async def test_every_field_has_its_effect(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with system(load_golden("tiny_b4"), split) as served:
        await served.generate(**BASE)  # its prefix is cached from here on: equal bytes from equal passes
        base = Answer.of(await served.generate(**BASE))
        assert Answer.of(await served.generate(**BASE)).ids == base.ids
        monkeypatch.setitem(globals(), "STOP", base.text[4:7])
        for field, (change, differs) in WALK.items():
            got = Answer.of(await served.generate(**changed(change, base.text)))
            assert differs(base, got), field


async def test_ignoring_the_end_goes_on_after_it() -> None:
    golden = load_golden("tiny_b4_vae1")  # its first recorded text has an end token
    request = recorded(golden.meta["cases"][0], 0, 15)
    async with system(golden, split=False) as served:
        stops = Answer.of(await served.generate(**request | {"ignore_end": False, "print_special": False}))
        goes_on = Answer.of(await served.generate(**request | {"print_special": False}))
        assert beyond_the_end(stops, goes_on)
        printed = Answer.of(await served.generate(**request))
        assert printed.ids == goes_on.ids
        assert len(printed.text) > len(goes_on.text)
