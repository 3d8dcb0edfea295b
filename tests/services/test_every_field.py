"""Every field of the coordinator's requests has its effect, through real stages: setting it changes what comes back."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve_client.arrays import tensor_from_array
from colaserve_client.fields import fields_of
from colaserve_client.settings import NoiseSeed, Sampler, Sampling
from tests.conftest import load_golden
from tests.services.systems import System, ids_of, recorded, system, text_of

ONE, OTHER = "He looked at the river and then he said", "A guardian angel walked in and sat down by the fire"
STEERING = types_pb2.Steering(direction=tensor_from_array([1.0] * 16), scale=0.5)
WRITTEN = types_pb2.Latents(values=tensor_from_array([[0.5] * 16] * 4))
# Of each setting a base and another value.
SAMPLER = {"steps": (4, 3), "guidance_scale": (3, 1.5), "solver": (types_pb2.SOLVER_EULER, types_pb2.SOLVER_HEUN),
           "guidance_start": (1, 0.5), "guidance_end": (0, 0.5), "resamples": (1, 2),
           "stable_steps": (2, 1), "stable_distance": (0.9, 1e-6), "steering": ([], [STEERING])}  # fmt: skip
SAMPLING = {"temperature": (2.0, 0), "top_k": (0, 1), "top_p": (1.0, 0.01), "repetition_penalty": (1.0, 50),
            "seed": (1, 4)}  # fmt: skip
SEED = {"base_seed": (5, 6), "sample_id": (0, 3)}
WATCHED = {"preview_every"}  # see test_golden_generation.py: previews come as far as there is time for them
WHOLE = {"Latents", "Tensor", "TokenIds", "Steering"}  # messages that are one value

Fields = dict[str, Any]


def base(**settings: dict[str, tuple[Any, Any]]) -> Fields:
    return {message: {name: values[0] for name, values in table.items()} for message, table in settings.items()}


def others(**settings: dict[str, tuple[Any, Any]]) -> dict[str, Fields]:
    """Field path -> the change that gives it the other value."""
    return {
        f"{message}.{name}": {message: {name: values[1]}}
        for message, table in settings.items()
        for name, values in table.items()
    }


def test_every_setting_of_the_table_has_another_value() -> None:
    for table, kind in ((SAMPLER, Sampler), (SAMPLING, Sampling), (SEED, NoiseSeed)):
        assert list(table) == list(fields_of(kind))


def walks(latents: types_pb2.Latents, other: types_pb2.Latents) -> dict[str, tuple[type, Fields, dict[str, Fields]]]:
    """Method -> its request, a base, and for each field path a change to the base."""
    holes = [{"text": ONE}, {"token_count": 8}, {"text": OTHER}]
    texts, all_of_them = {"texts": [ONE]}, {"sampler": SAMPLER, "sampling": SAMPLING, "seed": SEED}
    return {
        "Generate": (
            GenerateRequest,
            {"prompt": ONE, "max_new_tokens": 10, "with_latents": True, "ignore_end": True, **base(**all_of_them)},
            {
                "prompt": {"prompt": OTHER},
                "prompt_ids": {"prompt": "", "prompt_ids": {"ids": [77, 78, 79]}},
                "max_new_tokens": {"max_new_tokens": 5},
                "stop": {"stop": ["e", "a", "o", "i"]},
                "with_latents": {"with_latents": False},
                "choices": {"choices": ["a", "b"], "ignore_end": False, "sampling": {"temperature": 0}},
                "top_logprobs": {"top_logprobs": 2},
                "with_probes": {"with_probes": True},
                **others(**all_of_them),
            },
        ),
        "EncodeText": (
            pb.EncodeTextRequest, texts, {"texts": {"texts": [OTHER]}, "with_variance": {"with_variance": True}},
        ),
        "DecodeLatents": (
            pb.DecodeLatentsRequest,
            {"latents": latents, **base(sampling=SAMPLING)},
            {
                "latents": {"latents": other},
                "top_logprobs": {"top_logprobs": 2},
                "target_ids": {"target_ids": [7, 8]},
                "token_count": {"token_count": 3},
                **others(sampling=SAMPLING),
            },
        ),
        "SampleLatents": (
            pb.SampleLatentsRequest,
            {"prefix": latents, "max_blocks": 2, **base(sampler=SAMPLER, seed=SEED)},
            {
                "prefix": {"prefix": other},
                "max_blocks": {"max_blocks": 3},
                "with_probes": {"with_probes": True},
                **others(sampler=SAMPLER, seed=SEED),
            },
        ),
        "Interpolate": (
            pb.InterpolateRequest,
            {"start": {"latents": latents}, "end": {"latents": other}, "points": 3, **base(sampling=SAMPLING)},
            {
                "start.text": {"start": {"text": ONE[:-1]}, "end": {"text": OTHER}},
                "start.latents": {"start": {"latents": other}},
                "end.text": {"start": {"text": ONE}, "end": {"text": OTHER[:-1]}},
                "end.latents": {"end": {"latents": latents}},
                "points": {"points": 4},
                "interpolation": {"interpolation": pb.INTERPOLATION_LERP},
                **others(sampling=SAMPLING),
            },
        ),
        "Infill": (
            pb.InfillRequest,
            {"segments": holes, **base(**all_of_them)},
            {
                "segments.text": {"segments": [{"text": OTHER}, *holes[1:]]},
                "segments.token_count": {"segments": [holes[0], {"token_count": 5}, holes[2]]},
                **others(**all_of_them),
            },
        ),
        "Fork": (
            pb.ForkRequest,
            {"text": ONE, "branches": [{}], "max_new_tokens": 10, "ignore_end": True, **base(**all_of_them)},
            {
                "text": {"text": OTHER},
                "ids": {"ids": {"ids": [77, 78, 79]}},
                "latents": {"latents": latents},
                "max_new_tokens": {"max_new_tokens": 5},
                "stop": {"stop": ["e", "a", "o", "i"]},
                "top_logprobs": {"top_logprobs": 2},
                "with_probes": {"with_probes": True},
                "branches.seed.base_seed": {"branches": [{"seed": {"base_seed": 6}}]},
                "branches.seed.sample_id": {"branches": [{"seed": {"base_seed": 5, "sample_id": 3}}]},
                "branches.max_new_tokens": {"branches": [{"max_new_tokens": 5}]},
                "branches.stop": {"branches": [{"stop": ["e", "a", "o", "i"]}]},
                "branches.written": {"branches": [{"written": WRITTEN}]},
                **{f"branches.{field}": {"branches": [change]}
                   for field, change in others(sampler=SAMPLER, sampling=SAMPLING).items()},
                **others(**all_of_them),
            },
        ),
        "Embed": (
            pb.EmbedRequest,
            texts,
            {
                "texts": {"texts": [OTHER]},
                "sequences": {"texts": [], "sequences": [{"ids": [77, 78, 79]}]},
                "pooling": {"pooling": pb.POOLING_LAST_BLOCK},
                "normalize": {"normalize": True},
            },
        ),
        "Reconstruct": (pb.ReconstructRequest, texts, {"texts": {"texts": [OTHER]}}),
        "Score": (
            pb.LatentServiceScoreRequest,
            {"text": ONE, "probes": 2, "steps": 2, "solver": types_pb2.SOLVER_EULER, **base(seed=SEED)},
            {
                "prefix": {"prefix": OTHER},
                "text": {"text": OTHER},
                "samples": {"samples": 2},
                "probes": {"probes": 3},
                "steps": {"steps": 3},
                "solver": {"solver": types_pb2.SOLVER_HEUN},
                **others(seed=SEED),
            },
        ),
        "Logprobs": (
            pb.LogprobsRequest,
            {"text": ONE},
            {
                "text": {"text": OTHER},
                "ids": {"text": "", "ids": {"ids": [77, 78, 79]}},
                "latents": {"text": "", "latents": other},
                "top_logprobs": {"top_logprobs": 2},
                "logprob_ids": {"logprob_ids": [7, 8]},
                "all_logprobs": {"all_logprobs": True},
                "logprobs_dtype": {"logprob_ids": [7], "logprobs_dtype": types_pb2.DATA_TYPE_FLOAT16},
            },
        ),
    }  # fmt: skip


def leaves(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.name not in WHOLE:
            yield from leaves(field.message_type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_the_walk_covers_every_method_and_field() -> None:
    service = pb.DESCRIPTOR.services_by_name["LatentService"]
    found = walks(types_pb2.Latents(), types_pb2.Latents())
    assert {*found, "GetInfo"} == {"Generate", *(method.name for method in service.methods)}
    # See the test below; what a salt changes is time, see test_prefix_cache.py.
    # Noise: see test_latent_calls.py.
    elsewhere = {"Generate": {"ignore_end", "print_special", *WATCHED}, "SampleLatents": WATCHED,
                 "Fork": {"ignore_end", "print_special", "branches.noise", *WATCHED}}  # fmt: skip
    salted = {"Generate", "Fork", "SampleLatents", "Infill", "Logprobs", "Score"}
    for method, (request, _, changes) in found.items():
        changed = set(changes) | elsewhere.get(method, set()) | ({"cache_salt"} if method in salted else set())
        assert changed == set(leaves(request.DESCRIPTOR)), method


async def answer(served: System, method: str, request: Any) -> list[bytes]:
    """What came back, without its timing and the seed that it repeats: one message, or those of a stream."""
    call = getattr(served.generation if method == "Generate" else served.latents, method)(request)
    responses = [response async for response in call] if hasattr(call, "__aiter__") else [await call]
    for response in responses:
        for name in {"timing", "seed"}.intersection(response.DESCRIPTOR.fields_by_name):
            response.ClearField(name)
    return [response.SerializeToString(deterministic=True) for response in responses]


def merged(base: Fields, change: Fields) -> Fields:
    """Sampler, sampling and seed keep what the change does not name."""
    keep = {"sampler", "sampling", "seed"}
    return base | {name: base[name] | value if name in keep else value for name, value in change.items()}


@pytest.fixture
async def latents() -> Any:
    """The system, and the latents of two texts of as many positions."""
    async with system(load_golden("tiny_b4"), split=True) as served:
        encoded = await served.latents.EncodeText(pb.EncodeTextRequest(texts=[ONE, OTHER]))
        one, other = (encoding.latents for encoding in encoded.encodings)
        rows = min(one.values.shape[0], other.values.shape[0]) // 4 * 4 - 1
        yield served, first(one, rows), first(other, rows)


def first(latents: types_pb2.Latents, rows: int) -> types_pb2.Latents:
    """Their first positions."""
    width = latents.values.shape[1]
    values = types_pb2.Tensor(
        dtype=latents.values.dtype, shape=[rows, width], data=latents.values.data[: 4 * rows * width]
    )
    return types_pb2.Latents(values=values, space=latents.space)


async def without_effect(
    served: System, method: str, request: Any, base: Fields, changes: dict[str, Fields]
) -> list[str]:
    """The fields whose change leaves the answer as it was."""
    await answer(served, method, request(**base))  # its prefix is cached from here on: equal passes, equal bytes
    as_it_is = await answer(served, method, request(**base))
    assert await answer(served, method, request(**base)) == as_it_is, f"{method} repeats itself"
    changed = {
        field: await answer(served, method, request(**merged(base, change))) for field, change in changes.items()
    }
    return [f"{method}: {field}" for field, got in changed.items() if got == as_it_is]


async def test_every_field_has_its_effect(latents: Any) -> None:
    served, one, other = latents
    for method, walk in walks(one, other).items():
        assert not await without_effect(served, method, *walk)


async def test_ignoring_the_end_continues_after_it() -> None:
    golden = load_golden("tiny_b4_vae1")  # its first recorded text has an end token
    request = recorded(golden.meta["cases"][0], 0, 15)
    async with system(golden, split=False) as served:
        stops = await served.generate(**request | {"ignore_end": False, "print_special": False})
        goes_on = await served.generate(**request | {"print_special": False})
        count = len(ids_of(stops))
        assert ids_of(goes_on)[:count] == ids_of(stops)
        assert ids_of(goes_on)[count] in (0, 1)
        printed = await served.generate(**request)
        assert ids_of(printed) == ids_of(goes_on)
        assert len(text_of(printed)) > len(text_of(goes_on))
