"""The heartbeat: text -> ids -> latents, then block by block: noise -> latents -> ids -> text."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from operator import attrgetter
from types import TracebackType
from typing import Any

from colaserve.v1 import decoder_pb2, generation_pb2, prior_pb2, types_pb2
from colaserve_client.arrays import shortest
from colaserve_services.bounds import FINISH_REASONS
from colaserve_services.coordinator import rows
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext, add_timing
from colaserve_services.coordinator.plan import Plan, plan_generation
from colaserve_services.coordinator.read_ahead import ReadAhead
from colaserve_services.coordinator.runs import DecoderRun, PriorRun, is_slow
from colaserve_services.coordinator.writer import Piece, Writer
from colaserve_services.rpc import requests, tracing
from colaserve_services.rpc.errors import grpc_code
from colaserve_services.text import Tokenizer

Response = generation_pb2.GenerateResponse
Looks = list[prior_pb2.SampleResponse]
_TOGETHER = 0.05  # seconds in which previews come that are decoded together
_MOST_TOGETHER = 8


def are_previews(responses: Sequence[Any]) -> bool:
    """Which a slow reader may miss."""
    return bool(responses[0].HasField("preview"))


async def generate(
    services: ServiceContext, request: generation_pb2.GenerateRequest, call: Call
) -> AsyncGenerator[list[Response], None]:
    """Continue a prompt, a response a block, and previews between them: those that come together."""
    services.admission.check(call, "prior")
    call.use_salt(request.cache_salt)
    async with aclosing(write(services, await plan_generation(services, request), call)) as responses:
        async for response in responses:
            yield response


async def write(services: ServiceContext, plan: Plan, call: Call) -> AsyncGenerator[list[Response], None]:
    """Write what is planned, a response a block, or previews that come together. All that the stages hold for it is
    freed before the last response, and when the iteration is left early."""
    watch = _Watch(services, call, plan)
    size, slow = plan.positions(services.model), is_slow(plan.sampler)
    async with watch, services.admission.slot(call, "prior", size, slow=slow) as ticket:
        prompt = plan.latents or await _encode(services, plan, call, watch)
        prefix = rows.take(prompt, 0, plan.context)
        writer = plan.writer(services.tokenizer)
        asked = plan.request
        decoder = DecoderRun(
            services, call, prefix, plan.blocks, plan.sampling, asked.top_logprobs,
            with_probes=asked.with_probes, lookup=plan.choices.lookup,
        )  # fmt: skip
        run = PriorRun(
            services, ticket, prompt, plan.blocks, plan.sampler, plan.noise or plan.seed,
            on_wait=decoder.prior_waits, written=plan.written,
            preview_every=asked.preview_every, with_probes=asked.with_probes,
        )  # fmt: skip
        prior = ReadAhead(_with_written(run.blocks(), plan.written), passing=attrgetter("provisional"))
        try:
            async with prior, decoder, aclosing(_together(prior)) as found:
                async for looks, block in found:
                    if looks and (shown := await decoder.previews([look.latents for look in looks])):
                        yield [_preview(plan, *pair, writer) for pair in zip(looks, shown, strict=True)]
                    if block is None:
                        continue
                    decoded = await decoder.decode(block.latents)
                    piece = writer.read(decoded)
                    response = _response(plan, services.tokenizer, block, decoded, piece)
                    watch.block(response)
                    if writer.finish_reason:
                        break
                    yield [response]
        finally:
            watch.ended(writer, prior.received, run.steps_saved)
    end = Response(finish_reason=writer.finish_reason, usage=watch.usage, timing=watch.total, seed=plan.seed)
    response.MergeFrom(end)
    response.MergeFrom(Response(stop_string=writer.stop_string, choices=writer.scores))
    yield [response]


async def _together(
    prior: ReadAhead[prior_pb2.SampleResponse],
) -> AsyncGenerator[tuple[Looks, prior_pb2.SampleResponse | None], None]:
    """Each block, and the previews before it that come so close together that nobody could see them apart: they share
    a pass of the decoder, which takes as long as a step of a small prior. Slow ones wait for nothing."""
    clock = asyncio.get_running_loop().time
    before = clock()
    while True:
        looks, item, now = Looks(), await prior.next(), clock()
        if item.provisional:
            looks.append(item)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(now + _TOGETHER if now < before + _TOGETHER else now):
                    while item.provisional and len(looks) < _MOST_TOGETHER:
                        item = await prior.next()
                        looks += [item] if item.provisional else []
        before = clock()
        yield looks, None if item.provisional else item


async def _with_written(
    blocks: AsyncGenerator[prior_pb2.SampleResponse, None], written: Sequence[types_pb2.Latents]
) -> AsyncGenerator[prior_pb2.SampleResponse, None]:
    """The given blocks, then those that the prior writes. The given ones are held back until the prior has sent its
    first: they would open a decoder's session, and a call that is queued for a prior may hold none."""
    async with aclosing(blocks):
        first = await anext(blocks, None)
        for index, latents in enumerate(written):
            yield prior_pb2.SampleResponse(block_index=index, latents=latents)
        if first is not None:
            yield first
        async for block in blocks:
            yield block


