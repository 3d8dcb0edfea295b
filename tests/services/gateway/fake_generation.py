"""A GenerationService whose tokens are bytes and whose text is fixed: tiny, deterministic, and it takes notes."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colaserve.v1 import generation_pb2 as pb
from colaserve.v1 import latent_service_pb2 as latent_pb
from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2_grpc import GenerationServiceServicer
from colaserve.v1.latent_service_pb2_grpc import LatentServiceServicer
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc.requests import value

BLOCK = 4  # tokens
SAYS = " Paris, of course. It lies on the Seine, and 日本 is far."
END_ID = 256
LATENTS = types_pb2.Latents(
    values=types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[2, 1], data=b"\0\0\x80\x3f\0\0\0\x40")  # 1 and 2
)


@dataclass
class Seen:
    """One Generate call."""

    request: pb.GenerateRequest
    metadata: tuple[tuple[str, str | bytes], ...]
    seconds: float | None  # the deadline
    ended: bool = False
    cancelled: bool = False

    def header(self, key: str) -> str:
        return value(self.metadata, key)


@dataclass
class FakeGeneration(GenerationServiceServicer):
    """`fail_after` blocks `failure` is raised; `gate`, when set, is awaited before every block."""

    says: str = SAYS
    failure: Exception | None = None
    fail_after: int = 0
    gate: asyncio.Event | None = None
    chat_frame: str = ""
    serving: bool = True
    waiting: int = 0  # calls
    ends_without_reason: bool = False
    info_failure: Exception | None = None
    info_gate: asyncio.Event | None = None
    model_name: str = "fake/cola"
    max_context: int = 512
    seen: list[Seen] = field(default_factory=list)
    logprob: float = -0.5
    infos: int = 0
    asking: int = 0
    older: bool = False  # leaves unset what earlier versions do not send
    infill: FakeInfill = field(default_factory=lambda: FakeInfill())
    running: int = 0
    most_running: int = 0

    def __post_init__(self) -> None:
        self.infill.generation = self

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        copy = pb.GenerateRequest()
        copy.CopyFrom(request)
        seen = Seen(copy, tuple(context.invocation_metadata() or ()), context.time_remaining())
        self.seen.append(seen)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            async for response in self._blocks(request):
                yield response
            seen.ended = True
        except (asyncio.CancelledError, GeneratorExit):
            seen.cancelled = True
            raise
        finally:
            self.running -= 1

    async def _blocks(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        text, reason, stop = self._text(request)
        ids = list(text.encode())
        budget = request.max_new_tokens or 32
        if len(ids) > budget:
            ids, reason, stop = ids[:budget], types_pb2.FINISH_REASON_LENGTH, ""
        decoder, offsets = _utf8(), _offsets(ids)
        starts = range(0, max(len(ids), 1), BLOCK)
        for number, start in enumerate(starts):
            await self._wait(number)
            block = ids[start : start + BLOCK]
            if request.preview_every:
                latents = LATENTS if request.with_latents else None
                yield pb.GenerateResponse(preview=pb.Preview(block_index=number, step=2, text="?", latents=latents))
            response = self._response(request, block, decoder.decode(bytes(block)))
            if request.with_latents:
                response.latents.CopyFrom(LATENTS)
            if request.with_probes:
                response.probes.MergeFrom(types_pb2.Probes(norm=1.25, entropy=0.1, end_probability=0))
            response.text_offsets.extend(offsets[start : start + BLOCK])
            if start == starts[-1] and not self.ends_without_reason:
                response.finish_reason, response.stop_string = reason, stop
                response.usage.CopyFrom(self._usage(request, len(ids)))
            if self.older:
                _forget_texts(response)
            yield response

    async def _wait(self, number: int) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.failure is not None and number >= self.fail_after:
            raise self.failure

    def _text(self, request: pb.GenerateRequest) -> tuple[str, Any, str]:
        text = (
            f"{self.says}#{request.seed.base_seed}.{request.seed.sample_id}" if request.HasField("seed") else self.says
        )
        end, stop = min(((text.index(stop), stop) for stop in request.stop if stop in text), default=(len(text), ""))
        return text[:end], types_pb2.FINISH_REASON_STOP, stop

    def _response(self, request: pb.GenerateRequest, block: list[int], text: str) -> pb.GenerateResponse:
        response = pb.GenerateResponse(text=text, token_ids=block, tokens=[_text([one]) for one in block])
        if request.HasField("top_logprobs"):
            response.logprobs.extend(self.logprob for _ in block)
            if request.top_logprobs:
                likely = [_likely(token, request.top_logprobs) for token in block]
                response.top_logprobs.extend(likely)
        return response

    def _usage(self, request: pb.GenerateRequest, completion: int) -> types_pb2.Usage:
        prompt = len(request.prompt_ids.ids) or len(request.prompt.encode())
        return types_pb2.Usage(prompt_tokens=prompt, completion_tokens=completion, blocks=-(-completion // BLOCK))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        ids = list(request.text.encode())
        return pb.TokenizeResponse(token_ids=ids, tokens=[_text([one]) for one in ids])

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        ids = list(request.token_ids)
        if len(ids) > self.max_context:
            raise InvalidRequest("token_ids", f"got {len(ids)} ids")
        return pb.DetokenizeResponse(text=_text(ids), tokens=[_text([one]) for one in ids])

    async def GetInfo(self, request: Any, context: Any) -> pb.GenerationServiceGetInfoResponse:
        self.infos += 1
        self.asking += 1
        try:
            if self.info_gate is not None:
                await self.info_gate.wait()
        finally:
            self.asking -= 1
        if self.info_failure is not None:
            raise self.info_failure
        return pb.GenerationServiceGetInfoResponse(
            model_name=self.model_name,
            model=types_pb2.ModelShape(latent_dim=16, block_size=BLOCK, vae_block_size=1, patch_size=1, vocab_size=300),
            space="0123456789abcdef",
            limits=types_pb2.Limits(max_context=self.max_context),
            server=types_pb2.ServerInfo(waiting=self.waiting),
            default_sampler=types_pb2.Sampler(steps=16, guidance_scale=7, solver=types_pb2.SOLVER_EULER,
                                              guidance_start=1, guidance_end=0),
            default_sampling=types_pb2.Sampling(temperature=0, top_k=50, top_p=0.9, repetition_penalty=1.5),
            default_max_new_tokens=32,
            chat_frame=self.chat_frame,
            stages=[pb.StageInfo(stage="prior", target="here", serving=self.serving)],
        )  # fmt: skip


@dataclass
class FakeInfill(LatentServiceServicer):
    """Writes every hole full of underscores."""

    seen: list[latent_pb.InfillRequest] = field(default_factory=list)
    failure: Exception | None = None
    older: bool = False
    generation: Any = None  # which writes the branches of forks
    forks: list[latent_pb.ForkRequest] = field(default_factory=list)

    async def Fork(self, request: latent_pb.ForkRequest, context: Any) -> AsyncIterator[latent_pb.ForkResponse]:
        """The branches side by side; latents with all."""
        self.forks.append(request)
        names = {"text": "prompt", "ids": "prompt_ids"}
        fields = {names.get(field.name, field.name): value for field, value in request.ListFields()}
        branches, queue = fields.pop("branches"), asyncio.Queue[Any]()

        async def write(branch: int) -> None:
            alone = pb.GenerateRequest(**fields)
            if request.HasField("seed"):
                alone.seed.sample_id += branch
            try:
                async for block in self.generation.Generate(alone, context):
                    found = {field.name: value for field, value in block.ListFields()}
                    latents = types_pb2.Latents(space="x")
                    queue.put_nowait(latent_pb.ForkResponse(branch=branch, latents=latents, **found))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(write(branch)) for branch in range(len(branches))]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def Embed(self, request: latent_pb.EmbedRequest, context: Any) -> latent_pb.EmbedResponse:
        """A vector of the length, the number of the pooling, and whether it is scaled."""
        response = latent_pb.EmbedResponse()
        for ids in [each.ids for each in request.sequences] or [text.encode() for text in request.texts]:
            if len(ids) > 100:
                raise InvalidRequest("texts[0]", "needs 101 latent positions")
            values = np.array([len(ids), request.pooling, request.normalize, *[0] * 13], "<f4")
            tensor = types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[16], data=values.tobytes())
            response.embeddings.add(values=tensor, token_count=len(ids), space="0123456789abcdef")
        return response

    async def Logprobs(self, request: latent_pb.LogprobsRequest, context: Any) -> latent_pb.LogprobsResponse:
        ids = list(request.ids.ids) or list(request.text.encode())
        return latent_pb.LogprobsResponse(
            text=_text(ids),
            token_ids=ids,
            logprobs=[-0.25] * len(ids),
            top_logprobs=[_likely(id_, request.top_logprobs) for id_ in ids] if request.top_logprobs else [],
            tokens=[_text([id_]) for id_ in ids],
            text_offsets=_offsets(ids),
        )

    async def Infill(self, request: latent_pb.InfillRequest, context: Any) -> latent_pb.InfillResponse:
        self.seen.append(request)
        if self.failure is not None:
            raise self.failure
        segments = [one.text or "_" * one.token_count for one in request.segments]
        holes = [one.token_count for one in request.segments if one.token_count]
        return latent_pb.InfillResponse(
            text="".join(segments),
            segments=segments,
            finish_reasons=[] if self.older else [types_pb2.FINISH_REASON_LENGTH] * len(holes),
            usage=types_pb2.Usage(prompt_tokens=len("".join(segments)) - sum(holes), completion_tokens=sum(holes)),
        )


def _forget_texts(response: pb.GenerateResponse) -> None:
    for name in ("tokens", "text_offsets"):
        response.ClearField(name)
    for top in response.top_logprobs:
        top.ClearField("tokens")


def _utf8() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("ignore")


def _text(ids: list[int]) -> str:
    return bytes(one for one in ids if one < END_ID).decode(errors="replace")


def _offsets(ids: list[int]) -> list[int]:
    """Where each byte's character begins, in characters."""
    decoder, offsets, characters = _utf8(), [], 0
    for one in ids:
        offsets.append(characters)
        characters += len(decoder.decode(bytes([one])))
    return offsets


def _likely(token: int, count: int) -> types_pb2.TopLogprobs:
    ids = [(token + step) % 256 for step in range(count)]
    logprobs = [-0.5 - step for step in range(count)]
    return types_pb2.TopLogprobs(token_ids=ids, logprobs=logprobs, tokens=[_text([one]) for one in ids])
