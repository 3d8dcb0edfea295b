"""A message of a generation in the terms of this API: text, tokens with log-probabilities, why it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_client.arrays import shortest
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


def piece_of(message: GenerateResponse) -> Piece:
    """A message in this API's terms."""
    usage = message.usage
    return Piece(
        message.text,
        _positions(message) if message.logprobs else (),
        _REASONS.get(message.finish_reason),
        usage.prompt_tokens,
        usage.completion_tokens,
    )


def _positions(message: GenerateResponse) -> tuple[Position, ...]:
    tops: Sequence[types_pb2.TopLogprobs] = message.top_logprobs
    beside = [_scored(top.token_ids, top.tokens, top.logprobs) for top in tops] or [()] * len(message.token_ids)
    chosen = _scored(message.token_ids, message.tokens, message.logprobs)
    return tuple(Position(*columns) for columns in zip(chosen, message.text_offsets, beside, strict=True))


def _scored(ids: Iterable[int], texts: Iterable[str], logprobs: Iterable[float]) -> tuple[Scored, ...]:
    rows = zip(ids, texts, logprobs, strict=True)
    return tuple(Scored(_name(token, text), max(shortest(value), LOWEST)) for token, text, value in rows)


def _name(token: int, text: str) -> str:
    """The text of a token. One that holds a part of a character reads "token_id:N", since its bytes are no text and
    others would read the same."""
    return f"{PART}{token}" if INCOMPLETE in text else text
