"""What fakes of the coordinator write: a token is a byte, its latent is (byte, 0), and the text is fixed."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from colaserve.v1 import latent_service_pb2, types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest, GenerateResponse, Preview

SPACE = "0123456789abcdef"
BLOCK = 4  # tokens
PROBES = types_pb2.Probes(norm=1.5, entropy=0.1, end_probability=0)
TIMING = types_pb2.Timing(queue_us=1, compute_us=2)
STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH


def latents_of(ids: Iterable[int]) -> types_pb2.Latents:
    values = np.array([[token, 0.0] for token in ids], np.float32).reshape(-1, 2)
    tensor = types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
    return types_pb2.Latents(values=tensor, space=SPACE)


def text_of(ids: Iterable[int]) -> str:
    """Ids that are no bytes are not printed."""
    return bytes(one for one in ids if one < 256).decode(errors="replace")


def texts_of(ids: Iterable[int]) -> list[str]:
    return [text_of([one]) for one in ids]


def spelt(ids: Iterable[int]) -> dict[str, Any]:
    """Fields of most answers."""
    return {"text": text_of(ids), "token_ids": ids, "tokens": texts_of(ids)}


def offsets_of(ids: Iterable[int]) -> list[int]:
    """Where each byte's character begins, in characters."""
    decoder, offsets, characters = _utf8(), [], 0
    for one in ids:
        offsets.append(characters)
        characters += len(decoder.decode(bytes([one])))
    return offsets


def _utf8() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("ignore")


def tops(ids: Iterable[int], count: int, logprob: float = -0.25) -> list[types_pb2.TopLogprobs]:
    """Of each token itself and those after it."""
    found = []
    for token in ids if count else ():
        likely, logprobs = [(token + i) % 256 for i in range(count)], [logprob - (i + 1) / 4 for i in range(count)]
        found.append(types_pb2.TopLogprobs(token_ids=likely, logprobs=logprobs, tokens=texts_of(likely)))
    return found


def seed_of(request: Any) -> types_pb2.NoiseSeed:
    return request.seed if request.HasField("seed") else types_pb2.NoiseSeed(base_seed=1234)


def prompt_tokens(request: GenerateRequest) -> int:
    return len(request.prompt_ids.ids) or len(request.prompt.encode())


def blocks_of(request: GenerateRequest, says: str, logprob: float) -> Iterator[GenerateResponse]:
    """A generation, with all that is asked for. A block has four steps; what is not certain yet is a question mark."""
    end, stop = min(((says.index(stop), stop) for stop in request.stop if stop in says), default=(len(says), ""))
    ids, reason, budget = list(says[:end].encode()), STOP, request.max_new_tokens or 32
    if len(ids) > budget:
        ids, reason, stop = ids[:budget], LENGTH, ""
    decoder, offsets, starts = _utf8(), offsets_of(ids), range(0, max(len(ids), 1), BLOCK)
    for number, start in enumerate(starts):
        block = ids[start : start + BLOCK]
        common = {"probes": PROBES if request.with_probes else None}
        for step in range(request.preview_every or BLOCK, BLOCK, request.preview_every or BLOCK):
            seen = [*block[:step], *b"?" * len(block[step:])]
            latents = latents_of(seen) if request.with_latents else None
            preview = Preview(block_index=number, step=step, text=text_of(seen), latents=latents)
            yield GenerateResponse(preview=preview, **common)
        response = GenerateResponse(
            **spelt(block) | {"text": decoder.decode(bytes(block))},
            text_offsets=offsets[start : start + BLOCK],
            logprobs=[logprob] * len(block) if request.HasField("top_logprobs") else [],
            top_logprobs=tops(block, request.top_logprobs, logprob),
            latents=latents_of(block) if request.with_latents else None,
            timing=TIMING,
            **common,
        )
        if start == starts[-1]:
            usage = types_pb2.Usage(
                prompt_tokens=prompt_tokens(request), completion_tokens=len(ids), blocks=len(starts)
            )
            last = GenerateResponse(finish_reason=reason, stop_string=stop, usage=usage, seed=seed_of(request))
            response.MergeFrom(last)
        yield response


def branch_of(request: latent_service_pb2.ForkRequest, number: int) -> GenerateRequest:
    """What a branch amounts to, as far as the fakes look at it."""
    names = {"text": "prompt", "ids": "prompt_ids"}
    shared = [(field.name, value) for field, value in request.ListFields() if field.name not in ("branches", "latents")]
    alone = GenerateRequest(with_latents=True, **{names.get(name, name): value for name, value in shared})
    alone.max_new_tokens = request.branches[number].max_new_tokens or request.max_new_tokens or 32
    if request.HasField("seed"):
        alone.seed.sample_id += number
    return alone


def block_of_branch(branch: int, index: int, block: GenerateResponse) -> latent_service_pb2.ForkResponse:
    fields = {field.name: value for field, value in block.ListFields()}
    return latent_service_pb2.ForkResponse(branch=branch, block_index=index, **fields)


def filled(request: latent_service_pb2.InfillRequest) -> latent_service_pb2.InfillResponse:
    """Every hole is full of underscores."""
    segments = [segment.text or "_" * segment.token_count for segment in request.segments]
    ids, written = "".join(segments).encode(), sum(segment.token_count for segment in request.segments)
    return latent_service_pb2.InfillResponse(
        **spelt(ids),
        segments=segments,
        finish_reasons=[LENGTH for segment in request.segments if segment.token_count],
        usage=types_pb2.Usage(prompt_tokens=len(ids) - written, completion_tokens=written),
        seed=seed_of(request),
        timing=TIMING,
    )


def scored(ids: Iterable[int], request: latent_service_pb2.LogprobsRequest) -> latent_service_pb2.LogprobsResponse:
    values = np.full((len(list(ids)), len(request.logprob_ids)), -0.5, "<f4")
    tensor = types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
    return latent_service_pb2.LogprobsResponse(
        **spelt(ids),
        logprobs=[-0.25] * len(values),
        top_logprobs=tops(ids, request.top_logprobs),
        text_offsets=offsets_of(ids),
        position_logprobs=tensor,
        timing=TIMING,
    )
