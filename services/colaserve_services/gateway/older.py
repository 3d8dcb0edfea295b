"""What a coordinator of an earlier version leaves unset, asked for: while versions change, both are there."""

from __future__ import annotations

from dataclasses import dataclass, field

from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_services.gateway.backend import Backend
from colaserve_services.gateway.dialects import INCOMPLETE


@dataclass
class Texts:
    """The texts of one generation's tokens, and where they begin in its text."""

    backend: Backend
    _at: int = 0  # characters before the next token
    _parts: list[int] = field(default_factory=list)  # tokens that hold parts of a character, since the last whole one

    async def fill_in(self, message: GenerateResponse) -> None:
        """Add to log-probabilities what belongs beside them, unless the message has it."""
        if not message.logprobs or message.tokens:
            return
        ids = {*message.token_ids, *(id_ for top in message.top_logprobs for id_ in top.token_ids)}
        texts = await self.backend.token_texts(sorted(ids))
        for top in message.top_logprobs:
            top.tokens.extend(texts[id_] for id_ in top.token_ids)
        message.tokens.extend(texts[id_] for id_ in message.token_ids)
        for id_ in message.token_ids:
            message.text_offsets.append(await self._next(id_, texts[id_]))

    async def _next(self, token: int, text: str) -> int:
        """Where the next token begins. A part of a character begins where that does."""
        if INCOMPLETE in text:
            self._parts.append(token)
            return self._at
        if self._parts:
            self._at += len((await self.backend.detokenize(self._parts)).text)
            self._parts.clear()
        start, self._at = self._at, self._at + len(text)
        return start
