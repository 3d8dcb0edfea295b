"""A completion with `suffix`: the prompt, a hole of max_tokens and the suffix, told as a generation of one message."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve.v1.latent_service_pb2 import InfillRequest, InfillResponse, InfillSegment
from colaserve_services.gateway.backend import Backend, Info
from colaserve_services.gateway.errors import invalid
from colaserve_services.gateway.schemas import CompletionRequest
from colaserve_services.gateway.translate import set_sampler, set_sampling

_BESIDE: Final[Mapping[str, tuple[Any, ...]]] = {  # fields that an infill cannot honour -> values that ask for nothing
    "n": (None, 1),
    "logprobs": (None,),
    "echo": (None, False),
    "stop": (None, []),
    "ignore_eos": (None, False),
    "skip_special_tokens": (None, True),
}


def infill_request(body: CompletionRequest, info: Info) -> InfillRequest:
    """The request that a completion with a suffix stands for; a 400 names what cannot be honoured beside it."""
    for name, neutral in _BESIDE.items():
        if getattr(body, name) not in neutral:
            raise invalid(name, "not together with suffix", "unsupported_parameter")
    request = InfillRequest(segments=[InfillSegment(**segment) for segment in _segments(body, info).values()])
    if body.seed is not None:
        request.seed.CopyFrom(types_pb2.NoiseSeed(base_seed=body.seed))
    set_sampler(request.sampler, body)
    set_sampling(request.sampling, body)
    return request


def infill_names(body: CompletionRequest, info: Info) -> Mapping[str, str]:
    """What the client calls the fields of the request, so that an error names what it sent."""
    names = enumerate(_segments(body, info))
    return {f"segments[{place}]{end}": name for place, name in names for end in ("", ".text", ".token_count")}


def _segments(body: CompletionRequest, info: Info) -> dict[str, dict[str, Any]]:
    """By the field that each comes of."""
    prompt = body.prompt[0] if isinstance(body.prompt, list) and len(body.prompt) == 1 else body.prompt
    if not isinstance(prompt, str):
        raise invalid("prompt", "expected one text beside suffix", "unsupported_parameter")
    hole = body.max_tokens or info.default_max_new_tokens
    kept = {"prompt": {"text": prompt}} if prompt else {}
    return {**kept, "max_tokens": {"token_count": hole}, "suffix": {"text": body.suffix}}


async def start_infill(backend: Backend, request: InfillRequest, deadline: float) -> InfillCall:
    """Start the call."""
    return InfillCall(request, await backend.infill(request, deadline))


class InfillCall:
    """A running Infill, read as a Generate call is: its one message is the hole's text."""

    def __init__(self, request: InfillRequest, call: Any):
        self._hole = len(request.segments) - 2
        self._call = call

    async def __aiter__(self) -> AsyncIterator[GenerateResponse]:
        response: InfillResponse = await self._call
        [reason] = response.finish_reasons or [types_pb2.FINISH_REASON_LENGTH]  # an earlier version tells none
        yield GenerateResponse(
            text=response.segments[self._hole], finish_reason=reason, usage=response.usage, seed=response.seed
        )

    def cancel(self) -> bool | None:
        """End the call."""
        cancelled: bool | None = self._call.cancel()
        return cancelled