async def _encode(services: ServiceContext, plan: Plan, call: Call, watch: "_Watch") -> types_pb2.Latents:
    if not plan.prompt_ids:
        return services.no_latents()
    answer = await services.encode([plan.prompt_ids], call)
    add_timing(watch.total, answer.timing)
    return answer.encodings[0].latents


def _response(
    plan: Plan,
    tokenizer: Tokenizer,
    block: prior_pb2.SampleResponse,
    decoded: decoder_pb2.DecodeResponse,
    piece: Piece,
) -> Response:
    response = Response(
        text=piece.text,
        token_ids=[token.id for token in piece.tokens],
        tokens=[tokenizer.token_text(token.id, token.before) for token in piece.tokens],
        text_offsets=[token.text_start for token in piece.tokens],
    )
    if plan.request.HasField("top_logprobs"):
        response.logprobs.extend(token.logprob for token in piece.tokens)
    if plan.request.top_logprobs:
        response.top_logprobs.extend(token.top for token in piece.tokens)
        for top, token in zip(response.top_logprobs, piece.tokens, strict=True):
            top.tokens.extend(tokenizer.token_text(id_, token.before) for id_ in top.token_ids)
    if plan.request.with_latents:
        response.latents.CopyFrom(block.latents)
    _add_probes(response, block, decoded)
    add_timing(response.timing, block.timing, decoded.timing)
    return response


def _preview(
    plan: Plan, block: prior_pb2.SampleResponse, decoded: decoder_pb2.DecodeResponse, writer: Writer
) -> Response:
    latents = block.latents if plan.request.with_latents else None
    text = writer.preview(decoded.token_ids)
    preview = generation_pb2.Preview(block_index=block.block_index, step=block.step, latents=latents, text=text)
    response = Response(preview=preview)
    _add_probes(response, block, decoded)
    return response


def _add_probes(response: Response, *parts: prior_pb2.SampleResponse | decoder_pb2.DecodeResponse) -> None:
    for part in parts:
        if part.HasField("probes"):
            response.probes.MergeFrom(part.probes)


class _Watch:
    """Where a generation's time goes, and what it used: entered when it is planned, left when it is over."""

    def __init__(self, services: ServiceContext, call: Call, plan: Plan):
        self._metrics, self._name, self._call, self._plan = services.metrics, services.model_name, call, plan
        self._first: float | None = None
        self._last, self._blocks = 0.0, 0
        self._reason: types_pb2.FinishReason = types_pb2.FINISH_REASON_UNSPECIFIED
        self.total, self.usage = types_pb2.Timing(), types_pb2.Usage()

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = self._call.age()
        self._metrics.generation_seconds.observe(seconds)
        failed = grpc_code(error).name if isinstance(error, Exception) else ""  # who just leaves is no error
        tracing.generated(seconds, self._first, self._attributes(), failed)

    def block(self, response: Response) -> None:
        """A block is decoded."""
        add_timing(self.total, response.timing)
        self._metrics.watch_probes(response.probes)
        age = self._call.age()
        (self._metrics.inter_block if self._blocks else self._metrics.first_block).observe(age - self._last)
        self._first = age if self._first is None else self._first
        self._last, self._blocks = age, self._blocks + 1

    def ended(self, writer: Writer, received: int, steps_saved: int) -> None:
        """The text is over, well or not; `received` blocks came from the prior. Those of a text that was left or failed
        before its end are not wasted by running ahead."""
        prompt, wasted = self._plan.prompt_tokens, received - self._blocks if writer.finish_reason else 0
        self.total.queue_us += round(self._call.waited * 1e6)
        self._metrics.tokens.labels("prompt").inc(prompt)
        self._metrics.tokens.labels("completion").inc(writer.sent)
        self._metrics.wasted_blocks.inc(wasted)
        self._reason = writer.finish_reason
        self.usage = types_pb2.Usage(
            prompt_tokens=prompt,
            completion_tokens=writer.sent,
            blocks=max(received - len(self._plan.written), 0),
            wasted_blocks=wasted,
            steps_saved=steps_saved,
        )

    def _attributes(self) -> dict[str, Any]:
        """In OpenTelemetry's names, and one of vLLM's; no text, stop strings included."""
        sampling, reason = self._plan.sampling, FINISH_REASONS.get(self._reason)
        return {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "colaserve",
            "gen_ai.request.model": self._name,
            "gen_ai.request.max_tokens": self._plan.max_new_tokens,
            "gen_ai.request.temperature": shortest(sampling.temperature),
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.top_p": shortest(sampling.top_p),
            "gen_ai.request.seed": self._plan.seed.base_seed,
            "gen_ai.response.id": requests.current_request_id(),
            "gen_ai.response.model": self._name,
            "gen_ai.usage.input_tokens": self._plan.prompt_tokens,
            "gen_ai.usage.output_tokens": self.usage.completion_tokens,
            "gen_ai.latency.time_in_queue": self._call.waited,
            **({"gen_ai.response.finish_reasons": [reason]} if reason else {}),
        }
