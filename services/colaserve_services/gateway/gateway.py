"""What the endpoints answer: each method takes a request, and its checked body where the path takes one."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from google.protobuf.json_format import MessageToDict
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from colaserve.v1.generation_pb2 import GenerateRequest, GenerateResponse
from colaserve_services.gateway import shapes
from colaserve_services.gateway.answer import Answer, StartCall, json_response
from colaserve_services.gateway.backend import Backend, Info, most_tokens
from colaserve_services.gateway.dialects import ChatDialect, CompletionDialect, Dialect
from colaserve_services.gateway.edge import record_of
from colaserve_services.gateway.errors import ApiError, api_error, invalid
from colaserve_services.gateway.pages import docs_page, root_page
from colaserve_services.gateway.schemas import (
    DEADLINE_HEADER,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    TokenizeRequest,
)
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.gateway.translate import (
    chat_prompt,
    completion_prompts,
    generate_request,
    infill_names,
    infill_request,
    most_likely,
    names_of,
)
from colaserve_services.offload import offload
from colaserve_services.rpc.cached import Cached
from colaserve_services.rpc.metrics import CACHED_SECONDS, Metrics, exposition

LINKS = {
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

    async def create_chat_completion(self, request: Request, body: ChatRequest) -> Answer:
        """Answer a chat. With `stream`, server-sent events of `chat.completion.chunk` objects."""
        info = await self._backend.info()
        model = _checked_model(body.model, info)
        self._check_choices(body, 1)
        prompts = [GenerateRequest(prompt=chat_prompt(body.messages, info.chat_frame))]
        dialect = ChatDialect(record_of(request.scope).request_id, model, info.space, most_likely(body) is not None)
        return self._answer(request, body, dialect, self._generations(body, prompts), names_of(body))

    async def create_completion(self, request: Request, body: CompletionRequest) -> Answer:
        """Continue one or several prompts. With `stream`, server-sent events of `text_completion` objects."""
        _check_completion(body)
        info = await self._backend.info()
        model = _checked_model(body.model, info)
        dialect = partial(CompletionDialect, record_of(request.scope).request_id, model, info.space)
        if body.suffix:
            start = partial(self._backend.infill, infill_request(body, info))
            return self._answer(request, body, dialect(False, [""]), [start], infill_names(body, info))
        prompts = completion_prompts(body.prompt, info.model.vocab_size)
        self._check_choices(body, len(prompts))
        echoes = await self._echoes(prompts) if body.echo else [""] * len(prompts)
        each = [echo for echo in echoes for _ in range(body.n or 1)]
        made = dialect(most_likely(body) is not None, each)
        return self._answer(request, body, made, self._generations(body, prompts), names_of(body))

    def _generations(
        self, body: ChatRequest | CompletionRequest, prompts: Sequence[GenerateRequest]
    ) -> list[StartCall]:
        """What starts the generations of a request, prompt by prompt. Raises for fields that none can be made of."""
        generate_request(GenerateRequest(), body, 0)

        def start(prompt: GenerateRequest, sample: int, deadline: float) -> AsyncIterator[GenerateResponse]:
            request = generate_request(prompt, body, sample)  # not made before it is needed: prompts may be large
            return self._backend.generate(request, deadline)

        return [partial(start, prompt, sample) for prompt in prompts for sample in range(body.n or 1)]

    def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        dialect: Dialect,
        calls: Sequence[StartCall],
        names: Mapping[str, str],
    ) -> Answer:
        record, bounds = record_of(request.scope), self._settings.bounds
        record.user, record.choices = body.user or "", len(calls)
        deadline = record.started + min(_seconds(request), bounds.request_seconds)
        return Answer(
            self._backend,
            bounds,
            record,
            calls,
            per_prompt=body.n or 1,
            dialect=dialect,
            deadline=deadline,
            stream=bool(body.stream),
            usage_chunk=_usage_chunk(body),
            names=names,
        )

    def _check_choices(self, body: GenerationFields, prompts: int) -> None:
        per_prompt, bound = body.n or 1, self._settings.bounds.choices
        if per_prompt > bound:
            raise invalid("n", f"got {per_prompt}, expected at most {bound}")
        if prompts * per_prompt > bound:
            raise invalid("prompt", f"{prompts} prompts with n = {per_prompt} are more than the {bound} texts allowed")

    async def _echoes(self, prompts: Sequence[GenerateRequest]) -> list[str]:
        return [
            (await self._backend.detokenize(prompt.prompt_ids.ids)).text
            if prompt.HasField("prompt_ids")
            else prompt.prompt
            for prompt in prompts
        ]

    async def list_models(self, _: Request) -> shapes.ModelList:
        """The served model, with what unset fields of a request mean."""
        return {"object": "list", "data": [self._model(await self._backend.info())]}

    async def get_model(self, request: Request) -> shapes.Model:
        """The served model, or 404."""
        info = await self._backend.info()
        _checked_model(request.path_params["model_id"], info)
        return self._model(info)

    def _model(self, info: Info) -> shapes.Model:
        return {
            "id": info.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "colaserve",
            "max_model_len": most_tokens(info),
            "defaults": _defaults(info),
        }

    async def tokenize(self, _: Request, body: TokenizeRequest) -> shapes.Tokenized:
        """Token ids of a prompt, or of messages as a chat would frame them."""
        info = await self._backend.info()
        _checked_model(body.model, info)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either prompt or messages")
        text = chat_prompt(body.messages, info.chat_frame) if body.messages is not None else body.prompt or ""
        got = await self._backend.tokenize(text)
        return {
            "count": len(got.token_ids),
            "max_model_len": most_tokens(info),
            "tokens": list(got.token_ids),
            "token_strs": list(got.tokens) if body.return_token_strs else None,
        }

    async def detokenize(self, _: Request, body: DetokenizeRequest) -> shapes.Detokenized:
        """Text of token ids."""
        _checked_model(body.model, await self._backend.info())
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

    async def root(self, _: Request) -> Response:
        """Links."""
        return HTMLResponse(root_page(LINKS))

    async def docs(self, request: Request) -> Response:
        """The OpenAPI document as a page."""
        return HTMLResponse(docs_page(request.app.state.document))

    async def openapi(self, request: Request) -> dict[str, Any]:
        """The OpenAPI document."""
        document: dict[str, Any] = request.app.state.document
        return document


def _checked_model(asked: str | None, info: Info) -> str:
    """The served model's name; 404 when another one was asked for."""
    served = info.model_name
    if asked not in (None, served):
        message = f"model: {asked!r} is not served here, {served!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")
    return served


def _check_completion(body: CompletionRequest) -> None:
    if body.best_of not in (None, body.n or 1):
        raise invalid("best_of", f"got {body.best_of}, expected the value of n, {body.n or 1}", "unsupported_parameter")
    if body.echo and body.logprobs is not None:
        raise invalid("echo", "not together with logprobs: prompts are not scored", "unsupported_parameter")


def _usage_chunk(body: GenerationFields) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise invalid("stream_options", "needs stream to be true")
    return bool(body.stream_options.include_usage)


def _seconds(request: Request) -> float:
    """The deadline that a request asks for."""
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


def _defaults(info: Info) -> dict[str, Any]:
    sampler = MessageToDict(info.default_sampler, preserving_proto_field_name=True)
    sampling = MessageToDict(info.default_sampling, preserving_proto_field_name=True)
    if "solver" in sampler:
        sampler["solver"] = sampler["solver"].removeprefix("SOLVER_").lower()
    if "guidance_start" in sampler and "guidance_end" in sampler:
        sampler["guidance_interval"] = [sampler["guidance_start"], sampler["guidance_end"]]
    return {"max_tokens": info.default_max_new_tokens, **sampler, **sampling}
