"""POST /tokenize and /detokenize: what they take and answer, as vLLM has them."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from colaserve_services.gateway.dialects.chat import Message
from colaserve_services.gateway.dialects.fields import MOST_MESSAGES, Strict, Text, TokenIds, at_most


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or messages as a chat would frame them."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], at_most(MOST_MESSAGES)] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="The model has no start token: both values say the same.")
    add_generation_prompt: Literal[True] | None = Field(None, description="Chats always end where the answer begins.")
    return_token_strs: bool | None = Field(None, description="Return each token's text too.")


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str
