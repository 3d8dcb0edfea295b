"""The two ways OpenAI says the same: chat completions and text completions, whole and in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from colaserve_services.gateway.pieces import PART, Piece, Position, Scored
from colaserve_services.gateway.shapes import (
    AnswerMessage,
    ChatChunkChoice,
    ChatLogprobs,
    CompletionLogprobs,
    Delta,
    Reason,
    TokenLogprob,
    TopLogprob,
    Usage,
)

Json = dict[str, Any]


class Dialect(ABC):
    """Says the choices of one request. `logprobs`: whether they were asked for."""

    prefix: str  # of the answer's id
    whole_object: str
    chunk_object: str

    def __init__(self, request_id: str, model: str, fingerprint: str, logprobs: bool):
        self._logprobs = logprobs
        self._head: Json = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model,
                            "system_fingerprint": fingerprint}  # fmt: skip

    def answer(self, choices: Sequence[Piece], usage: Usage) -> Json:
        """The whole answer."""
        said = [self.choice(index, piece) for index, piece in enumerate(choices)]
        return {**self._head, "object": self.whole_object, "choices": said, "usage": usage}

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> Json:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_object, "choices": list(choices)}

    @abstractmethod
    def choice(self, index: int, piece: Piece) -> Mapping[str, Any]:
        """A whole choice."""

    @abstractmethod
    def opening(self, index: int) -> Mapping[str, Any] | None:
        """What a choice's stream begins with."""

    @abstractmethod
    def deltas(self, index: int, piece: Piece) -> list[Mapping[str, Any]]:
        """What a message adds to a choice's stream."""


class ChatDialect(Dialect):
    """`chat.completion` and `chat.completion.chunk`. An answer's text comes without its first space."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, fingerprint: str, logprobs: bool):
        super().__init__(request_id, model, fingerprint, logprobs)
        self._begun: set[int] = set()  # choices whose first text has come

    def choice(self, index: int, piece: Piece) -> Mapping[str, Any]:
        content = piece.text.removeprefix(" ")
        message: AnswerMessage = {"role": "assistant", "content": content, "refusal": None}
        logprobs = self._said(piece.positions)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def opening(self, index: int) -> Mapping[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""})

    def deltas(self, index: int, piece: Piece) -> list[Mapping[str, Any]]:
        said: list[Mapping[str, Any]] = []
        text = piece.text if index in self._begun else piece.text.removeprefix(" ")
        if piece.text:
            self._begun.add(index)
        if text or piece.positions:
            said.append(self._delta(index, {"content": text}, piece.positions))
        if piece.finish_reason:
            said.append(self._delta(index, {}, ended=piece.finish_reason))
        return said

    def _delta(
        self, index: int, delta: Delta, positions: Sequence[Position] = (), ended: Reason | None = None
    ) -> ChatChunkChoice:
        logprobs = self._said(positions) if positions else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": ended}

    def _said(self, positions: Sequence[Position]) -> ChatLogprobs | None:
        return {"content": [_token_logprob(one) for one in positions], "refusal": None} if self._logprobs else None


def _token_logprob(position: Position) -> TokenLogprob:
    return {**_top_logprob(position.chosen), "top_logprobs": [_top_logprob(one) for one in position.likely]}


def _top_logprob(scored: Scored) -> TopLogprob:
    whole = not scored.text.startswith(PART)
    return {"token": scored.text, "logprob": scored.logprob, "bytes": list(scored.text.encode()) if whole else None}


class CompletionDialect(Dialect):
    """`text_completion`. `echoes`: the prompt that each choice begins with, or empty."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, request_id: str, model: str, fingerprint: str, logprobs: bool, echoes: Sequence[str]):
        super().__init__(request_id, model, fingerprint, logprobs)
        self._echoes = echoes

    def choice(self, index: int, piece: Piece) -> Mapping[str, Any]:
        return self._said(index, self._echoes[index] + piece.text, piece)

    def opening(self, index: int) -> Mapping[str, Any] | None:
        return self._said(index, self._echoes[index], Piece()) if self._echoes[index] else None

    def deltas(self, index: int, piece: Piece) -> list[Mapping[str, Any]]:
        brings = piece.text or piece.positions or piece.finish_reason
        return [self._said(index, piece.text, piece)] if brings else []

    def _said(self, index: int, text: str, piece: Piece) -> Mapping[str, Any]:
        logprobs = _columns(piece.positions) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _columns(positions: Sequence[Position]) -> CompletionLogprobs:
    return {
        "tokens": [position.chosen.text for position in positions],
        "token_logprobs": [position.chosen.logprob for position in positions],
        "top_logprobs": [_by_text(position) for position in positions],
        "text_offset": [position.start for position in positions],
    }


def _by_text(position: Position) -> dict[str, float]:
    return {one.text: one.logprob for one in (*position.likely, position.chosen)}
