"""What no call of the coordinator can honour is refused by name, before a stage has worked for it."""

from typing import Any

import numpy as np
import pytest

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve_services.coordinator.embedding import embed
from colaserve_services.coordinator.fork import fork
from colaserve_services.coordinator.generation import generate
from colaserve_services.coordinator.infill import infill
from colaserve_services.coordinator.interpolation import interpolate
from colaserve_services.coordinator.latent_space import (
    decode_latents,
    encode_text,
    logprobs,
    reconstruct,
    sample_latents,
)
from colaserve_services.coordinator.scoring import score
from colaserve_services.errors import InvalidRequest, ModelMismatch
from colaserve_services.rpc.arrays import to_message

ROWS = types_pb2.Latents(values=to_message(np.array([[1, 2], [3, 4]])))
WILD = types_pb2.Latents(values=to_message(np.array([[1, 2], [3, 1e20]])))
STRANGE = types_pb2.Latents(values=to_message(np.zeros((4, 2))), space="f" * 16)
NOISE = to_message(np.zeros((2, 4, 2)))
OUT_OF_BOUNDS = "values.data: got 1e+20 at [1, 1], expected finite values from -10000 to 10000"
SMALL = 20_000  # bytes of a message
FAR = "ab " * 300  # more tokens than fit

