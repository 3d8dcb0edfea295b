"""Log-probabilities as JSON."""

from collections.abc import Iterable, Sequence
from typing import Final

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_client.arrays import shortest
from colaserve_services.gateway.backend import INCOMPLETE

LOWEST: Final = -9999.0  # stands for minus infinity, which JSON has not


class TopLogprob(TypedDict):
    """A likely token at a position. `bytes` is null where the token is no whole text by itself."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A written token."""

    top_logprobs: list[TopLogprob]


def positions_of(message: GenerateResponse) -> list[TokenLogprob]:
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
