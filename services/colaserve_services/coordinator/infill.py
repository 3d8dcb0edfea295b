"""A text with holes: the prior writes the holes, what is kept stays as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve_services.coordinator import rows
from colaserve_services.coordinator.admission import Ticket
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext, add_timing
from colaserve_services.coordinator.defaults import resolve_sampler, resolve_sampling, resolve_seed, sampling_seed
from colaserve_services.coordinator.latent_space import check_fits
from colaserve_services.coordinator.read_ahead import ReadAhead
from colaserve_services.coordinator.runs import DecoderRun, PriorRun, Span, context_blocks, is_slow
from colaserve_services.errors import InvalidRequest
from colaserve_services.text import join


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of the whole; `kept` is the text that stays, None for a hole."""

    kept: str | None
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The ids of the whole, pad in the holes, and which latents are to be written."""

    segments: Sequence[Segment]
    ids: list[int]
    open_spans: Sequence[Span]  # latent positions
    context: int  # leading blocks that are known
    end: int  # blocks up to and with the last one that has a hole; none after it needs to run


async def infill(services: ServiceContext, request: pb.InfillRequest, call: Call) -> pb.InfillResponse:
    """LatentService.Infill."""
    services.admission.check(call, "prior")
    call.use_salt(request.cache_salt)
    layout = await lay_out(services, request.segments)
    sampler = resolve_sampler(request.sampler, services.defaults, services.model.latent_dim)
    blocks = layout.end - layout.context
    seed = resolve_seed(request, blocks)
    sampling = resolve_sampling(request.sampling, services.defaults, sampling_seed(seed))
    timing = types_pb2.Timing()
    size, slow = layout.end * services.model.block_size, is_slow(sampler)
    async with services.admission.slot(call, "prior", size, slow=slow) as ticket:
        answer = await services.encode([layout.ids], call)
        add_timing(timing, answer.timing)
        written, saved = await _write(
            services, layout, answer.encodings[0].latents, sampler, sampling, seed, ticket, timing
        )
    return _response(services, layout, written, saved, seed, timing)


async def lay_out(services: ServiceContext, segments: Sequence[pb.InfillSegment]) -> Layout:
    """Tokenize what is kept and find what is open. Raises InvalidRequest naming the segment."""
    ids: list[int] = []
    parts = []
    for index, segment in enumerate(segments):
        start = len(ids)
        kept = await _extend(services, ids, segment, f"segments[{index}]")
        parts.append(Segment(kept, start, len(ids)))
    if all(part.kept is not None for part in parts):
        raise InvalidRequest("segments", f"got {len(parts)} segments without a hole, expected one hole or more")
    spans = open_spans(parts, services.model.patch_size)
    positions, size = services.model.positions(len(ids)), services.model.block_size
    return Layout(parts, ids, spans, context_blocks(positions, spans, size), -(-spans[-1][1] // size))


def open_spans(segments: Sequence[Segment], patch_size: int) -> list[Span]:
    """Latent positions that cover a token of a hole, as ascending, disjoint spans."""
    spans: list[Span] = []
    for segment in segments:
        if segment.kept is not None:
            continue
        start, end = segment.start // patch_size, -(-segment.end // patch_size)
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start, end))
    return spans


async def _extend(services: ServiceContext, ids: list[int], segment: pb.InfillSegment, field: str) -> str | None:
    """Append a segment's ids; return its text, None for a hole."""
    kind = segment.WhichOneof("segment")
    if kind == "text" and segment.text:
        ids += await services.tokenize(segment.text, f"{field}.text")
        check_fits(services, field, services.model.positions(len(ids)))
        return segment.text
    if kind == "token_count" and segment.token_count:
        check_fits(services, field, services.model.positions(len(ids) + segment.token_count))
        ids += [services.tokenizer.special.pad] * segment.token_count
        return None
    expected = "expected a text that is not empty, or a token_count of 1 or more"
    raise InvalidRequest(field if kind is None else f"{field}.{kind}", f"got nothing to keep or write, {expected}")


async def _write(
    services: ServiceContext,
    layout: Layout,
    latents: types_pb2.Latents,
    sampler: types_pb2.Sampler,
    sampling: types_pb2.Sampling,
    seed: types_pb2.NoiseSeed,
    ticket: Ticket,
    timing: types_pb2.Timing,
) -> tuple[list[int], int]:
    """The sampled ids of the blocks from the context on, and how many steps of these were left out."""
    size, blocks = services.model.block_size, layout.end - layout.context
    canvas = rows.take(latents, 0, layout.end * size)
    prefix = rows.take(latents, 0, layout.context * size)
    decoder = DecoderRun(services, ticket.call, prefix, blocks, sampling)
    run = PriorRun(services, ticket, canvas, blocks, sampler, seed, layout.open_spans, decoder.prior_waits)
    ids: list[int] = []
    async with ReadAhead(run.blocks()) as prior, decoder:
        for _ in range(blocks):
            block = await prior.next()
            decoded = await decoder.decode(block.latents)
            ids += decoded.token_ids
            add_timing(timing, block.timing, decoded.timing)
    return ids, run.steps_saved


def _response(
    services: ServiceContext,
    layout: Layout,
    written: list[int],
    steps_saved: int,
    seed: types_pb2.NoiseSeed,
    timing: types_pb2.Timing,
) -> pb.InfillResponse:
    ids, texts, reasons = list(layout.ids), [], []
    offset = layout.context * services.model.block_tokens  # token position of written[0]
    for segment in layout.segments:
        if segment.kept is not None:
            texts.append(segment.kept)
            continue
        hole = written[segment.start - offset : segment.end - offset]
        ids[segment.start : segment.end] = hole
        kept = services.tokenizer.before_end(hole)
        texts.append(join(services.tokenizer.detokenizer(ids[: segment.start]), kept))
        reasons.append(types_pb2.FINISH_REASON_LENGTH if kept == hole else types_pb2.FINISH_REASON_STOP)
    filled = sum(each.end - each.start for each in layout.segments if each.kept is None)
    usage = types_pb2.Usage(
        prompt_tokens=len(ids) - filled,
        completion_tokens=filled,
        blocks=layout.end - layout.context,
        steps_saved=steps_saved,
    )
    return pb.InfillResponse(
        text="".join(texts),
        segments=texts,
        token_ids=ids,
        tokens=services.tokenizer.token_texts(ids),
        usage=usage,
        seed=seed,
        timing=timing,
        finish_reasons=reasons,
    )
