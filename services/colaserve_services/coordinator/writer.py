"""From sampled ids to what the caller gets: the prompt's tail dropped, the end found, the budget kept."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from colaserve.v1 import decoder_pb2, generation_pb2, types_pb2
from colaserve_services.text import Detokenizer, StopStrings

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH


@dataclass(frozen=True)
class Token:
    """An id, its log-probability, the most likely ids beside it, the id before it (None: it is the first), and the
    length of the text before it and up to and with it."""

    id: int
    logprob: float
    top: Any
    before: int | None
    text_start: int
    text_end: int


@dataclass
class Piece:
    """What one block adds."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)


class Writer:
    """Takes blocks of ids until `finish_reason` says why the text has ended. `unprinted` ids have no text."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        end_ids: frozenset[int],
        budget: int,
        redecoded: int,
        unprinted: frozenset[int] = frozenset(),
        before: int | None = None,
    ):
        self._detokenizer, self._stops = detokenizer, StopStrings(stops)
        self._end_ids, self._budget, self._skip = end_ids, budget, redecoded
        self._unprinted, self._before = unprinted, before
        self._held: deque[Token] = deque()  # not sent: a stop string may still end the text before them
        self._seen = 0  # new ids taken in
        self._text_length, self._sent_end = 0, 0  # characters taken in; those up to the last token sent
        self.sent = 0
        self.scores: list[generation_pb2.ChoiceScore] = []  # of choices
        self.finish_reason: Any = types_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text; empty: none did."""
        return self._stops.hit.stop if self._stops.hit else ""

    def read(self, decoded: decoder_pb2.DecodeResponse) -> Piece:
        """As `append`, of a decoder's answer."""
        return self.append(decoded.token_ids, decoded.logprobs, decoded.top_logprobs)

    def append(self, ids: Sequence[int], logprobs: Sequence[float] = (), tops: Sequence[Any] = ()) -> Piece:
        """Take a block's ids, untrimmed; return what is certain now. In the last block: all the rest."""
        skip, self._skip = min(self._skip, len(ids)), max(self._skip - len(ids), 0)
        piece = Piece()
        for index in range(skip, len(ids)):
            if ids[index] in self._end_ids:
                self._finish(piece, STOP)
                break
            piece.text += self._take(ids[index], logprobs[index] if logprobs else 0.0, tops[index] if tops else None)
            if self._stops.ended or self._seen == self._budget:
                self._finish(piece, LENGTH)
                break
        piece.tokens = self._release()
        return piece

    def preview(self, ids: Sequence[int]) -> str:
        """What the text would go on with after all that `append` has returned, if these were the next block's ids. It
        takes nothing in, and looks for no stop string."""
        new = [*takewhile(lambda id_: id_ not in self._end_ids, ids[self._skip :])][: self._budget - self._seen]
        return self._stops.held + self._detokenizer.peek([id_ for id_ in new if id_ not in self._unprinted])

    def _take(self, id_: int, logprob: float, top: Any) -> str:
        text = "" if id_ in self._unprinted else self._detokenizer.push(id_)
        start = self._text_length
        self._seen += 1
        self._text_length += len(text)
        self._held.append(Token(id_, logprob, top, self._before, start, self._text_length))
        self._before = id_
        return self._stops.push(text)

    def _finish(self, piece: Piece, reason: Any) -> None:
        """A stop string found in the text wins over the reason."""
        rest = self._detokenizer.flush()
        if rest and self._held:
            self._text_length += len(rest)
            self._held[-1] = replace(self._held[-1], text_end=self._text_length)
        piece.text += self._stops.push(rest) + self._stops.flush()
        self.finish_reason = STOP if self._stops.hit else reason

    def _release(self) -> list[Token]:
        """The held tokens; of a text that a stop string ends, those up to and with the one that completes it."""
        out, hit = [], self._stops.hit
        while self._held and (hit is None or self._sent_end < hit.end):
            out.append(self._held.popleft())
            self._sent_end = out[-1].text_end
        self.sent += len(out)
        return out
