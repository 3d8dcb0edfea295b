"""Texts to latents and back, and latents continued: the plain calls of LatentService."""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from colaserve.v1 import decoder_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from colaserve_services.bounds import COUNTS, PREVIEW_EVERY, TOP_LOGPROBS, check
from colaserve_services.coordinator import checks, rows
from colaserve_services.coordinator.admission import queue_for
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext, add_timing, side_by_side
from colaserve_services.coordinator.defaults import resolve_sampler, resolve_sampling, resolve_seed
from colaserve_services.coordinator.runs import DecoderRun, PriorRun, is_slow
from colaserve_services.coordinator.stages import Model
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import arrays

MOST_TEXTS: Final = 256
_TOKENIZED_AT_ONCE = 16  # texts: the tokenizer takes some hundred bytes a token meanwhile
_FLOAT_BYTES: Final = 4


async def encode_text(services: ServiceContext, request: pb.EncodeTextRequest, call: Call) -> pb.EncodeTextResponse:
    """LatentService.EncodeText."""
    services.admission.check(call)
    if request.with_variance and not services.model.has_variance:
        raise InvalidRequest("with_variance", "this checkpoint's encoder has no variance (use_variation is false)")
    ids = await tokenize_many(services, request.texts)
    positions = sum(services.model.positions(len(one)) for one in ids)
    size = check_size(services, "texts", positions * (2 if request.with_variance else 1))
    async with services.admission.slot(call, queue_for(size)):
        answer = await services.encode(ids, call, request.with_variance)
    response = pb.EncodeTextResponse(timing=answer.timing)
    for encoding, tokens in zip(answer.encodings, ids, strict=True):
        variance = encoding.log_variance if request.with_variance else None
        texts = services.tokenizer.token_texts(tokens)
        response.encodings.add(latents=encoding.latents, log_variance=variance, token_ids=tokens, tokens=texts)
    return response


async def decode_latents(
    services: ServiceContext, request: pb.DecodeLatentsRequest, call: Call
) -> pb.DecodeLatentsResponse:
    """LatentService.DecodeLatents."""
    latents = given_latents(services, request.latents, "latents", least=1)
    most = rows.count(latents) * services.model.patch_size
    if request.token_count > most:
        raise InvalidRequest("token_count", f"got {request.token_count}, expected 0 to {most} (n * P)")
    if len(request.target_ids) > most:
        raise InvalidRequest("target_ids", f"got {len(request.target_ids)} ids, expected at most {most} (n * P)")
    targets = services.tokenizer.checked(request.target_ids, "target_ids")
    check(TOP_LOGPROBS, "top_logprobs", request.top_logprobs)
    sampling = decode_sampling(services, request.sampling)
    async with services.admission.slot(call):
        decoded = await decode_all(services, latents, sampling, call, request.top_logprobs, targets)
    ids = list(decoded.token_ids)
    ids = ids[: request.token_count] if request.token_count else services.tokenizer.before_end(ids)
    response = pb.DecodeLatentsResponse(
        **services.tokenizer.shown(ids),
        logprobs=decoded.logprobs[: len(ids)] if request.HasField("top_logprobs") else (),
        top_logprobs=decoded.top_logprobs[: len(ids)],
        target_logprobs=decoded.target_logprobs,
        timing=decoded.timing,
    )
    _name_likely(services, response)
    return response


