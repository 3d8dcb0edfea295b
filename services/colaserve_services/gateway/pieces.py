"""A message of a generation in the terms of this API: text, tokens with log-probabilities, why it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_services.gateway.backend import Backend
from colaserve_services.gateway.shapes import Reason

INCOMPLETE: Final = "\ufffd"
PART: Final = "token_id:"  # begins the name of a token that is no text by itself
LOWEST: Final = -9999.0  # stands for minus infinity, which JSON has not
_REASONS: Final[dict[int, Reason]] = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True)
class Scored:
    """A token: its text and log-probability."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Position:
    """A written token, where it begins in the text (in characters), and the likely ones beside it, best first."""

    chosen: Scored
    start: int
    likely: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one message, or a whole generation, brought."""

    text: str = ""
    positions: tuple[Position, ...] = ()
    finish_reason: Reason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


def joined(pieces: Iterable[Piece]) -> Piece:
    """The pieces of one generation, in order, as one."""
    parts = list(pieces)
    last = parts[-1] if parts else Piece()
    positions = tuple(position for piece in parts for position in piece.positions)
    text = "".join(piece.text for piece in parts)
    return Piece(text, positions, last.finish_reason, last.prompt_tokens, last.completion_tokens)


class TokenTexts:
    """Text of token ids, asked for once each: at most a vocabulary's worth is kept.

    A token that holds a part of a character reads "token_id:N", since its bytes are no text and others would read
    the same.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        self._texts: dict[int, str] = {}

    async def learn(self, ids: Iterable[int]) -> None:
        missing = sorted({token for token in ids if token not in self._texts})
        for token, text in zip(missing, await self._backend.token_texts(missing), strict=True):
            self._texts[token] = f"{PART}{token}" if INCOMPLETE in text else text

    async def length(self, ids: Sequence[int]) -> int:
        """Characters of tokens that hold parts of them."""
        return len(await self._backend.detokenize(ids))

    def __getitem__(self, token: int) -> str:
        return self._texts[token]


class Offsets:
    """Where the tokens of one generation begin in its text. A part of a character begins where the character does."""

    def __init__(self) -> None:
        self._at = 0
        self._parts: list[int] = []  # read since the last whole token

    async def next(self, token: int, texts: TokenTexts) -> int:
        """The place of the next token."""
        text = texts[token]
        if text.startswith(PART):
            self._parts.append(token)
            return self._at
        if self._parts:
            self._at += await texts.length(self._parts)
            self._parts.clear()
        start, self._at = self._at, self._at + len(text)
        return start


async def piece_of(message: GenerateResponse, texts: TokenTexts, offsets: Offsets) -> Piece:
    """A message in this API's terms; token texts are looked up only where there are log-probabilities."""
    usage = message.usage
    return Piece(
        message.text,
        await _positions(message, texts, offsets) if message.logprobs else (),
        _REASONS.get(message.finish_reason),
        usage.prompt_tokens,
        usage.completion_tokens,
    )


async def _positions(message: GenerateResponse, texts: TokenTexts, offsets: Offsets) -> tuple[Position, ...]:
    likely_ids = [token for top in message.top_logprobs for token in top.token_ids]
    await texts.learn([*message.token_ids, *likely_ids])
    tops: Sequence[types_pb2.TopLogprobs] = message.top_logprobs
    beside = [_scored(top.token_ids, top.logprobs, texts) for top in tops] or [()] * len(message.token_ids)
    chosen = _scored(message.token_ids, message.logprobs, texts)
    starts = [await offsets.next(token, texts) for token in message.token_ids]
    return tuple(Position(*columns) for columns in zip(chosen, starts, beside, strict=True))


def _scored(ids: Iterable[int], logprobs: Iterable[float], texts: TokenTexts) -> tuple[Scored, ...]:
    return tuple(Scored(texts[token], max(value, LOWEST)) for token, value in zip(ids, logprobs, strict=True))
