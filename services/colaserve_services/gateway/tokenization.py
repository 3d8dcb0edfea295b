"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter

from colaserve_services.gateway import shapes
from colaserve_services.gateway.backend import Info, most_tokens
from colaserve_services.gateway.body import CheckedRoute
from colaserve_services.gateway.errors import invalid
from colaserve_services.gateway.gateway import Gateway
from colaserve_services.gateway.prompting import chat_prompt
from colaserve_services.gateway.routes import ERRORS
from colaserve_services.gateway.schemas import DetokenizeRequest, TokenizeRequest


def tokenization_routes(gateway: Gateway) -> APIRouter:
    """Both."""
    router = APIRouter(tags=["tokenizer"], responses=ERRORS, route_class=CheckedRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> shapes.Tokenized:
        """Token ids of a prompt, or of messages as a chat would frame them."""
        gateway.check_extras(body)
        info = await gateway.backend.info()
        gateway.check_model(body.model, info)
        got = await gateway.backend.tokenize(_text(body, info))
        return {
            "count": len(got.token_ids),
            "max_model_len": most_tokens(info),
            "tokens": list(got.token_ids),
            "token_strs": list(got.tokens) if body.return_token_strs else None,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> shapes.Detokenized:
        """Text of token ids."""
        gateway.check_extras(body)
        gateway.check_model(body.model, await gateway.backend.info())
        return {"prompt": await gateway.backend.detokenize(body.tokens)}

    return router


def _text(body: TokenizeRequest, info: Info) -> str:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    return chat_prompt(body.messages, info.chat_frame) if body.messages is not None else body.prompt or ""
