"""One run of the decoder, carried from replica to replica: the ids are those of the undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc

from colaserve.v1 import decoder_pb2, types_pb2
from colaserve_services.coordinator import checks, rows
from colaserve_services.coordinator.checks import StageFault
from colaserve_services.coordinator.failures import STAGE_ERRORS, Attempts
from colaserve_services.coordinator.stages import Model


class DecoderRun:
    """`async with DecoderRun(...) as decoder: await decoder.decode(latents)`; leaving frees the stage's session.

    The stream is opened with the first block. When it breaks it is opened again with the latents and ids so far, and
    the block is sent once more.
    """

    def __init__(
        self,
        model: Model,
        prefix: types_pb2.Latents,
        blocks: int,
        sampling: types_pb2.Sampling,
        attempts: Attempts,
        top_logprobs: int = 0,
        target_ids: Sequence[int] = (),
    ):
        self._model, self._attempts = model, attempts
        self._latents = [prefix]
        self._sampling, self._top, self._targets = sampling, top_logprobs, list(target_ids)
        self._max_latents = rows.count(prefix) + blocks * model.block_size
        self._ids: list[int] = []  # sampled so far, untrimmed
        self._call: Any = None
        self._decoding = self._let_go = False

    async def __aenter__(self) -> DecoderRun:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def decode(self, latents: types_pb2.Latents) -> decoder_pb2.DecodeResponse:
        """The ids of the next block, B * P of them."""
        self._decoding = True
        try:
            response = await self._answered(latents)
        finally:
            self._decoding = False
        self._latents.append(latents)
        self._ids += response.token_ids
        if self._let_go:
            self._close()
        return response

    def prior_waits(self, waits: bool) -> None:
        """While the run's prior waits for a replica, free the stage's session after every block, the next opens one.

        Who waits for a prior holds no decoder: calls that hold all of one and wait for the other would wait for ever.
        """
        self._let_go = waits
        if waits and not self._decoding:
            self._close()

    async def _answered(self, latents: types_pb2.Latents) -> decoder_pb2.DecodeResponse:
        while True:
            try:
                response = await self._exchange(latents)
            except STAGE_ERRORS as error:
                self._close()
                await self._attempts.failed(error)
            else:
                self._attempts.progressed()
                return response

    def request(self) -> decoder_pb2.OpenDecode:
        """What a replica is asked, given the blocks decoded so far."""
        return decoder_pb2.OpenDecode(
            prefix=rows.join(self._latents, self._model.latent_dim, self._model.space),
            sampling=self._sampling,
            history_ids=self._ids,
            top_logprobs=self._top,
            target_ids=self._targets[len(self._ids) :],
            max_latents=self._max_latents,
        )

    async def _exchange(self, latents: types_pb2.Latents) -> decoder_pb2.DecodeResponse:
        try:
            if self._call is None:
                await self._open()
            await self._call.write(decoder_pb2.DecodeRequest(block=latents))
        except asyncio.InvalidStateError as error:  # it ended before: read tells how
            await self._read_end(error)
        response = await self._call.read()
        if response is grpc.aio.EOF:
            raise StageFault("count", "it ended its stream before the last block")
        self._check(response)
        return response

    async def _open(self) -> None:
        self._call = self._attempts.stub().Decode(timeout=self._attempts.call.left())
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

    def _close(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None
