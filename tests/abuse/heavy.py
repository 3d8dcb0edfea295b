"""Attacks that ask for much computation, most of them valid requests."""

from __future__ import annotations

import asyncio
import base64
import json
import math

from colaserve.v1 import generation_pb2, prior_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from tests.abuse.target import Target, attack

LATENT = 16  # channels of the bundled checkpoint


def _tensor(*shape: int) -> types_pb2.Tensor:
    return types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=shape, data=b"\0\0\0\x3f" * math.prod(shape))


def _generation(tokens: int, **more: object) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt="Once", max_new_tokens=tokens, ignore_end=True, **more)


@attack("40 PriorService.Score of 256 probes, 1,000 steps", sessions=40)
async def _(target: Target) -> None:
    canvas = types_pb2.Canvas(latents={"values": _tensor(400, LATENT)}, open=[types_pb2.Span(start=0, end=400)])
    await target.calls(
        "PriorService/Score", [prior_pb2.PriorServiceScoreRequest(canvas=canvas, probes=256, steps=1000)] * 40
    )


@attack("40 LatentService.Score of 64 draws, 256 probes, 1,000 steps", sessions=40)
async def _(target: Target) -> None:
    request = pb.LatentServiceScoreRequest(text="word " * 400, samples=64, probes=256, steps=1000)
    await target.calls("LatentService/Score", [request] * 40)


SLOW = types_pb2.Sampler(steps=1000, resamples=100, solver=types_pb2.SOLVER_HEUN)


@attack("40 PriorService.Sample of 1,000 steps, 100 resamples", sessions=40)
async def _(target: Target) -> None:
    request = prior_pb2.SampleRequest(max_blocks=2000, sampler=SLOW, seed={"base_seed": 1})
    await target.calls("PriorService/Sample", [request] * 40)


@attack("40 Generate of 1,000 steps, 100 resamples", sessions=40)
async def _(target: Target) -> None:
    await target.calls("GenerationService/Generate", [_generation(64, sampler=SLOW)] * 40)


@attack("40 Generate with 16 probes of 64 columns", sessions=40)
async def _(target: Target) -> None:
    probe = types_pb2.Steering(direction=_tensor(LATENT, 64), scale=1, logistic=True)
    await target.calls("GenerationService/Generate", [_generation(64, sampler={"steering": [probe] * 16})] * 40)


@attack("steering: a million probes, and a matrix of 3 MiB")
async def _(target: Target) -> None:
    wide = types_pb2.Steering(direction=_tensor(LATENT, 50_000), scale=1)
    requests = [_generation(8, sampler={"steering": probes}) for probes in ([types_pb2.Steering()] * 1_000_000, [wide])]
    forks = [pb.ForkRequest(branches=[pb.ForkBranch(sampler=each.sampler)]) for each in requests]
    await target.calls("GenerationService/Generate", requests)
    await target.calls("LatentService/Fork", forks)


@attack("3 Forks of 128 branches that nobody reads", sessions=48, short=True)
async def _(target: Target) -> None:
    request = pb.ForkRequest(text="Once", branches=[pb.ForkBranch()] * 128, max_new_tokens=600, ignore_end=True)
    await target.calls("LatentService/Fork", [request] * 3, read=False)


@attack("4 Logprobs of all ids at 5,000 positions", sessions=4)
async def _(target: Target) -> None:
    ids = types_pb2.TokenIds(ids=[300 + number % 50 for number in range(5000)])
    await target.calls("LatentService/Logprobs", [pb.LogprobsRequest(ids=ids, all_logprobs=True)] * 4)


@attack("44 streams with previews of every step that nobody reads", sessions=44)
async def _(target: Target) -> None:
    await target.calls("GenerationService/Generate", [_generation(6000, preview_every=1)] * 44, read=False)


@attack("4 Embeds of 256 texts of 7,000 tokens", sessions=4)
async def _(target: Target) -> None:
    ids = types_pb2.TokenIds(ids=[300 + number % 50 for number in range(7000)])
    await target.calls("LatentService/Embed", [pb.EmbedRequest(sequences=[ids] * 256)] * 4)


@attack("4 MiB of base64 to /v1/latents/decode and /embed, 8 at once", sessions=8)
async def _(target: Target) -> None:
    values = base64.b64encode(b"\0\0\0\x3f" * 740_000).decode()
    decode = {"latents": {"shape": [740_000 // LATENT, LATENT], "data": values}}
    texts = {"texts": ["word " * 3000] * 256}
    bodies = [("/v1/latents/decode", json.dumps(decode).encode()), ("/v1/latents/embed", json.dumps(texts).encode())]
    await asyncio.gather(*(target.post(path, body) for path, body in bodies * 4))
