"""A GenerationService whose tokens are bytes and whose text is fixed: tiny, deterministic, and it takes notes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colaserve.v1 import generation_pb2 as pb
from colaserve.v1 import latent_service_pb2 as latent_pb
from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2_grpc import GenerationServiceServicer
from colaserve.v1.latent_service_pb2_grpc import LatentServiceServicer
from colaserve_services.coordinator.read_ahead import merged
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc.requests import value
from tests.bytes_model import BLOCK, SPACE, block_of_branch, blocks_of, branch_of, filled, scored, text_of, texts_of

SAYS = " Paris, of course. It lies on the Seine, and 日本 is far."


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
            number, seed = 0, request.seed
            suffix = f"#{seed.base_seed}.{seed.sample_id}" if request.HasField("seed") else ""
            for response in blocks_of(request, self.says + suffix, self.logprob):
                await self._wait(number)
                if self.ends_without_reason:
                    response.ClearField("finish_reason")
                if self.older:
                    _forget_texts(response)
                number += not response.HasField("preview")
                yield response
            seen.ended = True
        except (asyncio.CancelledError, GeneratorExit):
            seen.cancelled = True
            raise
        finally:
            self.running -= 1

    async def _wait(self, number: int) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.failure is not None and number >= self.fail_after:
            raise self.failure

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        ids = request.text.encode()
        return pb.TokenizeResponse(token_ids=ids, tokens=texts_of(ids))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        ids = request.token_ids
        if len(ids) > self.max_context:
            raise InvalidRequest("token_ids", f"got {len(ids)} ids")
        return pb.DetokenizeResponse(text=text_of(ids), tokens=texts_of(ids))

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
            space=SPACE,
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
        alone = [branch_of(request, number) for number in range(len(request.branches))]
        streams = [self.generation.Generate(each, context) for each in alone]
        async with aclosing(merged(streams, len(streams), lambda block: False)) as blocks:
            async for number, block in blocks:
                yield block_of_branch(number, 0, block)

    async def Embed(self, request: latent_pb.EmbedRequest, context: Any) -> latent_pb.EmbedResponse:
        """A vector of the length, the number of the pooling, and whether it is scaled."""
        response = latent_pb.EmbedResponse()
        for ids in [each.ids for each in request.sequences] or [text.encode() for text in request.texts]:
            if len(ids) > 100:
                raise InvalidRequest("texts[0]", "needs 101 latent positions")
            values = np.array([len(ids), request.pooling, request.normalize, *[0] * 13], "<f4")
            tensor = types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[16], data=values.tobytes())
            response.embeddings.add(values=tensor, token_count=len(ids), space=SPACE)
        return response

    async def Logprobs(self, request: latent_pb.LogprobsRequest, context: Any) -> latent_pb.LogprobsResponse:
        return scored(request.ids.ids or request.text.encode(), request)

    async def Infill(self, request: latent_pb.InfillRequest, context: Any) -> latent_pb.InfillResponse:
        self.seen.append(request)
        if self.failure is not None:
            raise self.failure
        response = filled(request)
        if self.older:
            response.ClearField("finish_reasons")
        return response


def _forget_texts(response: pb.GenerateResponse) -> None:
    for name in ("tokens", "text_offsets"):
        response.ClearField(name)
    for top in response.top_logprobs:
        top.ClearField("tokens")
