"""Generations as OpenAI's JSON: chat completions and text completions, whole and in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_client.arrays import shortest
from colaserve_services.gateway.backend import INCOMPLETE
from colaserve_services.gateway.shapes import (
    AnswerMessage,
    ChatLogprobs,
    CompletionLogprobs,
    Reason,
    TokenLogprob,
    TopLogprob,
    Usage,
)

LOWEST: Final = -9999.0  # stands for minus infinity, which JSON has not
REASONS: Final[Mapping[int, Reason]] = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
}


class Dialect(ABC):
    """The JSON of one request's choices; each choice's messages come in order. `logprobs`: whether the client asked for
    log-probabilities."""

    prefix: str  # of the answer's id
    whole_object: str
    chunk_object: str

    def __init__(self, request_id: str, model: str, fingerprint: str, logprobs: bool):
        self._logprobs = logprobs
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model,
                      "system_fingerprint": fingerprint}  # fmt: skip

    def answer(self, choices: Sequence[GenerateResponse], usage: Usage) -> dict[str, Any]:
        """The whole answer."""
        each = [self.choice(index, message) for index, message in enumerate(choices)]
        return {**self._head, "object": self.whole_object, "choices": each, "usage": usage}

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_object, "choices": list(choices)}

    @abstractmethod
    def choice(self, index: int, message: GenerateResponse) -> Mapping[str, Any]:
        """A choice of a whole answer."""

    @abstractmethod
    def deltas(self, index: int, message: GenerateResponse) -> Iterator[Mapping[str, Any]]:
        """What a message adds to a choice's stream."""


class ChatDialect(Dialect):
    """`chat.completion` and `chat.completion.chunk`. An answer's text comes without its first space."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, fingerprint: str, logprobs: bool):
        super().__init__(request_id, model, fingerprint, logprobs)
        self._opened: set[int] = set()  # choices that have their first chunk
        self._begun: set[int] = set()  # choices that have text

    def choice(self, index: int, message: GenerateResponse) -> Mapping[str, Any]:
        answer: AnswerMessage = {"role": "assistant", "content": message.text.removeprefix(" "), "refusal": None}
        logprobs = _chat_logprobs(_positions(message)) if self._logprobs else None
        reason = REASONS[message.finish_reason]
        return {"index": index, "message": answer, "logprobs": logprobs, "finish_reason": reason}

    def deltas(self, index: int, message: GenerateResponse) -> Iterator[Mapping[str, Any]]:
        if index not in self._opened:
            self._opened.add(index)
            yield self._delta(index, {"role": "assistant", "content": ""})
        text = message.text if index in self._begun else message.text.removeprefix(" ")
        if message.text:
            self._begun.add(index)
        positions = _positions(message)
        if text or positions:
            yield self._delta(index, {"content": text}, positions)
        if reason := REASONS.get(message.finish_reason):
            yield self._delta(index, {}, reason=reason)

    def _delta(
        self,
        index: int,
        delta: Mapping[str, str],
        positions: Sequence[TokenLogprob] = (),
        reason: Reason | None = None,
    ) -> Mapping[str, Any]:
        logprobs = _chat_logprobs(positions) if self._logprobs and positions else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class CompletionDialect(Dialect):
    """`text_completion`. `echoes`: the prompt that each choice begins with, or empty."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, request_id: str, model: str, fingerprint: str, logprobs: bool, echoes: Sequence[str]):
        super().__init__(request_id, model, fingerprint, logprobs)
        self._echoes = list(echoes)

    def choice(self, index: int, message: GenerateResponse) -> Mapping[str, Any]:
        return self._choice(index, self._echoes[index] + message.text, message)

    def deltas(self, index: int, message: GenerateResponse) -> Iterator[Mapping[str, Any]]:
        if self._echoes[index]:
            yield self._choice(index, self._echoes[index], GenerateResponse())
            self._echoes[index] = ""
        if message.text or message.logprobs or message.finish_reason:
            yield self._choice(index, message.text, message)

    def _choice(self, index: int, text: str, message: GenerateResponse) -> Mapping[str, Any]:
        logprobs = _completion_logprobs(message) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": REASONS.get(message.finish_reason)}


def _chat_logprobs(positions: Sequence[TokenLogprob]) -> ChatLogprobs:
    return {"content": list(positions), "refusal": None}


def _completion_logprobs(message: GenerateResponse) -> CompletionLogprobs:
    positions = _positions(message)
    return {
        "tokens": [one["token"] for one in positions],
        "token_logprobs": [one["logprob"] for one in positions],
        "top_logprobs": [
            {token["token"]: token["logprob"] for token in (*one["top_logprobs"], one)} for one in positions
        ],
        "text_offset": list(message.text_offsets),
    }


def _positions(message: GenerateResponse) -> list[TokenLogprob]:
    """The written tokens, if they have log-probabilities, with the likely ones beside each."""
    if not message.logprobs:
        return []
    tops: Sequence[types_pb2.TopLogprobs] = message.top_logprobs
    beside = [_tokens(top.token_ids, top.tokens, top.logprobs) for top in tops] or [[] for _ in message.token_ids]
    chosen = _tokens(message.token_ids, message.tokens, message.logprobs)
    return [{**one, "top_logprobs": likely} for one, likely in zip(chosen, beside, strict=True)]


def _tokens(ids: Iterable[int], texts: Iterable[str], logprobs: Iterable[float]) -> list[TopLogprob]:
    rows = zip(ids, texts, logprobs, strict=True)
    return [_token(id_, text, max(shortest(logprob), LOWEST)) for id_, text, logprob in rows]


def _token(id_: int, text: str, logprob: float) -> TopLogprob:
    """One that holds a part of a character is called token_id:N, since its bytes are no text and others would read the
    same."""
    if INCOMPLETE in text:
        return {"token": f"token_id:{id_}", "logprob": logprob, "bytes": None}
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
