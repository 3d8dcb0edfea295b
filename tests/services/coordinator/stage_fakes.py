"""Tiny deterministic stages. What each answers depends on all of its requests, so a wrong resume shows."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import numpy as np

from colaserve.v1 import (
    decoder_pb2,
    decoder_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    prior_pb2,
    prior_pb2_grpc,
    types_pb2,
)
from colaserve_services.errors import AT_FAULT, Overloaded, Unavailable
from colaserve_services.rpc import arrays

Fault = grpc.StatusCode | Exception
D, B, VOCAB, SPACE = 2, 4, 512, "0123456789abcdef"


def digest(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little")


class Fake:
    """Counts calls and sessions; breaks or refuses as `faults` say: {number of the call: fault}."""

    patch_size, block_size, max_context = 1, B, 256
    max_running = 0  # sessions; one more is refused; 0: any number

    def __init__(self, **changes: Any):
        self.calls: list[Any] = []
        self.metadata: list[Any] = []
        self.remaining: list[float | None] = []
        self.running = 0
        self.faults: dict[int, tuple[int, Fault]] = {}  # call -> (answers before it, what then ends it)
        self.spoils: dict[int, Callable[[Any], Any]] = {}  # call -> what is done to each of its answers
        self.at_fault_after: int | None = None  # calls; GetInfo then says so
        self.info_calls = 0
        self.info_fault: Exception | None = None  # what GetInfo raises
        self.gate = asyncio.Event()
        self.gate.set()
        self.space, self.weights, self.dtype = SPACE, "", ""
        for name, value in changes.items():
            setattr(self, name, value)

    def begin(self, request: Any, context: Any) -> tuple[int, Fault] | None:
        self.calls.append(request)
        self.metadata.append(context.invocation_metadata())
        self.remaining.append(context.time_remaining())
        return self.faults.get(len(self.calls) - 1)

    async def fail(self, fault: Fault, context: Any) -> None:
        if isinstance(fault, Exception):
            raise fault
        await context.abort(fault, f"{type(self).__name__} broke")

    def spoiled(self, response: Any, number: int) -> Any:
        """The answer, changed in place where call `number` is to be answered wrongly."""
        self.spoils.get(number, lambda response: None)(response)
        return response

    def info(self, kind: Any, **more: Any) -> Any:
        self.info_calls += 1
        if self.info_fault:
            raise self.info_fault
        if self.at_fault_after is not None and len(self.calls) >= self.at_fault_after:
            raise Unavailable(AT_FAULT)
        shape = types_pb2.ModelShape(
            latent_dim=D, block_size=self.block_size, vae_block_size=1, patch_size=self.patch_size,
            vocab_size=VOCAB, parameters=10,
        )  # fmt: skip
        limits = types_pb2.Limits(max_context=self.max_context, max_running=self.max_running)
        server = types_pb2.ServerInfo(dtype=self.dtype)
        return kind(model=shape, space=self.space, weights=self.weights, limits=limits, server=server, **more)


class FakeEncoder(Fake, encoder_pb2_grpc.EncoderServiceServicer):
    has_variance = True

    async def GetInfo(self, request: Any, context: Any) -> Any:
        kind = encoder_pb2.EncoderServiceGetInfoResponse
        return self.info(kind, has_variance=self.has_variance, scaling_factor=1)

    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Any) -> encoder_pb2.EncodeResponse:
        fault, number = self.begin(request, context), len(self.calls) - 1
        await self.gate.wait()
        if fault:
            await self.fail(fault[1], context)
        response = encoder_pb2.EncodeResponse(timing=types_pb2.Timing(queue_us=1, compute_us=2))
        for sequence in request.sequences:
            latents = arrays.latents_to_message(self.encode(sequence.ids), SPACE)
            variance = latents.values if request.with_variance else None
            response.encodings.add(latents=latents, log_variance=variance)
        return self.spoiled(response, number)

    def encode(self, ids: Iterable[int]) -> np.ndarray:
        ids = list(ids)
        groups = [ids[i : i + self.patch_size] for i in range(0, len(ids), self.patch_size)]
        return np.array([(group[0], sum(group)) for group in groups], np.float32).reshape(-1, D)


class FakePrior(Fake, prior_pb2_grpc.PriorServiceServicer):
    extra = 0  # blocks beyond those that it is asked for
    turns: asyncio.Semaphore | None = None  # one is taken for every answer; None: as fast as it goes

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return self.info(prior_pb2.PriorServiceGetInfoResponse)

    async def Sample(self, request: prior_pb2.SampleRequest, context: Any) -> AsyncIterator[prior_pb2.SampleResponse]:
        fault, call = self.begin(request, context), len(self.calls) - 1
        if self.max_running and self.running >= self.max_running:
            raise Overloaded("full", 0.01)
        self.running += 1
        try:
            canvas = arrays.latents_from_message(request.canvas.latents, "canvas", D, SPACE)
            opened = {i for span in request.canvas.open for i in range(span.start, span.end)}
            size = self.block_size
            context_blocks = min([len(canvas), *opened]) // size
            assert len(canvas) <= (context_blocks + request.max_blocks) * size
            past = canvas[: context_blocks * size]
            for number in range(request.max_blocks + self.extra):
                await self.gate.wait()
                if fault and fault[0] == number:
                    await self.fail(fault[1], context)
                index, start = request.first_block + number, len(past)
                seed = digest(
                    request.seed.base_seed, request.seed.sample_id, index, past.tobytes(), repr(request.sampler)
                )
                block = np.random.default_rng(seed).integers(0, 9, (size, D)).astype(np.float32)
                for row in range(size):
                    if start + row < len(canvas) and start + row not in opened:
                        block[row] = canvas[start + row]
                for look in self.looks(request, index, block):
                    if self.turns:
                        await self.turns.acquire()
                    yield self.spoiled(look, call)
                past = np.concatenate([past, block])
                timing = types_pb2.Timing(queue_us=10, compute_us=20)
                latents = arrays.latents_to_message(block, SPACE)
                response = prior_pb2.SampleResponse(block_index=index, latents=latents, timing=timing, step=4)
                if request.with_probes:
                    response.probes.MergeFrom(types_pb2.Probes(norm=index + 0.5, drift=0))
                if self.turns:
                    await self.turns.acquire()
                yield self.spoiled(response, call)
        finally:
            self.running -= 1

    def looks(
        self, request: prior_pb2.SampleRequest, index: int, block: np.ndarray
    ) -> Iterable[prior_pb2.SampleResponse]:
        """Previews of a block of four steps; that of the last is the block itself."""
        every = request.preview_every or 5
        for step in range(every, 5, every):
            latents = arrays.latents_to_message(block * (step / 4), SPACE)
            yield prior_pb2.SampleResponse(block_index=index, latents=latents, provisional=True, step=step)


class FakeDecoder(Fake, decoder_pb2_grpc.DecoderServiceServicer):
    script: list[int] | None = None  # ids of the whole run; else they depend on everything

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.requests: list[str] = []  # what each asked for, and how many blocks

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return self.info(decoder_pb2.DecoderServiceGetInfoResponse)

    async def Decode(
        self, requests: AsyncIterator[decoder_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[decoder_pb2.DecodeResponse]:
        self.running += 1
        try:
            opening = (await anext(requests)).open
            fault, call = self.begin(opening, context), len(self.calls) - 1
            past = arrays.latents_from_message(opening.prefix, "prefix", D, SPACE)
            ids, targets = list(opening.history_ids), list(opening.target_ids)
            number = 0
            async for request in requests:
                await self.gate.wait()
                if fault and fault[0] == number:
                    await self.fail(fault[1], context)
                number += 1
                look = request.HasField("preview")
                latents = arrays.latents_from_message(request.preview if look else request.block, "block", D, SPACE)
                assert look or len(latents) == self.block_size
                self.requests.append(f"{request.WhichOneof('request')} {len(latents) // self.block_size}")
                for one in np.split(latents, len(latents) // self.block_size):
                    whole = np.concatenate([past, one])
                    assert len(whole) <= opening.max_latents
                    new = self.draw(whole, ids, opening.sampling)
                    yield self.spoiled(self.answer(opening, new, targets, self.index(len(ids)), look), call)
                if not look:
                    past, ids, targets = whole, ids + new, targets[len(new) :]
        finally:
            self.running -= 1

    def answer(
        self, opening: decoder_pb2.OpenDecode, new: list[int], targets: list[int], index: int | None, look: bool
    ) -> decoder_pb2.DecodeResponse:
        return decoder_pb2.DecodeResponse(
            token_ids=new,
            logprobs=[-id_ / 100 for id_ in new],
            top_logprobs=[self.top(id_, opening.top_logprobs) for id_ in new] if opening.top_logprobs else (),
            target_logprobs=[-1.0 if ours == theirs else -3.0 for ours, theirs in zip(new, targets, strict=False)],
            timing=types_pb2.Timing(queue_us=100, compute_us=200),
            block_index=index,
            provisional=look,
            probes=types_pb2.Probes(entropy=1.5, end_probability=0.25) if opening.with_probes else None,
        )

    def index(self, ids: int) -> int | None:
        return ids // (self.block_size * self.patch_size)

    def draw(self, past: np.ndarray, ids: list[int], sampling: types_pb2.Sampling) -> list[int]:
        count = self.block_size * self.patch_size
        if self.script is not None:
            return (self.script[len(ids) :] + [3] * count)[:count]
        return [3 + digest(past.tobytes(), ids, sampling, position) % (VOCAB - 3) for position in range(count)]

    @staticmethod
    def top(id_: int, count: int) -> types_pb2.TopLogprobs:
        ids = [(id_ + i) % VOCAB for i in range(count)]
        return types_pb2.TopLogprobs(token_ids=ids, logprobs=[-i / 10 for i in range(count)])


class EchoDecoder(FakeDecoder):
    """Undoes FakeEncoder (P = 1): the ids are what the latents say."""

    def draw(self, past: np.ndarray, ids: list[int], sampling: types_pb2.Sampling) -> list[int]:
        return [int(row[0]) % VOCAB for row in past[-self.block_size :]]
