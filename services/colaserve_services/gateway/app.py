"""The HTTP application: OpenAI's endpoints in front of a GenerationService.

app = create_app(GenerationServiceStub(channel), GatewaySettings())
server = await serve(app, "127.0.0.1", 8000)
"""

from __future__ import annotations

from difflib import get_close_matches

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from colaserve_services import __version__
from colaserve_services.errors import ColaserveError
from colaserve_services.gateway.backend import GenerationStub, Reach
from colaserve_services.gateway.edge import Edge
from colaserve_services.gateway.errors import ApiError, api_error
from colaserve_services.gateway.gateway import Gateway
from colaserve_services.gateway.routes import generation_routes, model_routes, system_routes
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.gateway.tokenization import tokenization_routes
from colaserve_services.gateway.validation import validation_error
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.requests import REQUEST_ID

_LONGEST_SHOWN = 100  # characters of a path in an error
_ABOUT = "OpenAI's API for a continuous latent diffusion language model, with its own fields beside."


def create_app(
    stub: GenerationStub, settings: GatewaySettings, metrics: Metrics | None = None, reach: Reach | None = None
) -> FastAPI:
    """The application.

    Args:
        stub: of the service.
        settings: the gateway's.
        metrics: the process' own, served at /metrics; None makes new ones.
        reach: awaited before each call; returns when the service can be called, or waiting is no use. None: at once.
    """
    metrics = metrics or Metrics()
    gateway = Gateway(stub, settings, reach)
    app = FastAPI(
        title="colaserve",
        version=__version__,
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect leads to whatever host the request names
    )
    routers = (
        generation_routes(gateway),
        model_routes(gateway),
        tokenization_routes(gateway),
        system_routes(gateway, metrics),
    )
    for router in routers:
        app.include_router(router)
    app.state.gateway = gateway
    app.state.paths = [route.path for router in routers for route in router.routes if isinstance(route, Route)]
    _answer_errors(app)
    app.add_middleware(Edge, gateway=gateway, metrics=metrics)
    if settings.cors_origins:  # added last, so outermost: errors get its headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, "retry-after"),
        )
    return app


def _answer_errors(app: FastAPI) -> None:
    """All errors in one shape. What nobody foresaw passes on to the edge, which logs it."""

    async def known(_: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def invalid_header(_: Request, error: Exception) -> Response:  # bodies are checked in body.py
        assert isinstance(error, RequestValidationError)
        return validation_error([{**fault, "loc": fault["loc"][1:]} for fault in error.errors()]).response()

    for kind in (ApiError, ColaserveError, grpc.RpcError, TimeoutError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid_header)
    app.add_exception_handler(HTTPException, _http_error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    allowed = Headers(error.headers).get("allow", "another method")
    reasons = {
        404: (f"{_shown(request)}: there is no such path{_hint(request)}", "not_found"),
        405: (f"{request.method} is not for this path; it takes {allowed}", "method_not_allowed"),
    }
    message, code = reasons.get(error.status_code, (str(error.detail), None))
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


def _shown(request: Request) -> str:
    return request.scope["path"][:_LONGEST_SHOWN]


def _hint(request: Request) -> str:
    """The nearest path that is there."""
    nearest = get_close_matches(_shown(request), request.app.state.paths, 1)
    return f"; did you mean {nearest[0]}?" if nearest else "; GET / has links to what is there"
