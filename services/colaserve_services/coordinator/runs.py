"""Runs of the prior and of the decoder that go on with another replica when one breaks."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from colaserve.v1 import decoder_pb2, prior_pb2, types_pb2
from colaserve_services.coordinator import checks, rows
from colaserve_services.coordinator.admission import Ticket
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.checks import StageFault
from colaserve_services.coordinator.failures import STAGE_ERRORS, Attempts

if TYPE_CHECKING:
    from colaserve_services.coordinator.context import ServiceContext

MANY_PASSES: Final = 256  # some seconds where many runs share them

Span = tuple[int, int]
T = TypeVar("T")


class PriorRun:
    """`blocks()` yields each written block, in order; none is lost or written twice. Leaving it cancels the stream.

    `latents` (float32) are the given positions, `open_spans` those of them that are to be written; leading blocks
    without one are context. When the stream breaks it is opened again with the blocks so far as part of the canvas;
    so it is when the run was preempted, for a much smaller one that waited or because nobody read it. Previews come
    between the blocks; one that is malformed is left out.
    """

    def __init__(
        self,
        services: "ServiceContext",
        ticket: Ticket,
        latents: types_pb2.Latents,
        blocks: int,
        sampler: types_pb2.Sampler,
        noise: types_pb2.NoiseSeed | types_pb2.Latents,
        open_spans: Sequence[Span] = (),
        on_wait: Callable[[bool], None] = lambda waits: None,
        written: Sequence[types_pb2.Latents] = (),
        preview_every: int = 0,
        with_probes: bool = False,
    ):
        """`ticket`: of the call's slot. `noise`: its seed, or the rows of all blocks. `on_wait` hears True when the run
        must wait for another replica, False when that writes. `written`: its first blocks, where it goes on with what
        another run began."""
        self._model, self._attempts = services.model, Attempts(services, ticket)
        self._admission, self._ticket = services.admission, ticket
        self._latents, self._open, self._blocks = latents, tuple(open_spans), blocks
        self._sampler, self._noise, self._on_wait = sampler, noise, on_wait
        self.context = context_blocks(rows.count(latents), open_spans, self._model.block_size)  # blocks
        self._written = list(written)
        self.steps_saved = 0  # of the blocks that came
        self._preview_every, self._with_probes = preview_every, with_probes
        self._unread: Any = None  # the stream, while a block of it is handed over
        self._reading: asyncio.Future[None] | None = None  # before it is done, the run gives way after a block

    async def blocks(self) -> AsyncGenerator[prior_pb2.SampleResponse, None]:
        """Each written block, in order, and previews of the one under way."""
        self._attempts.call.preempt = self._preempt_unread
        with self._attempts:
            while len(self._written) < self._blocks:
                if self._written and self.is_known(len(self._written)):  # a replica would take it for context
                    yield self._keep(self._known_block(len(self._written)))
                    continue
                if self._reading is not None:
                    await asyncio.wait([self._reading])  # not in the queue meanwhile
                try:
                    async with aclosing(self._stream()) as stream:
                        async for response in stream:
                            yield response if response.provisional else self._keep(response)
                except STAGE_ERRORS as error:
                    self._on_wait(True)
                    await self._attempts.failed(error)

    async def _stream(self) -> AsyncGenerator[prior_pb2.SampleResponse, None]:
        stub = await self._attempts.stub()
        call = stub.Sample(self.request(), timeout=self._attempts.call.left())
        try:
            async for response in call:
                if response.provisional:
                    if self._is_sound(response):
                        self._on_wait(False)
                        yield response
                    continue
                if len(self._written) == self._blocks:  # the run is complete
                    self._attempts.fault(StageFault("count", "it sent a block too many"))
                    return
                checks.block(response, len(self._written), self._model, self._attempts.call)
                self._attempts.progressed()
                self._on_wait(False)
                self._unread = call
                yield response
                if self._unread is None:
                    return
                self._unread = None
                unread = self._reading is not None and not self._reading.done()
                gives_way = unread or self._admission.outlasts(self._ticket)
                if len(self._written) < self._blocks and gives_way:
                    self._preempt()
                    return
            if len(self._written) < self._blocks:
                raise StageFault("count", "it ended its stream before the last block")
        finally:
            call.cancel()

    def _is_sound(self, preview: prior_pb2.SampleResponse) -> bool:
        try:
            checks.block(preview, len(self._written), self._model, self._attempts.call)
        except StageFault as fault:
            self._attempts.fault(fault)
            return False
        return True

    def _preempt_unread(self, reading: asyncio.Future[None]) -> None:
        self._reading = reading
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
            self._preempt()

    def _preempt(self) -> None:
        self._on_wait(True)
        self._admission.preempt(self._ticket)

    def request(self) -> prior_pb2.SampleRequest:
        """What a replica is asked, given the blocks written so far."""
        done = len(self._written)
        canvas = types_pb2.Canvas(latents=self._canvas())
        border = (self.context + done) * self._model.block_size if done else 0
        for start, end in self._open:
            if end > border:
                canvas.open.add(start=max(start, border), end=end)
        request = prior_pb2.SampleRequest(
            canvas=canvas,
            max_blocks=self._blocks - done,
            first_block=done,
            sampler=self._sampler,
            cache_salt=self._attempts.call.salt,
            preview_every=self._preview_every,
            with_probes=self._with_probes,
        )
        if isinstance(self._noise, types_pb2.NoiseSeed):
            request.seed.CopyFrom(self._noise)
        else:
            B = self._model.block_size
            request.noise.CopyFrom(rows.take(self._noise, done * B, self._blocks * B).values)
            request.noise.shape[:] = [self._blocks - done, B, self._model.latent_dim]
        return request

    def _canvas(self) -> types_pb2.Latents:
        if not self._written:
            return self._latents
        size = self._model.block_size
        start, end = self.context * size, (self.context + len(self._written)) * size
        parts = [rows.take(self._latents, 0, start), *self._written]
        parts.append(rows.take(self._latents, end, max(end, rows.count(self._latents))))
        return rows.join(parts, self._model.latent_dim, self._model.space)

    def is_known(self, index: int) -> bool:
        """Whether a block to be written has no open position."""
        start = (self.context + index) * self._model.block_size
        end = start + self._model.block_size
        return end <= rows.count(self._latents) and not any(a < end and b > start for a, b in self._open)

    def _known_block(self, index: int) -> prior_pb2.SampleResponse:
        start = (self.context + index) * self._model.block_size
        latents = rows.take(self._latents, start, start + self._model.block_size)
        return prior_pb2.SampleResponse(block_index=index, latents=latents)

    def _keep(self, response: prior_pb2.SampleResponse) -> prior_pb2.SampleResponse:
        self._written.append(response.latents)
        self.steps_saved += response.steps_saved
        return response


class DecoderRun:
    """`async with DecoderRun(...) as decoder: await decoder.decode(latents)`; leaving frees the stage's session.

    The stream is opened with the first block. When it breaks it is opened again with the latents and ids so far, and
    the block is sent once more.
    """

    def __init__(
        self,
        services: "ServiceContext",
        call: Call,
        prefix: types_pb2.Latents,
        blocks: int,
        sampling: types_pb2.Sampling,
        top_logprobs: int = 0,
        target_ids: Sequence[int] = (),
        patient: bool = False,
        with_probes: bool = False,
        lookup: decoder_pb2.OpenDecode | None = None,
    ):
        """`patient`: the call has made progress already, so it waits longer for a full decoder. `lookup`: whose
        log-probabilities are wanted at every position."""
        self._lookup = lookup or decoder_pb2.OpenDecode()
        self._model, self._latents = services.model, [prefix]
        self._sampling, self._top, self._targets = sampling, top_logprobs, list(target_ids)
        self._with_probes = with_probes
        self._max_latents = rows.count(prefix) + blocks * self._model.block_size
        self._attempts = Attempts(services, Ticket(call, "decoder", self._max_latents, resuming=patient))
        self._ids: list[int] = []  # sampled so far, untrimmed
        self._call: Any = None
        self._decoding = self._let_go = self._preview_lost = False

    async def __aenter__(self) -> "DecoderRun":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def decode(self, latents: types_pb2.Latents) -> decoder_pb2.DecodeResponse:
        """The ids of the next block, B * P of them."""
        response = await self._undisturbed(self._answered(latents))
        self._latents.append(latents)
        self._ids += response.token_ids
        self._preview_lost = False
        return response

    async def previews(self, latents: Sequence[types_pb2.Latents]) -> list[decoder_pb2.DecodeResponse]:
        """What the next block would become with each of these latents. Nothing where the stage does not answer: the
        block finds out why, and until it has come nothing is asked for again."""
        if self._preview_lost:
            return []
        joined = rows.join(latents, self._model.latent_dim, self._model.space)
        request = decoder_pb2.DecodeRequest(preview=joined)
        try:
            return await self._undisturbed(self._exchange(request, len(latents)))
        except STAGE_ERRORS:
            self._preview_lost = True
            self._cancel()
            return []

    async def _undisturbed(self, answering: Coroutine[Any, Any, T]) -> T:
        """The answer; the session is let go after it at the earliest."""
        self._decoding = True
        try:
            response = await answering
        finally:
            self._decoding = False
        if self._let_go:
            self._close()
        return response

    def prior_waits(self, waits: bool) -> None:
        """While the run's prior waits for a replica, free the stage's session after every block; the next opens one.

        Else calls that hold all of the decoder's slots and are queued for a prior could block those that hold the
        prior's slots and are queued for a decoder, for ever.
        """
        self._let_go = waits
        if waits and not self._decoding:
            self._close()

    async def _answered(self, latents: types_pb2.Latents) -> decoder_pb2.DecodeResponse:
        while True:
            try:
                [response] = await self._exchange(decoder_pb2.DecodeRequest(block=latents))
            except STAGE_ERRORS as error:
                self._cancel()
                await self._attempts.failed(error)
            else:
                self._attempts.progressed()
                return response

    def request(self) -> decoder_pb2.OpenDecode:
        """What a replica is asked, given the blocks decoded so far."""
        request = decoder_pb2.OpenDecode(
            prefix=rows.join(self._latents, self._model.latent_dim, self._model.space),
            sampling=self._sampling,
            history_ids=self._ids,
            top_logprobs=self._top,
            target_ids=self._targets[len(self._ids) :],
            max_latents=self._max_latents,
            cache_salt=self._attempts.call.salt,
            with_probes=self._with_probes,
        )
        request.MergeFrom(self._lookup)
        return request

    async def _exchange(self, request: decoder_pb2.DecodeRequest, count: int = 1) -> list[decoder_pb2.DecodeResponse]:
        """So many answers to a request."""
        try:
            if self._call is None:
                await self._open()
            await self._call.write(request)
        except asyncio.InvalidStateError as error:  # it ended before: read tells how
            await self._read_end(error)
        responses = []
        for _ in range(count):
            response = await self._call.read()
            if response is grpc.aio.EOF:
                raise StageFault("count", "it ended its stream before the last block")
            if response.provisional != request.HasField("preview"):
                raise StageFault("count", "it took a preview for a block, or a block for a preview")
            self._check(response)
            responses.append(response)
        return responses

    async def _open(self) -> None:
        stub = await self._attempts.stub()
        self._call = stub.Decode(timeout=self._attempts.call.left())
        await self._call.write(decoder_pb2.DecodeRequest(open=self.request()))

    async def _read_end(self, error: Exception) -> None:
        code = await self._call.code()
        if code != grpc.StatusCode.OK:
            details, trailing = await self._call.details(), await self._call.trailing_metadata()
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details, None) from error
        raise StageFault("count", "it ended its stream before the last block") from error

    def _check(self, response: decoder_pb2.DecodeResponse) -> None:
        size, done = self._model.block_tokens, len(self._ids)
        targets = min(size, max(len(self._targets) - done, 0))
        checks.decoded(response, done // size, self._top, targets, self._model, self._attempts.call)
        checks.position_logprobs(response.position_logprobs, self._lookup, self._model)

    def _close(self) -> None:
        self._cancel()
        self._attempts.release()

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None


def is_slow(sampler: types_pb2.Sampler) -> bool:
    """Whether a block takes so many passes that a run, which is preempted between blocks, is not in good time."""
    evaluations = 2 if sampler.solver == types_pb2.SOLVER_HEUN else 1
    return sampler.steps * sampler.resamples * evaluations > MANY_PASSES


def context_blocks(positions: int, open_spans: Sequence[Span], block_size: int) -> int:
    """Leading blocks of a canvas without an open position."""
    first_open = min((start for start, _ in open_spans), default=positions)
    return min(first_open, positions) // block_size
