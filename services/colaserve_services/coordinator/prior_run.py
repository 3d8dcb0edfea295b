"""One run of the prior, carried from replica to replica: blocks come in order and none is lost or written twice."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from colaserve.v1 import prior_pb2, types_pb2
from colaserve_services.coordinator import checks, rows
from colaserve_services.coordinator.checks import StageFault
from colaserve_services.coordinator.failures import STAGE_ERRORS, Attempts
from colaserve_services.coordinator.stages import Model

Span = tuple[int, int]


class PriorRun:
    """`blocks()` yields each written block. Leaving it cancels the stream in the stage.

    `latents` (float32) are the given positions, `open_spans` those of them that are to be written; leading blocks
    without one are context. When the stream breaks it is opened again with the blocks so far as part of the canvas.
    """

    def __init__(
        self,
        model: Model,
        latents: types_pb2.Latents,
        blocks: int,
        sampler: types_pb2.Sampler,
        seed: types_pb2.NoiseSeed,
        attempts: Attempts,
        open_spans: Sequence[Span] = (),
        on_wait: Callable[[bool], None] = lambda waits: None,
    ):
        self._model, self._attempts = model, attempts
        self._latents, self._open, self._blocks = latents, tuple(open_spans), blocks
        self._sampler, self._seed, self._on_wait = sampler, seed, on_wait
        self.context = context_blocks(rows.count(latents), open_spans, model.block_size)  # blocks
        self._written: list[types_pb2.Latents] = []

    async def blocks(self) -> AsyncGenerator[prior_pb2.SampleResponse, None]:
        """Each written block, in order."""
        while len(self._written) < self._blocks:
            if self._written and self._is_known(len(self._written)):  # a replica would take it for context
                yield self._keep(self._known_block(len(self._written)))
                continue
            try:
                async with aclosing(self._stream()) as stream:
                    async for response in stream:
                        yield self._keep(response)
            except STAGE_ERRORS as error:
                self._on_wait(True)
                await self._attempts.failed(error)

    async def _stream(self) -> AsyncGenerator[prior_pb2.SampleResponse, None]:
        call = self._attempts.stub().Sample(self.request(), timeout=self._attempts.call.left())
        try:
            async for response in call:
                if len(self._written) == self._blocks:  # the run is whole: nothing needs to go on elsewhere
                    self._attempts.fault(StageFault("count", "it sent a block too many"))
                    return
                checks.block(response, len(self._written), self._model, self._attempts.call)
                self._attempts.progressed()
                self._on_wait(False)
                yield response
            if len(self._written) < self._blocks:
                raise StageFault("count", "it ended its stream before the last block")
        finally:
            call.cancel()

    def request(self) -> prior_pb2.SampleRequest:
        """What a replica is asked, given the blocks written so far."""
        done = len(self._written)
        canvas = types_pb2.Canvas(latents=self._canvas())
        border = (self.context + done) * self._model.block_size if done else 0
        for start, end in self._open:
            if end > border:
                canvas.open.add(start=max(start, border), end=end)
        return prior_pb2.SampleRequest(
            canvas=canvas,
            max_blocks=self._blocks - done,
            first_block=done,
            sampler=self._sampler,
            seed=self._seed,
        )

    def _canvas(self) -> types_pb2.Latents:
        if not self._written:
            return self._latents
        size = self._model.block_size
        start, end = self.context * size, (self.context + len(self._written)) * size
        parts = [rows.take(self._latents, 0, start), *self._written]
        parts.append(rows.take(self._latents, end, max(end, rows.count(self._latents))))
        return rows.join(parts, self._model.latent_dim, self._model.space)

    def _is_known(self, index: int) -> bool:
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
        return response


def context_blocks(positions: int, open_spans: Sequence[Span], block_size: int) -> int:
    """Leading blocks of a canvas without an open position."""
    first_open = min((start for start, _ in open_spans), default=positions)
    return min(first_open, positions) // block_size
