"""What the endpoints answer: each method takes a request, and its checked body where the path takes one."""

import math
import time
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from colaserve_services.gateway import playground, shapes
from colaserve_services.gateway.answer import Answer, json_response
from colaserve_services.gateway.backend import Backend, Info, most_tokens
from colaserve_services.gateway.dialects.base import Dialect
from colaserve_services.gateway.dialects.fields import GenerationFields
from colaserve_services.gateway.dialects.messages import CountTokensRequest, TokenCount
from colaserve_services.gateway.dialects.transcript import chat_prompt, turns_of
from colaserve_services.gateway.edge import record_of
from colaserve_services.gateway.errors import ApiError, api_error, invalid
from colaserve_services.gateway.json_form import plain
from colaserve_services.gateway.pages import Served, docs_page, root_page
from colaserve_services.gateway.settings import Bounds, GatewaySettings
from colaserve_services.gateway.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from colaserve_services.offload import offload
from colaserve_services.rpc.cached import Cached
from colaserve_services.rpc.metrics import CACHED_SECONDS, Metrics, exposition

DEADLINE_HEADER: Final = "x-request-timeout"
_BUDGETS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")
_IDS: Final = ("ids", "input", "logprob_ids", "prompt", "sequences", "target_ids", "tokens")  # lists of token ids
LINKS = {
    "playground": "the model and its latents, to try",
    "docs": "every endpoint and field",
    "v1/models": "the served model and its defaults",
    "health": "whether the process lives",
    "ready": "whether requests should come here",
    "metrics": "Prometheus metrics",
}


