"""POST /v1/embeddings: texts as vectors, means of their latents, in OpenAI's shape."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve_services.gateway.answer import CallsAnswer, json_response
from colaserve_services.gateway.backend import Backend, Info
from colaserve_services.gateway.dialects.fields import EndUser, ServedModel, Strict, Text, TokenIds, at_most
from colaserve_services.gateway.edge import record_of
from colaserve_services.gateway.errors import ApiError, api_error, invalid
from colaserve_services.gateway.gateway import checked_model, deadline
from colaserve_services.gateway.openapi import JSON, Endpoint
from colaserve_services.gateway.settings import GatewaySettings

MOST_INPUTS: Final = 2_048
_AT_ONCE: Final = 256  # texts of one call of the coordinator
_POOLING: Final = {"mean": pb.POOLING_MEAN, "last_block": pb.POOLING_LAST_BLOCK}


class EmbeddingsRequest(Strict):
    """POST /v1/embeddings."""

    unions: ClassVar[Mapping[str, str]] = {
        "input": "expected a string, a list of strings, a list of token ids or a list of lists of token ids"
    }

    model: ServedModel = None
    input: (
        Text | Annotated[list[Text], at_most(MOST_INPUTS)] | TokenIds | Annotated[list[TokenIds], at_most(MOST_INPUTS)]
    ) = Field(description="One text or up to 2048, as text or as token ids; none empty.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Lists of numbers, or base64 of little-endian float32; float."
    )
    dimensions: int | None = Field(None, description="Only the model's own number, that of a latent's channels.")
    pooling: Literal["mean", "last_block"] | None = Field(
        None, description="The mean of all latents of a text, or of those of its last block; mean."
    )
    normalize: bool | None = Field(None, description="Scale each vector to length 1; true.")
    user: EndUser | None = Field(None, description="Your end user's id: logged.")


class EmbeddingObject(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsList(TypedDict):
    """The answer to POST /v1/embeddings."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingsUsage


def endpoint(backend: Backend, settings: GatewaySettings) -> Endpoint:
    """The path."""

    async def create_embedding(request: Request, body: EmbeddingsRequest) -> EmbeddingsAnswer:
        """Turn texts into vectors: means of their latents, which say what a text is rather than what it means."""
        info, record = await backend.info(), record_of(request.scope)
        checked_model(body.model, info)
        if body.dimensions not in (None, info.model.latent_dim):
            what = f"got {body.dimensions}, expected {info.model.latent_dim}, the channels of a latent"
            raise invalid("dimensions", what, "unsupported_parameter")
        record.user = body.user or ""
        calls = [partial(backend.messages, "Embed", asked) for asked in _requests(body)]
        until = deadline(request, settings.bounds)
        return EmbeddingsAnswer(backend, settings.bounds, record, until, calls, False, body, info)

    return Endpoint("POST", "/v1/embeddings", create_embedding, EmbeddingsRequest, {JSON: EmbeddingsList})


def _requests(body: EmbeddingsRequest) -> list[pb.EmbedRequest]:
    one = isinstance(body.input, str) or (len(body.input) > 0 and isinstance(body.input[0], int))
    inputs: list[Any] = [body.input] if one else list(body.input)
    for index, each in enumerate(inputs or [[]]):
        if not each:
            where = "input" if one or not inputs else f"input[{index}]"
            raise invalid(where, "is empty, expected a text or token ids")
    made = []
    for start in range(0, len(inputs), _AT_ONCE):
        some = inputs[start : start + _AT_ONCE]
        texts = isinstance(some[0], str)
        what = {"texts": some} if texts else {"sequences": [types_pb2.TokenIds(ids=ids) for ids in some]}
        pooling = _POOLING[body.pooling or "mean"]
        made.append(pb.EmbedRequest(pooling=pooling, normalize=body.normalize is not False, **what))
    return made


@dataclass
class EmbeddingsAnswer(CallsAnswer):
    """The vectors of the texts of several calls, in their order."""

    body: EmbeddingsRequest
    info: Info
    found: dict[int, list[pb.Embedding]] = field(default_factory=dict)  # by call

    async def take(self, index: int, message: pb.EmbedResponse) -> Iterable[bytes]:
        self.found[index] = list(message.embeddings)
        return ()

    async def whole(self) -> Response:
        embeddings = [each for index in sorted(self.found) for each in self.found[index]]
        used = self.record.prompt_tokens = sum(each.token_count for each in embeddings)
        answer: EmbeddingsList = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._vector(each.values.data)}
                for index, each in enumerate(embeddings)
            ],
            "model": self.info.model_name,
            "usage": {"prompt_tokens": used, "total_tokens": used},
        }
        return json_response(answer)

    def _vector(self, data: bytes) -> list[float] | str:
        if self.body.encoding_format == "base64":
            return base64.b64encode(data).decode()
        numbers: list[float] = np.frombuffer(data, "<f4").tolist()
        return numbers

    def error(self, error: Exception) -> ApiError:
        return api_error(error, {"texts": "input", "sequences": "input"})
