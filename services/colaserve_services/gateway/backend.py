"""The coordinator as the gateway sees it: its calls with deadline and metadata, and its description of itself, kept."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, Final

import grpc

from colaserve.v1 import generation_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve.v1.latent_service_pb2 import (
    ForkBranch,
    ForkRequest,
    ForkResponse,
    InfillRequest,
    InfillResponse,
    LogprobsRequest,
    LogprobsResponse,
)
from colaserve_services.errors import ColaserveError, Unavailable
from colaserve_services.inference.open_inference_pb2 import ModelMetadataRequest, ModelMetadataResponse
from colaserve_services.rpc.requests import outgoing_metadata

INFO_TIMEOUT: Final = 5.0
UNARY_TIMEOUT: Final = 30.0
_RESPONSE: Final = pb.GenerateResponse.DESCRIPTOR.fields_by_name
INCOMPLETE: Final = "\ufffd"  # in the text of a token that holds a part of a character

Reach = Callable[[], Awaitable[None]]
Info = pb.GenerationServiceGetInfoResponse


def coordinator_stub(*stubs: Any) -> Any:
    """One stub out of those of GenerationService and the coordinator's other services, of grpc.aio or in this process.
    Where several have a method of one name, the first one's counts."""
    return SimpleNamespace(**dict(item for stub in reversed(stubs) for item in vars(stub).items()))


def most_tokens(info: Info) -> int:
    """Tokens that fill the longest context."""
    return info.limits.max_context * max(info.model.patch_size, 1)


async def _at_once() -> None:
    """A service in this process is always there."""


class Backend:
    """Calls a GenerationService. `reach` returns when one can be called, or it is no use to wait."""

    def __init__(self, stub: Any, info_seconds: float, reach: Reach | None = None):
        self._stub = stub
        self._reach = reach or _at_once
        self._info_seconds = info_seconds
        self._info: Info | None = None
        self._info_at = -float("inf")
        self._asking: asyncio.Task[Info] | None = None

    async def messages(
        self, method: str, request: Any, deadline: float, streaming: bool = False
    ) -> AsyncGenerator[Any, None]:
        """The messages of a call of a method, one unless it is `streaming`. `deadline` in time.monotonic() seconds.
        Closing the iterator cancels the call."""
        await self._reach()
        call = getattr(self._stub, method)(
            request, timeout=max(deadline - time.monotonic(), 0.001), metadata=outgoing_metadata()
        )
        try:
            if streaming:
                async for message in call:
                    yield message
            else:
                yield await call
        finally:
            call.cancel()

    async def generate(
        self, request: pb.GenerateRequest, samples: int, deadline: float
    ) -> AsyncGenerator[tuple[int, pb.GenerateResponse], None]:
        """The messages of several samples of a prompt, each with the number of its sample. `request` is the first."""
        if samples == 1:
            async with aclosing(self.messages("Generate", request, deadline, streaming=True)) as messages:
                async for message in messages:
                    yield 0, message
            return
        names = {"prompt": "text", "prompt_ids": "ids"}
        fields = {names.get(field.name, field.name): value for field, value in request.ListFields()}
        with_latents = fields.pop("with_latents", False)  # the messages of a fork always have them
        fork = ForkRequest(branches=[ForkBranch()] * samples, **fields)
        async with aclosing(self.messages("Fork", fork, deadline, streaming=True)) as messages:
            async for message in messages:
                yield message.branch, _of_branch(message, with_latents)

    async def infill(
        self, request: InfillRequest, deadline: float
    ) -> AsyncGenerator[tuple[int, pb.GenerateResponse], None]:
        """The text of an infill's one hole before a suffix, as the one message of one sample."""
        response: InfillResponse = await self._answer("Infill", request, deadline)
        [reason] = response.finish_reasons or [types_pb2.FINISH_REASON_LENGTH]  # earlier versions leave it unset
        text = response.segments[len(request.segments) - 2]
        yield 0, pb.GenerateResponse(text=text, finish_reason=reason, usage=response.usage, seed=response.seed)

    async def inference_model(self, name: str, version: str) -> ModelMetadataResponse:
        """The inputs and outputs of a model of the Open Inference Protocol."""
        request = ModelMetadataRequest(name=name, version=version)
        found: ModelMetadataResponse = await self._unary(self._stub.ModelMetadata, request)
        return found

    async def logprobs(self, request: LogprobsRequest, deadline: float) -> pb.GenerateResponse:
        """A given text as a message of a generation that wrote it."""
        return _as_generated(await self._answer("Logprobs", request, deadline))

    async def _answer(self, method: str, request: Any, deadline: float) -> Any:
        async with aclosing(self.messages(method, request, deadline)) as messages:
            return await anext(messages)

    async def tokenize(self, text: str) -> pb.TokenizeResponse:
        return await self._unary(self._stub.Tokenize, pb.TokenizeRequest(text=text))

    async def detokenize(self, ids: Sequence[int]) -> pb.DetokenizeResponse:
        return await self._unary(self._stub.Detokenize, pb.DetokenizeRequest(token_ids=ids))

    async def _unary(self, method: Any, request: Any) -> Any:
        await self._reach()
        return await method(request, timeout=UNARY_TIMEOUT, metadata=outgoing_metadata())

    async def info(self) -> Info:
        """The coordinator's description of itself. One older than `info_seconds` is given while a new one is asked for,
        and as long as none comes."""
        if self._asking is None and time.monotonic() - self._info_at > self._info_seconds:
            self._asking = asyncio.create_task(self._ask())
        if self._info is not None:
            return self._info
        assert self._asking is not None
        return await asyncio.shield(self._asking)  # concurrent callers share one call

    async def _ask(self) -> Info:
        try:
            if self._info is None:
                await self._reach()
            return await self.fresh_info()
        except (grpc.RpcError, ColaserveError, TimeoutError):
            if self._info is None:
                raise
            return self._info
        finally:
            self._asking = None

    async def fresh_info(self, seconds: float = INFO_TIMEOUT) -> Info:
        """Its description of itself as of now."""
        request = pb.GenerationServiceGetInfoRequest()
        async with asyncio.timeout(seconds):
            info: Info = await self._stub.GetInfo(request, timeout=seconds, metadata=outgoing_metadata())
        self._info, self._info_at = info, time.monotonic()
        return info

    async def others_wait(self) -> bool:
        """Whether calls are queued at the coordinator now; False when it does not answer."""
        try:
            return (await self.fresh_info()).server.waiting > 0
        except (grpc.RpcError, ColaserveError, TimeoutError):
            return False

    async def check_ready(self) -> None:
        """Raise unless the coordinator answers, within 2 s, and finds all its stages serving."""
        try:
            info = await self.fresh_info(0.5)
        except (grpc.RpcError, TimeoutError):  # one replica is silent, it may be; the next call goes to another
            info = await self.fresh_info(1.5)
        for stage in info.stages:
            if not stage.serving:
                raise Unavailable(f"{stage.stage} is not serving")


