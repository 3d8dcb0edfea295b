"""The endpoints. Each says what it takes and gives for the OpenAPI document, and delegates."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Request
from fastapi.responses import HTMLResponse, Response
from google.protobuf.json_format import MessageToDict
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json

from colaserve_services.gateway import shapes
from colaserve_services.gateway.answer import Answer
from colaserve_services.gateway.backend import Info, most_tokens
from colaserve_services.gateway.body import CheckedRoute
from colaserve_services.gateway.docs_page import docs_page, root_page
from colaserve_services.gateway.gateway import Gateway
from colaserve_services.gateway.record import record_of
from colaserve_services.gateway.schemas import DEADLINE_HEADER, ChatRequest, CompletionRequest
from colaserve_services.offload import offload
from colaserve_services.rpc.kept import Kept
from colaserve_services.rpc.metrics import KEPT_SECONDS, Metrics, exposition

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": shapes.ErrorAnswer, "description": "A field is wrong or cannot be honoured; `param` names it."},
    401: {"model": shapes.ErrorAnswer, "description": "No key, or an unknown one."},
    404: {"model": shapes.ErrorAnswer, "description": "Another model than the served one."},
    413: {"model": shapes.ErrorAnswer, "description": "The body is too long."},
    429: {"model": shapes.ErrorAnswer, "description": "Busy, or over a limit of the key; see Retry-After."},
    503: {"model": shapes.ErrorAnswer, "description": "Down or going down; a retry may succeed."},
    504: {"model": shapes.ErrorAnswer, "description": "The deadline passed."},
    "default": {"model": shapes.ErrorAnswer, "description": "Anything else that goes wrong."},
}
_LINKS: Final = {
    "docs": "every endpoint and field",
    "v1/models": "the served model and its defaults",
    "health": "whether the process lives",
    "ready": "whether requests should come here",
    "metrics": "Prometheus metrics",
}
_EVENTS: Final = {"text/event-stream": {"schema": {"type": "string"}}}

Seconds = Annotated[
    float | None,
    Header(alias=DEADLINE_HEADER, gt=0, allow_inf_nan=False, include_in_schema=False),
]  # not in the document, since OpenAI's clients know no such header; docs/gateway.md has it


def generation_routes(gateway: Gateway) -> APIRouter:
    """POST /v1/chat/completions and /v1/completions."""
    router = APIRouter(tags=["generation"], route_class=CheckedRoute)

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses={**ERRORS, 200: {"model": shapes.ChatCompletion, "content": _EVENTS, "description": "The answer."}},
    )
    async def create_chat_completion(body: ChatRequest, request: Request, seconds: Seconds = None) -> Answer:
        """Answer a chat. With `stream`, server-sent events of `chat.completion.chunk` objects."""
        return await gateway.chat(body, record_of(request.scope), seconds)

    @router.post(
        "/v1/completions",
        response_model=None,
        responses={**ERRORS, 200: {"model": shapes.Completion, "content": _EVENTS, "description": "The texts."}},
    )
    async def create_completion(body: CompletionRequest, request: Request, seconds: Seconds = None) -> Answer:
        """Continue one or several prompts. With `stream`, server-sent events of `text_completion` objects."""
        return await gateway.complete(body, record_of(request.scope), seconds)

    return router


def model_routes(gateway: Gateway) -> APIRouter:
    """GET /v1/models and one of them."""
    router = APIRouter(tags=["models"], responses=ERRORS)

    def model(info: Info) -> shapes.Model:
        return {
            "id": info.model_name,
            "object": "model",
            "created": gateway.started,
            "owned_by": "colaserve",
            "max_model_len": most_tokens(info),
            "defaults": _defaults(info),
        }

    @router.get("/v1/models")
    async def list_models() -> shapes.ModelList:
        """The served model, with what unset fields of a request mean."""
        return {"object": "list", "data": [model(await gateway.backend.info())]}

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> shapes.Model:
        """The served model, or 404."""
        info = await gateway.backend.info()
        gateway.check_model(model_id, info)
        return model(info)

    return router


def _defaults(info: Info) -> dict[str, Any]:
    sampler = MessageToDict(info.default_sampler, preserving_proto_field_name=True)
    sampling = MessageToDict(info.default_sampling, preserving_proto_field_name=True)
    if "solver" in sampler:
        sampler["solver"] = sampler["solver"].removeprefix("SOLVER_").lower()
    if "guidance_start" in sampler and "guidance_end" in sampler:
        sampler["guidance_interval"] = [sampler["guidance_start"], sampler["guidance_end"]]
    return {"max_tokens": info.default_max_new_tokens, **sampler, **sampling}


def system_routes(gateway: Gateway, metrics: Metrics) -> APIRouter:
    """What operators and curious people ask for."""
    router = APIRouter(tags=["system"])
    text = Kept(lambda: offload(exposition, metrics.registry), KEPT_SECONDS)

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> shapes.Health:
        """The process lives. Says nothing about load or about the coordinator."""
        return {"status": "ok"}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", response_model=None, responses={200: {"model": shapes.Health}, 503: {"model": shapes.Health}})
    async def ready() -> Response:
        """Whether requests should come here: 200, or 503 while the gateway goes down or a stage is away."""
        reason = await gateway.not_ready()
        body: shapes.Health = {"status": "not ready", "reason": reason} if reason else {"status": "ok"}
        return _json(body, 503 if reason else 200)

    @router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Prometheus metrics of this process."""
        return Response(await text.get(), media_type=CONTENT_TYPE_LATEST)

    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(root_page(_LINKS))

    @router.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(docs_page(request.app.openapi()))

    return router


def _json(body: Any, status: int) -> Response:
    return Response(to_json(body), status, media_type="application/json")