Fields = dict[str, Any]
# Call -> what does it, its request, what is right in it.
RIGHT: dict[str, tuple[Any, type, Fields]] = {
    "generate": (generate, GenerateRequest, {}),
    "choose": (generate, GenerateRequest, {"prompt": "a", "choices": [" said", " sat down by the fire", " went"]}),
    "encode": (encode_text, pb.EncodeTextRequest, {}),
    "decode": (decode_latents, pb.DecodeLatentsRequest, {"latents": ROWS}),
    "sample": (sample_latents, pb.SampleLatentsRequest, {"max_blocks": 1}),
    "interpolate": (interpolate, pb.InterpolateRequest, {"start": {"text": "a"}, "end": {"text": "b"}, "points": 3}),
    "infill": (infill, pb.InfillRequest, {}),
    "reconstruct": (reconstruct, pb.ReconstructRequest, {}),
    "logprobs": (logprobs, pb.LogprobsRequest, {}),
    "fork": (fork, pb.ForkRequest, {"branches": [{}], "max_new_tokens": 12}),
    "embed": (embed, pb.EmbedRequest, {}),
    "score": (score, pb.LatentServiceScoreRequest, {"prefix": "a", "text": "b", "probes": 3, "steps": 4}),
}
TEXTS: list[tuple[str, Fields]] = [
    ("texts: got 0 texts", {"texts": []}),
    ("texts: got 257 texts", {"texts": ["a"] * 257}),
    ("texts[1]: ", {"texts": ["a", ""]}),
    ("texts[0]: ", {"texts": [FAR]}),
]
# Call -> how the error begins, and what is wrong.
WRONG: dict[str, list[tuple[str, Fields]]] = {
    "generate": [  # settings have their ranges of one table, which the HTTP fields walk
        ("max_new_tokens: ", {"max_new_tokens": 0}),
        ("prompt_ids: ", {"prompt": "a", "prompt_ids": {"ids": [5]}}),
        ("prompt_ids: ", {"prompt_ids": {"ids": [512]}}),
        ("prompt_ids: ", {"prompt_ids": {"ids": [5] * 257}}),
        ("stop: ", {"stop": ["a", ""]}),
        ("stop: ", {"stop": ["a"] * 17}),
        ("stop: ", {"stop": ["a", "b" * 1001]}),
        ("top_logprobs: ", {"top_logprobs": 21}),
        ("preview_every: got 1001, expected 0 to 1000", {"preview_every": 1001}),
        ("sampler.steps: ", {"sampler": {"steps": 0}}),
        ("sampler.guidance_scale: ", {"sampler": {"guidance_scale": float("nan")}}),
        ("sampler.solver: ", {"sampler": {"solver": 9}}),
        ("sampler.guidance_end: ", {"sampler": {"guidance_start": 0.2, "guidance_end": 0.3}}),
        ("sampler.stable_distance: ", {"sampler": {"stable_distance": 1}}),
        ("sampler.stable_distance: ", {"sampler": {"stable_steps": 1, "stable_distance": 0}}),
        ("sampler.steering[0].scale: ", {"sampler": {"steering": [{"scale": 2000}]}}),
        ("sampling.temperature: ", {"sampling": {"temperature": float("inf")}}),
        ("sampling.top_p: ", {"sampling": {"top_p": 0}}),
        ("seed.sample_id: ", {"seed": {"sample_id": 10_000}}),
        ("seed.base_seed: ", {"seed": {"base_seed": 2**63}}),
        ("seed.base_seed: ", {"seed": {"base_seed": 2**63 - 1}, "max_new_tokens": 8}),
    ],
    "choose": [
        ("choices: got 1 texts", {"choices": ["a"]}),
        ("choices: got 65 texts", {"choices": [f"{n}" for n in range(65)]}),
        ("choices[1]: got an empty text", {"choices": ["a", ""]}),
        ("choices[2]: got the same text as choices[0]", {"choices": ["a", "b", "a"]}),
        ("choices[1]: ", {"choices": ["a", FAR]}),
        ("choices[1]: has ", {"max_new_tokens": 1}),
        ("stop: not together with choices", {"stop": ["."]}),
        ("top_logprobs: not together with choices", {"top_logprobs": 0}),
        ("ignore_end: not together with choices", {"ignore_end": True}),
        ("print_special: not together with choices", {"print_special": True}),
        ("sampling.temperature: expected 0", {"sampling": {"temperature": 0.5}}),
        ("sampling.repetition_penalty: expected 1", {"sampling": {"repetition_penalty": 2}}),
    ],
    "encode": [*TEXTS, ("texts: needs", {"texts": ["he looked at the river" * 5] * 100})],
    "reconstruct": TEXTS,
    "decode": [
        ("latents: ", {"latents": {}}),
        (f"latents.{OUT_OF_BOUNDS}", {"latents": WILD}),
        ("token_count: ", {"token_count": 3}),
        ("target_ids: ", {"target_ids": [1, 2, 3]}),
        ("target_ids: ", {"target_ids": [512]}),
        ("top_logprobs: ", {"top_logprobs": 21}),
        ("sampling.top_p: ", {"sampling": {"top_p": 2}}),
    ],
    "sample": [
        ("max_blocks: ", {"max_blocks": 0}),
        ("max_blocks: ", {"max_blocks": 65}),
        ("max_blocks: ", {"max_blocks": 2**32 - 1}),
        (f"prefix.{OUT_OF_BOUNDS}", {"prefix": WILD}),
        ("preview_every: got 1001, expected 0 to 1000", {"preview_every": 1001}),
    ],
    "interpolate": [
        ("points: ", {"points": 1}),
        ("points: ", {"points": 257}),
        ("interpolation: ", {"interpolation": 7}),
        ("start: ", {"start": {}}),
        ("end.text: ", {"end": {"text": ""}}),
        ("end.latents: ", {"end": {"latents": {}}}),
        (f"end.latents.{OUT_OF_BOUNDS}", {"end": {"latents": WILD}}),
    ],
    "infill": [
        ("segments: ", {}),
        ("segments: ", {"segments": [{"text": "a"}, {"text": "b"}]}),
        ("segments[1]: ", {"segments": [{"token_count": 1}, {}]}),
        ("segments[1].text: ", {"segments": [{"token_count": 1}, {"text": ""}]}),
        ("segments[1].token_count: ", {"segments": [{"text": "a"}, {"token_count": 0}]}),
        ("segments[1]: ", {"segments": [{"text": "a"}, {"token_count": 256}]}),
        ("segments[0]: ", {"segments": [{"token_count": 2**32 - 1}]}),
        ("segments[1]: ", {"segments": [{"token_count": 1}, {"text": FAR}]}),
    ],
    "logprobs": [
        ("text: ", {}),
        ("text: ", {"text": "a", "ids": {"ids": [5]}}),
        ("text: expected one of", {"text": "a", "latents": {}}),
        ("text: ", {"text": FAR}),
        ("ids: got no ids", {"ids": {}}),
        ("ids: token id", {"ids": {"ids": [10**6]}}),
        ("ids: ", {"ids": {"ids": [5] * 1000}}),
        ("top_logprobs: ", {"text": "a", "top_logprobs": 21}),
        ("logprob_ids: token id", {"text": "a", "logprob_ids": [10**6]}),
        ("logprob_ids: got 513 ids", {"text": "a", "logprob_ids": [5] * 513}),
        ("all_logprobs: got logprob_ids too", {"text": "a", "logprob_ids": [5], "all_logprobs": True}),
        ("logprobs_dtype: got 2", {"text": "a", "logprobs_dtype": 2}),
        ("all_logprobs: 512 ids at", {"text": "he looked at the river" * 8, "all_logprobs": True}),
    ],
    "fork": [
        ("branches: got 0 branches, expected 1 to 128", {"branches": []}),
        ("branches: got 129 branches, expected 1 to 128", {"branches": [{}] * 129}),
        ("max_new_tokens: got 0", {"max_new_tokens": 0, "branches": [{"max_new_tokens": 1}]}),
        ("branches[1].max_new_tokens: got 0", {"branches": [{}, {"max_new_tokens": 0}]}),
        ("branches[0].sampler.steps: got 0", {"branches": [{"sampler": {"steps": 0}}]}),
        ("branches[0].stop: got an empty string", {"branches": [{"stop": [""]}]}),
        ("branches[0].stop: got 99 strings", {"branches": [{"stop": ["a"] * 99}]}),
        ("branches[0].sampler.steering: got 17 probes", {"branches": [{"sampler": {"steering": [{}] * 17}}]}),
        ("branches[1].seed.sample_id: got 10000", {"seed": {"sample_id": 9999}, "branches": [{}, {}]}),
        ("branches[0].noise.shape: got [2, 4, 2], expected [3, 4, 2]", {"branches": [{"noise": NOISE}]}),
        ("branches[0].noise: not with sampler.resamples 2",
         {"max_new_tokens": 8, "branches": [{"noise": NOISE, "sampler": {"resamples": 2}}]}),
        ("branches[0].written: got 2 latents, expected whole blocks of 4", {"branches": [{"written": ROWS}]}),
        ("latents: needs 300 latent positions", {"latents": {"values": {"dtype": 1, "shape": [300, 2]}}}),
        ("ids: token id 512 at 0", {"ids": {"ids": [512]}}),
        ("text: a prompt of ", {"text": "a" * 256}),
    ],
    "embed": [
        ("texts: got 0 texts", {}),
        ("texts[1]: got an empty text", {"texts": ["a", ""]}),
        ("sequences: got both texts and sequences", {"texts": ["a"], "sequences": [{"ids": [5]}]}),
        ("sequences[1]: got no ids", {"sequences": [{"ids": [5]}, {}]}),
        ("sequences[0]: token id 1000000", {"sequences": [{"ids": [10**6]}]}),
        ("sequences: got 257 sequences, expected 1 to 256", {"sequences": [{"ids": [5]}] * 257}),
        ("sequences[0]: got 2000 ids", {"sequences": [{"ids": [5] * 2000}]}),
        ("pooling: got 9", {"texts": ["a"], "pooling": 9}),
    ],
    "score": [
        ("text: ", {"text": ""}),
        ("text: ", {"text": FAR}),
        ("samples: got 65", {"samples": 65}),
        ("probes: got 0", {"probes": 0}),
        ("steps: got 0", {"steps": 0}),
        ("solver: got 7", {"solver": 7}),
        ("seed.sample_id: got 10000", {"samples": 2, "seed": {"sample_id": 9_999}}),
        ("cache_salt: ", {"cache_salt": "a" * 257}),
    ],
}  # fmt: skip