def _as_generated(message: ForkResponse | LogprobsResponse) -> pb.GenerateResponse:
    """A message of Generate with the fields of another one that have the same names."""
    fields = {field.name: value for field, value in message.ListFields() if field.name in _RESPONSE}
    return pb.GenerateResponse(**fields)


def _of_branch(message: ForkResponse, with_latents: bool) -> pb.GenerateResponse:
    """The message that Generate would have sent for this branch."""
    response = _as_generated(message)
    if not with_latents:
        response.ClearField("latents")
        if response.HasField("preview"):
            response.preview.ClearField("latents")
    return response


class TokenTexts:
    """The texts of one generation's tokens, and where they begin in its text, asked of a coordinator of an earlier
    version, which sends neither: both are there while versions change."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._at = 0  # characters before the next token
        self._parts: list[int] = []  # tokens that hold parts of a character, since the last whole one

    async def fill_in(self, message: pb.GenerateResponse) -> None:
        """Add to log-probabilities what belongs beside them, unless the message has it."""
        if not message.logprobs or message.tokens:
            return
        texts = await self._texts({*message.token_ids, *(id_ for top in message.top_logprobs for id_ in top.token_ids)})
        for top in message.top_logprobs:
            top.tokens.extend(texts[id_] for id_ in top.token_ids)
        message.tokens.extend(texts[id_] for id_ in message.token_ids)
        for id_ in message.token_ids:
            message.text_offsets.append(await self._offset(id_, texts[id_]))

    async def _texts(self, ids: set[int]) -> dict[int, str]:
        most = most_tokens(await self._backend.info())  # that one call takes
        found: dict[int, str] = {}
        for start in range(0, len(ids), most):
            some = sorted(ids)[start : start + most]
            found |= zip(some, (await self._backend.detokenize(some)).tokens, strict=True)
        return found

    async def _offset(self, token: int, text: str) -> int:
        """Where a token begins. A part of a character begins where that does."""
        if INCOMPLETE in text:
            self._parts.append(token)
            return self._at
        if self._parts:
            self._at += len((await self._backend.detokenize(self._parts)).text)
            self._parts.clear()
        start, self._at = self._at, self._at + len(text)
        return start