async def sample_latents(
    services: ServiceContext, request: pb.SampleLatentsRequest, call: Call
) -> AsyncGenerator[list[pb.SampleLatentsResponse], None]:
    """LatentService.SampleLatents."""
    call.use_salt(request.cache_salt)
    prefix = given_latents(services, request.prefix, "prefix", least=0)
    check(COUNTS["SampleLatentsRequest.max_blocks"], "max_blocks", request.max_blocks)
    size = services.model.block_size
    positions = (rows.count(prefix) // size + request.max_blocks) * size
    check_fits(services, "max_blocks", positions)
    check(PREVIEW_EVERY, "preview_every", request.preview_every)
    sampler = resolve_sampler(request.sampler, services.defaults, services.model.latent_dim)
    seed = resolve_seed(request, request.max_blocks)
    async with services.admission.slot(call, "prior", positions, slow=is_slow(sampler)) as ticket:
        run = PriorRun(
            services, ticket, prefix, request.max_blocks, sampler, seed,
            preview_every=request.preview_every, with_probes=request.with_probes,
        )  # fmt: skip
        async with aclosing(run.blocks()) as blocks:
            async for block in blocks:
                services.metrics.watch_probes(block.probes)
                found = {field.name: value for field, value in block.ListFields()}
                yield [pb.SampleLatentsResponse(**found, seed=seed)]


async def reconstruct(services: ServiceContext, request: pb.ReconstructRequest, call: Call) -> pb.ReconstructResponse:
    """LatentService.Reconstruct."""
    services.admission.check(call)
    ids = await tokenize_many(services, request.texts)
    greedy = types_pb2.Sampling(temperature=0, repetition_penalty=1)
    sampling = resolve_sampling(greedy, services.defaults, 0)
    async with services.admission.slot(call):
        answer = await services.encode(ids, call)
        works = [
            decode_all(services, encoding.latents, sampling, call, targets=one, patient=True)
            for encoding, one in zip(answer.encodings, ids, strict=True)
        ]
        decoded = await side_by_side(works)
    response = pb.ReconstructResponse(timing=answer.timing)
    for one, original in zip(decoded, ids, strict=True):
        response.reconstructions.append(_reconstruction(services, one, original))
        add_timing(response.timing, one.timing)
        await asyncio.sleep(0)  # 256 long texts take their time; other tasks run between them
    return response


async def logprobs(services: ServiceContext, request: pb.LogprobsRequest, call: Call) -> pb.LogprobsResponse:
    """LatentService.Logprobs."""
    services.admission.check(call)
    call.use_salt(request.cache_salt)
    if [bool(request.text), request.HasField("ids"), request.HasField("latents")].count(True) != 1:
        raise InvalidRequest("text", "expected one of a text that is not empty, ids and latents")
    check(TOP_LOGPROBS, "top_logprobs", request.top_logprobs)
    ids, latents = await _given_text(services, request), None
    if request.HasField("latents"):
        latents = given_latents(services, request.latents, "latents", least=1)
    count = rows.count(latents) * services.model.patch_size if latents else len(ids)
    (lookup, size), looked_up, timing = _lookup(services, request, count), list[bytes](), types_pb2.Timing()
    sampling = decode_sampling(services, types_pb2.Sampling(temperature=0))
    async with services.admission.slot(call, queue_for(size)):
        if latents is None:
            answer = await services.encode([ids], call)
            latents, timing = answer.encodings[0].latents, answer.timing
        top = request.top_logprobs
        decoded = await decode_all(
            services, latents, sampling, call, top, ids, patient=True, lookup=lookup, looked_up=looked_up
        )
    ids = ids or list(decoded.token_ids)
    response = pb.LogprobsResponse(
        **services.tokenizer.shown(ids),
        logprobs=decoded.target_logprobs or decoded.logprobs[: len(ids)],
        top_logprobs=decoded.top_logprobs[: len(ids)],
        text_offsets=services.tokenizer.offsets(ids),
        timing=add_timing(timing, decoded.timing),
    )
    if checks.looked_up(lookup, services.model):
        _put_first_rows(response.position_logprobs, decoded.position_logprobs, looked_up, len(ids))
    _name_likely(services, response)
    return response


async def _given_text(services: ServiceContext, request: pb.LogprobsRequest) -> Sequence[int]:
    """The ids of the text or the ids that are given; none where latents are."""
    if request.text:
        [ids] = await tokenize_whole(services, [request.text], ["text"])
        return ids
    return given_ids(services, request.ids, "ids") if request.HasField("ids") else []


def _lookup(services: ServiceContext, request: pb.LogprobsRequest, count: int) -> tuple[decoder_pb2.OpenDecode, int]:
    """What the decoder looks up at each of `count` token positions, and how many bytes that is."""
    model, ids = services.model, request.logprob_ids
    if request.all_logprobs and ids:
        raise InvalidRequest("all_logprobs", "got logprob_ids too, expected one of both")
    if len(ids) > model.vocab_size:
        raise InvalidRequest("logprob_ids", f"got {len(ids)} ids, expected at most {model.vocab_size} (the vocabulary)")
    element = arrays.logprobs_element(request.logprobs_dtype, "logprobs_dtype")
    found = decoder_pb2.OpenDecode(
        logprob_ids=services.tokenizer.checked(ids, "logprob_ids"),
        all_logprobs=request.all_logprobs,
        logprobs_dtype=request.logprobs_dtype,
    )
    field = "all_logprobs" if request.all_logprobs else "logprob_ids"
    return found, check_lookup(model, found, field, count, element.itemsize)


def check_lookup(model: Model, lookup: decoder_pb2.OpenDecode, field: str, count: int, element_bytes: int) -> int:
    """Bytes of the values of `count` token positions, or those of a block; InvalidRequest when they are larger than a
    message."""
    ids, positions = checks.looked_up(lookup, model), max(count, model.block_tokens)
    needed, most = positions * ids * element_bytes, model.max_message_bytes * 15 // 16  # the rest is for all else
    if needed > most:
        what = f"{ids} ids at {positions} positions are {needed} bytes in one message, at most {most} fit"
        raise InvalidRequest(field, f"{what}; ask for fewer, or in float16")
    return needed


def _put_first_rows(into: types_pb2.Tensor, last: types_pb2.Tensor, parts: list[bytes], count: int) -> None:
    """The first `count` rows of the blocks' values, whose last is `last`. They are many megabytes: the parts go."""
    into.dtype, into.shape[:] = last.dtype, [count, last.shape[1]]
    values = b"".join(parts)
    rows_in_all = len(parts) * last.shape[0]
    parts.clear()
    into.data = values[: len(values) // rows_in_all * count]


def _name_likely(services: ServiceContext, response: pb.DecodeLatentsResponse | pb.LogprobsResponse) -> None:
    """Add the texts of the likely ids beside each id."""
    for before, likely in zip([None, *response.token_ids], response.top_logprobs, strict=False):
        likely.tokens.extend(services.tokenizer.token_text(id_, before) for id_ in likely.token_ids)


def _reconstruction(
    services: ServiceContext, decoded: decoder_pb2.DecodeResponse, original: Sequence[int]
) -> pb.Reconstruction:
    ids = decoded.token_ids[: len(original)]
    agreeing = sum(ours == theirs for ours, theirs in zip(ids, original, strict=True))
    return pb.Reconstruction(
        **services.tokenizer.shown(ids),
        original_ids=original,
        token_accuracy=agreeing / len(original),
        bits_per_token=-sum(decoded.target_logprobs) / len(original) / math.log(2),
    )


async def decode_all(
    services: ServiceContext,
    latents: types_pb2.Latents,
    sampling: types_pb2.Sampling,
    call: Call,
    top_logprobs: int = 0,
    targets: Sequence[int] = (),
    patient: bool = False,
    lookup: decoder_pb2.OpenDecode | None = None,
    looked_up: list[bytes] | None = None,
    context: int = 0,
) -> decoder_pb2.DecodeResponse:
    """Decode latents (n, d), float32, behind the first `context` of them, which are whole blocks; the last block is
    filled with zeros. The answers of all blocks in one, whose ids are those of the latents; of position_logprobs it
    has the last block's, and `looked_up` gets the data of all."""
    model, positions = services.model, rows.count(latents)
    blocks = model.blocks(positions)
    filling = blocks * model.block_size - positions
    whole = rows.join([latents], model.latent_dim, model.space, filling)
    prefix, blocks = rows.take(whole, 0, context), blocks - context // model.block_size
    found = decoder_pb2.DecodeResponse()
    async with DecoderRun(
        services, call, prefix, blocks, sampling, top_logprobs, targets, patient, lookup=lookup
    ) as decoder:
        for start in range(context, rows.count(whole), model.block_size):
            answer = await decoder.decode(rows.take(whole, start, start + model.block_size))
            if looked_up is not None:
                looked_up.append(answer.position_logprobs.data)
            answer.position_logprobs.ClearField("data")  # a message keeps the memory of all that it ever had
            add_timing(answer.timing, found.timing)
            found.ClearField("position_logprobs")
            found.MergeFrom(answer)
    del found.token_ids[(positions - context) * model.patch_size :]
    return found


def decode_sampling(services: ServiceContext, sampling: types_pb2.Sampling) -> types_pb2.Sampling:
    """Sampling of latents that were not generated by this run: no repetition penalty and seed 0 unless asked for."""
    return resolve_sampling(sampling, services.defaults, 0, repetition_penalty=1.0)


async def tokenize_many(services: ServiceContext, texts: Sequence[str]) -> list[Sequence[int]]:
    """Ids of a request's `texts`, 1 to 256 of them, as `tokenize_whole`. A message holds them, four bytes each."""
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise InvalidRequest("texts", f"got {len(texts)} texts, expected 1 to {MOST_TEXTS}")
    fields, found = [f"texts[{index}]" for index in range(len(texts))], list[Sequence[int]]()
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        some = slice(start, start + _TOKENIZED_AT_ONCE)
        found += [types_pb2.TokenIds(ids=ids).ids for ids in await tokenize_whole(services, texts[some], fields[some])]
        await asyncio.sleep(0)
    return found


async def tokenize_whole(services: ServiceContext, texts: Sequence[str], fields: Sequence[str]) -> list[Sequence[int]]:
    """Ids of texts of these fields, none empty, each within the context."""
    for text, field_ in zip(texts, fields, strict=True):
        if not text:
            raise InvalidRequest(field_, "got an empty text, expected one character or more")
    found = await services.tokenize_all(texts, fields)
    for ids, field_ in zip(found, fields, strict=True):
        if not ids:
            raise InvalidRequest(field_, "got a text without tokens")
        check_fits(services, field_, services.model.positions(len(ids)))
    return found


def given_ids(services: ServiceContext, sequence: types_pb2.TokenIds, field: str) -> Sequence[int]:
    """A caller's ids of a text, checked: one or more, within the context and the vocabulary."""
    if not sequence.ids:
        raise InvalidRequest(field, "got no ids, expected one or more")
    return services.checked(sequence.ids, field)


def given_latents(services: ServiceContext, latents: types_pb2.Latents, field: str, least: int) -> types_pb2.Latents:
    """A caller's latents, checked, as float32 of this space."""
    model = services.model
    if len(latents.values.shape) == 2:  # before anything is made of what cannot fit
        check_fits(services, field, latents.values.shape[0])
    values = arrays.latents_from_message(latents, field, model.latent_dim, model.space)
    if len(values) < least:
        raise InvalidRequest(field, f"got {len(values)} latents, expected {least} or more")
    return arrays.latents_to_message(values, model.space)


def check_fits(services: ServiceContext, field: str, positions: int) -> None:
    """InvalidRequest when a session would be longer than the context."""
    most = services.model.max_context
    if services.model.blocks(positions) * services.model.block_size > most:
        raise InvalidRequest(field, f"needs {positions} latent positions, at most {most} fit (max_context)")


def check_size(services: ServiceContext, field: str, positions: int) -> int:
    """Bytes of so many latents; InvalidRequest when an answer with them would be larger than a message may be."""
    needed, most = positions * services.model.latent_dim * _FLOAT_BYTES, services.model.max_message_bytes
    if needed > most:
        raise InvalidRequest(field, f"needs {needed} bytes of latents in one answer, at most {most} fit; ask for fewer")
    return needed
