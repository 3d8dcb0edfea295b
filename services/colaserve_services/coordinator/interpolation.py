"""A walk through the latent space between two texts or latents, each point decoded."""

import asyncio

import numpy as np

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve_client.arrays import lerp, slerp
from colaserve_services.bounds import COUNTS, LATENT, check
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext, add_timing, side_by_side
from colaserve_services.coordinator.latent_space import (
    check_size,
    decode_all,
    decode_sampling,
    given_latents,
    tokenize_whole,
)
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import arrays
from colaserve_services.rpc.arrays import FloatArray

_LERP, _SLERP = pb.INTERPOLATION_LERP, pb.INTERPOLATION_SLERP


async def interpolate(services: ServiceContext, request: pb.InterpolateRequest, call: Call) -> pb.InterpolateResponse:
    """LatentService.Interpolate."""
    services.admission.check(call)
    check(COUNTS["InterpolateRequest.points"], "points", request.points)
    if request.interpolation not in (pb.INTERPOLATION_UNSPECIFIED, _LERP, _SLERP):
        raise InvalidRequest("interpolation", f"got {request.interpolation}, expected lerp (1) or slerp (2)")
    between = lerp if request.interpolation == _LERP else slerp
    sampling = decode_sampling(services, request.sampling)
    response = pb.InterpolateResponse()
    weights = np.linspace(0, 1, request.points, dtype=np.float32)
    async with services.admission.slot(call):
        start, end = await _ends(services, request, call, response.timing)
        check_size(services, "points", request.points * len(start))
        messages = []
        for weight in weights:
            latents = between(start, end, float(weight))
            check(LATENT, "interpolation", float(np.abs(latents).max()))  # an arc may lead beyond its ends
            messages.append(arrays.latents_to_message(latents, services.model.space))
            await asyncio.sleep(0)  # 256 long points take their time; other tasks run between them
        decoded = await side_by_side(
            [decode_all(services, message, sampling, call, patient=True) for message in messages]
        )
    for weight, message, one in zip(weights, messages, decoded, strict=True):
        ids = services.tokenizer.before_end(list(one.token_ids))
        response.points.add(weight=weight, latents=message, **services.tokenizer.shown(ids))
        add_timing(response.timing, one.timing)
        await asyncio.sleep(0)
    return response


async def _ends(
    services: ServiceContext, request: pb.InterpolateRequest, call: Call, timing: types_pb2.Timing
) -> tuple[FloatArray, FloatArray]:
    points = {"start": request.start, "end": request.end}
    texts = {name: point.text for name, point in points.items() if _kind(point, name) == "text"}
    ids = await tokenize_whole(services, list(texts.values()), [f"{name}.text" for name in texts])
    longest = max(map(len, ids), default=0)
    padded = [[*one, *[services.tokenizer.special.pad] * (longest - len(one))] for one in ids]
    ends: dict[str, types_pb2.Latents] = {
        name: given_latents(services, point.latents, f"{name}.latents", least=1)
        for name, point in points.items()
        if name not in texts
    }
    if texts:
        answer = await services.encode(padded, call)
        add_timing(timing, answer.timing)
        ends |= {name: encoding.latents for name, encoding in zip(texts, answer.encodings, strict=True)}
    start, end = (arrays.from_message(ends[name].values, name, (None, services.model.latent_dim)) for name in points)
    if len(start) != len(end):
        raise InvalidRequest("end", f"got {len(end)} latents, expected as many as start has ({len(start)})")
    return start, end


def _kind(point: pb.Endpoint, name: str) -> str:
    kind = point.WhichOneof("point")
    if kind is None:
        raise InvalidRequest(name, "got neither text nor latents, expected one of them")
    return str(kind)
