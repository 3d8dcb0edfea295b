"""What all of the coordinator's calls share: the connected stages, the tokenizer, the defaults, the queue."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from colaserve.v1 import encoder_pb2, types_pb2
from colaserve_services.coordinator import checks, rows
from colaserve_services.coordinator.admission import Admission, Ticket
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.defaults import Defaults
from colaserve_services.coordinator.failures import Attempts
from colaserve_services.coordinator.limits import CoordinatorLimits
from colaserve_services.coordinator.pool import Pool
from colaserve_services.coordinator.stages import Model
from colaserve_services.errors import InvalidRequest
from colaserve_services.offload import offload
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.text import Tokenizer

SIDE_BY_SIDE: Final = 8  # runs of one call at once
ENCODED_AT_ONCE: Final = 16  # sequences of one call at once
LONG_TEXT: Final = 16_384  # characters; more than that are tokenized off the event loop

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceContext:
    """Made when the stages are connected; every call works with one."""

    pools: Mapping[str, Pool]
    model: Model
    tokenizer: Tokenizer
    defaults: Defaults
    limits: CoordinatorLimits
    metrics: Metrics
    admission: Admission
    model_name: str = ""

    @property
    def most_tokens(self) -> int:
        """Tokens that fill the longest context."""
        return self.model.max_context * self.model.patch_size

    async def tokenize(self, text: str, field: str) -> Sequence[int]:
        """Ids of a text. Raises InvalidRequest for one whose length alone shows that it cannot fit."""
        [ids] = await self.tokenize_all([text], [field])
        return ids

    async def tokenize_all(self, texts: Sequence[str], fields: Sequence[str]) -> list[Sequence[int]]:
        """Ids of texts, as `tokenize`, however long they are together."""
        for text, field in zip(texts, fields, strict=True):
            if (fewest := self.tokenizer.fewest_tokens(text)) > self.most_tokens:
                raise InvalidRequest(
                    field, f"has {fewest} tokens or more, at most {self.most_tokens} fit (max_context)"
                )
        if sum(map(len, texts)) < LONG_TEXT:
            return self.tokenizer.encode_all(texts, fields)
        return await offload(self.tokenizer.encode_all, texts, fields)

    def checked(self, ids: Sequence[int], field: str) -> Sequence[int]:
        """The ids, not too many and each inside the vocabulary; else InvalidRequest."""
        if len(ids) > self.most_tokens:
            raise InvalidRequest(field, f"got {len(ids)} ids, at most {self.most_tokens} fit (max_context)")
        return self.tokenizer.checked(ids, field)

    async def encode(
        self, sequences: Sequence[Sequence[int]], call: Call, with_variance: bool = False
    ) -> encoder_pb2.EncodeResponse:
        """The encodings of all sequences."""
        whole = encoder_pb2.EncodeResponse()
        async with aclosing(self.encoded(sequences, call, with_variance)) as parts:
            async for part in parts:
                whole.encodings.extend(part.encodings)
                add_timing(whole.timing, part.timing)
        return whole

    async def encoded(
        self, sequences: Sequence[Sequence[int]], call: Call, with_variance: bool = False
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse, None]:
        """The same a few sequences at a time, so that one call does not keep the encoder to itself."""
        with Attempts(self, Ticket(call, "encoder", max(map(len, sequences)))) as attempts:
            for start in range(0, len(sequences), ENCODED_AT_ONCE):
                some = sequences[start : start + ENCODED_AT_ONCE]
                ids = [types_pb2.TokenIds(ids=sequence) for sequence in some]
                request = encoder_pb2.EncodeRequest(sequences=ids, with_variance=with_variance, cache_salt=call.salt)
                check = partial(checks.encodings, sequences=some, with_variance=with_variance, model=self.model)
                yield await attempts.answer("Encode", request, check)

    def no_latents(self) -> types_pb2.Latents:
        """Latents of no position."""
        return rows.of(b"", self.model.latent_dim, self.model.space)


def add_timing(total: types_pb2.Timing, *parts: types_pb2.Timing) -> types_pb2.Timing:
    """Add the parts to `total` and return it."""
    for part in parts:
        total.queue_us += part.queue_us
        total.compute_us += part.compute_us
    return total


async def side_by_side(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order, a few at work at once; the first failure ends the others and is raised."""
    slots = asyncio.Semaphore(SIDE_BY_SIDE)

    async def run(work: Coroutine[Any, Any, T]) -> T:
        async with slots:
            return await work

    tasks = [asyncio.create_task(run(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for work in works:
            work.close()