class Gateway:
    """One gateway: its settings and its coordinator."""

    def __init__(self, backend: Backend, settings: GatewaySettings, metrics: Metrics):
        self._backend, self._settings = backend, settings
        self._started = int(time.time())
        self._readiness = Cached(self._reason, settings.ready_seconds)
        self._metrics = Cached(lambda: offload(exposition, metrics.registry), CACHED_SECONDS)

    async def generate(self, dialect: type[Dialect[Any]], request: Request, body: GenerationFields) -> Answer:
        """Write text as a dialect asks for it."""
        info = await self._backend.info()
        checked_model(body.model, info)
        record, bounds = record_of(request.scope), self._settings.bounds
        asked = dialect(body, info, record.request_id)
        starts, per_prompt = asked.prompts(self._backend), body.choices()
        if per_prompt > bounds.choices:
            raise invalid("n", f"got {per_prompt}, expected at most {bounds.choices}")
        if len(starts) * per_prompt > bounds.choices:
            what = f"{len(starts)} prompts with n = {per_prompt} are more than the {bounds.choices} texts allowed"
            raise invalid("prompt", what)
        record.user, record.choices = body.end_user(), len(starts) * per_prompt
        until, streaming = deadline(request, bounds), bool(body.stream)
        return Answer(self._backend, bounds, record, until, starts, streaming, per_prompt, asked)

    async def list_models(self, _: Request) -> shapes.ModelList:
        """The served model, with what unset fields of a request mean."""
        return {"object": "list", "data": [self._model(await self._backend.info())]}

    async def get_model(self, request: Request) -> shapes.Model:
        """The served model, or 404."""
        info = await self._backend.info()
        checked_model(request.path_params["model_id"], info)
        return self._model(info)

    def _model(self, info: Info) -> shapes.Model:
        return {
            "id": info.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "colaserve",
            "max_model_len": most_tokens(info),
            "defaults": _defaults(info),
            "space": info.space,
            "description": info.description,
        }

    async def tokenize(self, _: Request, body: TokenizeRequest) -> Tokenized:
        """Token ids of a prompt, or of messages as a chat would frame them."""
        info = await self._backend.info()
        checked_model(body.model, info)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either prompt or messages")
        text = chat_prompt(turns_of(body.messages), info.chat_frame) if body.messages is not None else body.prompt or ""
        got = await self._backend.tokenize(text)
        return {
            "count": len(got.token_ids),
            "max_model_len": most_tokens(info),
            "tokens": list(got.token_ids),
            "token_strs": list(got.tokens) if body.return_token_strs else None,
        }

    async def count_tokens(self, _: Request, body: CountTokensRequest) -> TokenCount:
        """Tokens of a conversation, as a message would frame it."""
        info = await self._backend.info()
        checked_model(body.model, info)
        return {"input_tokens": len((await self._backend.tokenize(body.prompt(info.chat_frame))).token_ids)}

    async def detokenize(self, _: Request, body: DetokenizeRequest) -> Detokenized:
        """Text of token ids."""
        checked_model(body.model, await self._backend.info())
        return {"prompt": (await self._backend.detokenize(body.tokens)).text}

    async def health(self, _: Request) -> shapes.Health:
        """The process lives, whatever its load and the state of the coordinator."""
        return {"status": "ok"}

    async def ready(self, request: Request) -> Response:
        """Whether requests should come here: 200, or 503 while the gateway goes down or a stage is away."""
        reason = "going down" if request.app.state.draining else await self._readiness.get()
        if reason:
            return json_response({"status": "not ready", "reason": reason}, 503)
        return json_response({"status": "ok"})

    async def _reason(self) -> str:
        """Why requests should not come here; empty: they should."""
        try:
            await self._backend.check_ready()
        except Exception as error:
            return api_error(error).message
        return ""

    async def metrics(self, _: Request) -> Response:
        """Prometheus metrics of this process."""
        return Response(await self._metrics.get(), media_type=CONTENT_TYPE_LATEST)

    async def root(self, request: Request) -> Response:
        """Links."""
        shown = LINKS if playground.served(request) else {link: LINKS[link] for link in LINKS if link != "playground"}
        return HTMLResponse(root_page(shown))

    async def docs(self, request: Request) -> Response:
        """The OpenAPI document as a page, with the served model's defaults when the coordinator answers."""
        try:
            served = _served(await self._backend.info())
        except Exception:  # the page is shown without the coordinator, too
            served = Served({}, {})
        return HTMLResponse(docs_page(request.app.state.document, served, playground.served(request)))

    async def openapi(self, request: Request) -> dict[str, Any]:
        """The OpenAPI document."""
        document: dict[str, Any] = request.app.state.document
        return document


def checked_model(asked: str | None, info: Info) -> None:
    """404 when another model than the served one was asked for."""
    if asked not in (None, info.model_name):
        message = f"model: {asked!r} is not served here, {info.model_name!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")


def deadline(request: Request, bounds: Bounds) -> float:
    """The deadline that a request asks for, or the longest, in time.monotonic() seconds."""
    return record_of(request.scope).started + min(_seconds(request), bounds.request_seconds)


def _seconds(request: Request) -> float:
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid(DEADLINE_HEADER, f"should be a number of seconds above 0, got {text[:80]!r}")
    return seconds


def _served(info: Info) -> Served:
    blocks, most = info.limits.max_context // max(info.model.block_size, 1), most_tokens(info)
    bounds = {
        "max_blocks": blocks,
        **dict.fromkeys((*_BUDGETS, "token_count"), most),
        **dict.fromkeys(_IDS, info.model.vocab_size - 1),
    }
    return Served(_defaults(info) | dict.fromkeys(_BUDGETS, info.default_max_new_tokens), bounds)


def _defaults(info: Info) -> dict[str, Any]:
    found = {**plain(info.default_sampler, as_lists=False), **plain(info.default_sampling, as_lists=False)}
    del found["steering"]  # no model has probes by default
    if "guidance_start" in found and "guidance_end" in found:
        found["guidance_interval"] = [found["guidance_start"], found["guidance_end"]]
    return {"max_tokens": info.default_max_new_tokens, **found}
