"""Vectors that stand for texts: means of their latents."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np

from colaserve.v1 import latent_service_pb2 as pb
from colaserve_client.arrays import unit
from colaserve_services.coordinator.admission import queue_for
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext, add_timing
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
    size = check_size(services, "texts", blocks if request.pooling == pb.POOLING_PER_BLOCK else len(ids))
    response, tokens = pb.EmbedResponse(), iter(ids)
    async with services.admission.slot(call, queue_for(size)), aclosing(services.encoded(ids, call)) as parts:
        async for part in parts:  # 256 long texts have some 100 MB of latents
            add_timing(response.timing, part.timing)
            for encoding in part.encodings:
                latents = arrays.from_message(encoding.latents.values, "latents", (None, services.model.latent_dim))
                vectors = pooled(latents, request.pooling, services.model.block_size)
                values = arrays.to_message(unit(vectors) if request.normalize else vectors)
                response.embeddings.add(values=values, token_count=len(next(tokens)), space=services.model.space)
                await asyncio.sleep(0)  # and take their time; other tasks run between them
    return response


def pooled(latents: FloatArray, pooling: int, block_size: int) -> FloatArray:
    """The vector (d) of latents (n, d), or those of their blocks."""
    if pooling in (pb.POOLING_UNSPECIFIED, pb.POOLING_MEAN):
        return latents.mean(axis=0)
    blocks = [latents[start : start + block_size].mean(axis=0) for start in range(0, len(latents), block_size)]
    return np.stack(blocks) if pooling == pb.POOLING_PER_BLOCK else blocks[-1]


def _checked(services: ServiceContext, request: pb.EmbedRequest) -> list[Sequence[int]]:
    if len(request.sequences) > MOST_TEXTS:
        raise InvalidRequest("sequences", f"got {len(request.sequences)} sequences, expected 1 to {MOST_TEXTS}")
    return [given_ids(services, one, f"sequences[{index}]") for index, one in enumerate(request.sequences)]
