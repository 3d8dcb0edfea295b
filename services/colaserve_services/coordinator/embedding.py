"""Vectors that stand for texts: means of their latents."""

from __future__ import annotations

import asyncio

import numpy as np

from colaserve.v1 import latent_service_pb2 as pb
from colaserve_client.arrays import unit
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext
from colaserve_services.coordinator.latent_space import MOST_TEXTS, check_size, given_ids, tokenize_many
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import arrays
from colaserve_services.rpc.arrays import FloatArray


async def embed(services: ServiceContext, request: pb.EmbedRequest, call: Call) -> pb.EmbedResponse:
    """LatentService.Embed."""
    services.admission.check(call)
    if request.pooling not in pb.Pooling.values():
        raise InvalidRequest("pooling", f"got {request.pooling}, expected mean (1), last_block (2) or per_block (3)")
    if request.texts and request.sequences:
        raise InvalidRequest("sequences", "got both texts and sequences, expected one of them")
    ids = _checked(services, request) if request.sequences else await tokenize_many(services, request.texts)
    blocks = sum(services.model.blocks(services.model.positions(len(one))) for one in ids)
    check_size(services, "texts", blocks if request.pooling == pb.POOLING_PER_BLOCK else len(ids))
    async with services.admission.slot(call):
        answer = await services.encode(ids, call)
    response = pb.EmbedResponse(timing=answer.timing)
    for encoding, tokens in zip(answer.encodings, ids, strict=True):
        latents = arrays.from_message(encoding.latents.values, "latents", (None, services.model.latent_dim))
        values = pooled(latents, request.pooling, services.model.block_size)
        values = unit(values) if request.normalize else values
        response.embeddings.add(values=arrays.to_message(values), token_count=len(tokens), space=services.model.space)
        await asyncio.sleep(0)  # 256 long texts take their time; other tasks run between them
    return response


def pooled(latents: FloatArray, pooling: int, block_size: int) -> FloatArray:
    """The vector (d) of latents (n, d), or those of their blocks."""
    if pooling in (pb.POOLING_UNSPECIFIED, pb.POOLING_MEAN):
        return latents.mean(axis=0)
    blocks = [latents[start : start + block_size].mean(axis=0) for start in range(0, len(latents), block_size)]
    return np.stack(blocks) if pooling == pb.POOLING_PER_BLOCK else blocks[-1]


def _checked(services: ServiceContext, request: pb.EmbedRequest) -> list[list[int]]:
    if len(request.sequences) > MOST_TEXTS:
        raise InvalidRequest("sequences", f"got {len(request.sequences)} sequences, expected 1 to {MOST_TEXTS}")
    return [given_ids(services, each, f"sequences[{index}]") for index, each in enumerate(request.sequences)]