async def asked(world: Any, call: str, fields: Fields) -> Any:
    """The first answer."""
    work, kind, right = RIGHT[call]
    answers = world.ask(work, kind(**right | fields))
    return await (anext(answers) if hasattr(answers, "__anext__") else answers)


@pytest.mark.parametrize(("call", "fault", "fields"), [(call, *row) for call, rows in WRONG.items() for row in rows])
async def test_what_is_wrong_is_named_and_no_stage_works(make_world, call: str, fault: str, fields: Fields):
    world = await make_world(max_message_bytes=SMALL)
    world.prior.dtype = "float32"  # which scores need
    await world.coordinator.connect()
    with pytest.raises(InvalidRequest) as refused:
        await asked(world, call, fields)
    assert str(refused.value).startswith(fault)
    assert [len(stage.calls) for stage in (world.encoder, world.prior, world.decoder)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "field", "fields"),
    [
        ("decode", "latents", {"latents": STRANGE}),
        ("sample", "prefix", {"prefix": STRANGE}),
        ("interpolate", "start.latents", {"start": {"latents": STRANGE}}),
        ("fork", "branches[1].written", {"branches": [{}, {"written": STRANGE}]}),
    ],
)
async def test_latents_of_another_space_are_refused_by_name(world, call: str, field: str, fields: Fields):
    with pytest.raises(ModelMismatch) as refused:
        await asked(world, call, fields)
    assert str(refused.value).startswith(f"{field}.space: ")
