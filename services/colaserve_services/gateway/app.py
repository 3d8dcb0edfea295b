"""The HTTP application: the endpoints of several APIs in front of a GenerationService.

app = create_app(coordinator_stub(...), GatewaySettings())
server = await serve(app, "127.0.0.1", 8000)
"""

from difflib import get_close_matches
from typing import Any, Final

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from colaserve_services.gateway import embeddings, inference, latents, playground, shapes
from colaserve_services.gateway.answer import Answer, json_response
from colaserve_services.gateway.backend import Backend, Reach
from colaserve_services.gateway.body import checked_body
from colaserve_services.gateway.dialects import DIALECTS
from colaserve_services.gateway.dialects.base import Dialect
from colaserve_services.gateway.dialects.fields import GenerationFields
from colaserve_services.gateway.dialects.messages import COUNT_TOKENS, CountTokensRequest, MessageError, TokenCount
from colaserve_services.gateway.dialects.refusals import refuse_extras
from colaserve_services.gateway.edge import Edge
from colaserve_services.gateway.errors import ApiError
from colaserve_services.gateway.gateway import Gateway
from colaserve_services.gateway.openapi import JSON, Endpoint, document
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.gateway.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.requests import REQUEST_ID

_LONGEST_SHOWN: Final = 100  # characters of a path in an error


def create_app(
    stub: Any, settings: GatewaySettings, metrics: Metrics | None = None, reach: Reach | None = None
) -> Starlette:
    """The application.

    Args:
        stub: see `coordinator_stub`.
        settings: the gateway's.
        metrics: the process' own, served at /metrics; None makes new ones.
        reach: awaited before each call; returns when the service can be called, or waiting is no use. None: at once.
    """
    metrics = metrics or Metrics()
    backend = Backend(stub, settings.info_seconds, reach)
    gateway = Gateway(backend, settings, metrics)
    endpoints = [
        *_endpoints(gateway),
        embeddings.endpoint(backend, settings),
        *latents.endpoints(backend, settings),
        *inference.endpoints(backend, settings.bounds, gateway.ready),
        *playground.endpoints(),
    ]
    middleware = [Middleware(Edge, settings=settings, metrics=metrics)]
    if settings.cors_origins:  # outermost: errors get its headers too
        expose = (REQUEST_ID, "retry-after")
        methods, headers = ("GET", "POST"), ("*",)
        cors = Middleware(CORSMiddleware, settings.cors_origins, methods, headers, expose_headers=expose)
        middleware.insert(0, cors)
    app = Starlette(
        routes=[_route(endpoint, settings) for endpoint in endpoints],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect leads to whatever host the request names
    app.state.settings, app.state.document = settings, document(endpoints)
    app.state.draining = app.state.loopback = False  # the server sets them
    return app


def _endpoints(gateway: Gateway) -> list[Endpoint]:
    health: dict[str, Any] = {"answers": {JSON: shapes.Health}, "errors": {}}
    count: dict[str, Any] = {"answers": {JSON: TokenCount}, "error": MessageError}
    ready = {"200": "Requests should come here.", "503": "They should not."}
    return [
        *(_generation(gateway, dialect) for dialect in DIALECTS),
        Endpoint("POST", COUNT_TOKENS, gateway.count_tokens, CountTokensRequest, **count),
        Endpoint("GET", "/v1/models", gateway.list_models, answers={JSON: shapes.ModelList}),
        Endpoint("GET", "/v1/models/{model_id:path}", gateway.get_model, answers={JSON: shapes.Model}),
        Endpoint("POST", "/tokenize", gateway.tokenize, TokenizeRequest, {JSON: Tokenized}),
        Endpoint("POST", "/detokenize", gateway.detokenize, DetokenizeRequest, {JSON: Detokenized}),
        Endpoint("GET", "/health", gateway.health, **health),
        Endpoint("GET", "/ready", gateway.ready, statuses=ready, **health),
        Endpoint("GET", "/metrics", gateway.metrics, answers={"text/plain": str}, errors={}),
        Endpoint("GET", "/", gateway.root),
        Endpoint("GET", "/docs", gateway.docs),
        Endpoint("GET", "/openapi.json", gateway.openapi),
    ]


def _generation(gateway: Gateway, dialect: type[Dialect[Any]]) -> Endpoint:
    async def handle(request: Request, body: GenerationFields) -> Answer:
        return await gateway.generate(dialect, request, body)

    handle.__name__, handle.__doc__ = dialect.operation, dialect.__doc__
    answers = {JSON: dialect.whole, "text/event-stream": str}
    return Endpoint("POST", dialect.path, handle, dialect.schema, answers, error=dialect.error)


def _route(endpoint: Endpoint, settings: GatewaySettings) -> Route:
    async def answer(request: Request) -> Any:
        if endpoint.body is None or endpoint.reads_body:
            content = await endpoint.handle(request)
        else:
            body = await checked_body(request, endpoint.body, settings.bounds)
            refuse_extras(body, allow_unknown=settings.allow_unknown_fields)
            content = await endpoint.handle(request, body)
        return content if callable(content) else json_response(content)

    return Route(endpoint.path, answer, methods=[endpoint.method])


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    shown, code = request.scope["path"][:_LONGEST_SHOWN], "not_found"
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "another method")
        message, code = f"{request.method} is not for this path; it takes {allowed}", "method_not_allowed"
    elif nearest := get_close_matches(shown, [route.path for route in request.app.routes], 1):
        message = f"{shown}: there is no such path; did you mean {nearest[0]}?"
    else:
        message = f"{shown}: there is no such path; GET / has links to what is there"
    return ApiError(error.status_code, message, code=code, headers=error.headers).response(request.scope["path"])
