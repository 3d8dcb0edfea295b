"""Typed choice: which of the given texts the written latents read as best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from colaserve.v1 import decoder_pb2, generation_pb2
from colaserve_services.coordinator.context import ServiceContext
from colaserve_services.coordinator.latent_space import check_lookup, tokenize_whole
from colaserve_services.coordinator.writer import STOP, Piece, Writer
from colaserve_services.errors import InvalidRequest
from colaserve_services.text import Detokenizer

MOST: Final = 64
GREEDY: Final = {"temperature": 0.0, "repetition_penalty": 1.0}  # nothing is drawn
_BESIDE: Final = ("stop", "top_logprobs", "ignore_end", "print_special")  # mean nothing beside choices


@dataclass(frozen=True)
class Choices:
    """The texts, their ids, and the request to the decoder for the log-probabilities of all these ids."""

    texts: Sequence[str] = ()
    ids: Sequence[Sequence[int]] = ()
    lookup: decoder_pb2.OpenDecode = field(default_factory=decoder_pb2.OpenDecode)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(map(len, self.ids), default=0)


async def read_choices(services: ServiceContext, request: generation_pb2.GenerateRequest) -> Choices:
    """Those of a request. Raises InvalidRequest naming what cannot be honoured, or cannot beside choices."""
    texts = list(request.choices)
    if not texts:
        return Choices()
    if not 2 <= len(texts) <= MOST:
        raise InvalidRequest("choices", f"got {len(texts)} texts, expected 2 to {MOST}")
    for index, text in enumerate(texts):
        if (first := texts.index(text)) < index:
            raise InvalidRequest(f"choices[{index}]", f"got the same text as choices[{first}], expected another")
    given = {each.name for each, _ in request.ListFields()}
    for name in _BESIDE:
        if name in given:
            raise InvalidRequest(name, "not together with choices")
    for name, value in GREEDY.items():
        if request.sampling.HasField(name) and getattr(request.sampling, name) != value:
            raise InvalidRequest(f"sampling.{name}", f"expected {value:g} or none beside choices: nothing is drawn")
    ids = await tokenize_whole(services, texts, [f"choices[{index}]" for index in range(len(texts))])
    if request.HasField("max_new_tokens"):
        for index, each in enumerate(ids):
            if len(each) > request.max_new_tokens:
                what = f"has {len(each)} tokens, at most max_new_tokens ({request.max_new_tokens}) are allowed"
                raise InvalidRequest(f"choices[{index}]", what)
    lookup = decoder_pb2.OpenDecode(logprob_ids=sorted({id_ for each in ids for id_ in each}))
    check_lookup(services.model, lookup, "choices", 1, element_bytes=4)
    return Choices(texts, ids, lookup)


class Chooser(Writer):
    """Takes as many blocks as the longest choice needs; the last piece is the best choice."""

    def __init__(self, choices: Choices, detokenizer: Callable[[], Detokenizer], redecoded: int, before: int | None):
        super().__init__(detokenizer(), (), frozenset(), choices.longest, redecoded, before=before)
        self._choices, self._fresh, self._skipped, self._prompt_end = choices, detokenizer, redecoded, before
        self._logprobs: list[list[float]] = [[] for _ in choices.ids]  # of each choice's tokens so far
        looked_up = np.array(choices.lookup.logprob_ids)
        self._columns = [np.searchsorted(looked_up, ids) for ids in choices.ids]

    def read(self, decoded: decoder_pb2.DecodeResponse) -> Piece:
        self.append(decoded.token_ids)  # it counts, and previews go on from here
        self.sent = 0
        found = decoded.position_logprobs
        values = np.frombuffer(found.data, "<f4").reshape(tuple(found.shape))[self._skipped :]
        self._skipped = 0
        for columns, logprobs in zip(self._columns, self._logprobs, strict=True):
            own = columns[len(logprobs) : len(logprobs) + len(values)]
            logprobs += values[range(len(own)), own].tolist()  # no more is kept: a row has a column for each id
        return self._best() if self.finish_reason else Piece()

    def _best(self) -> Piece:
        each = self._logprobs
        totals = [math.fsum(logprobs) for logprobs in each]
        for text, logprobs, total in zip(self._choices.texts, each, totals, strict=True):
            self.scores.append(generation_pb2.ChoiceScore(text=text, token_count=len(logprobs), logprob=total))
        best = totals.index(max(totals))
        writer = Writer(self._fresh(), (), frozenset(), len(each[best]), 0, before=self._prompt_end)
        piece = writer.append(self._choices.ids[best], each[best])
        self.sent, self.finish_reason = writer.sent, STOP
        return piece
