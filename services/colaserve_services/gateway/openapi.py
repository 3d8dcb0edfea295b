"""The paths of the gateway, and the OpenAPI document that is made of them."""

import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from colaserve_services import __version__
from colaserve_services.gateway.shapes import ErrorAnswer

JSON: Final = "application/json"
_ABOUT: Final = "OpenAI's API for a continuous latent diffusion language model, with its own fields beside."
_ERRORS: Final = {
    "400": "A field is wrong or cannot be honoured; `param` names it.",
    "401": "No key, or an unknown one.",
    "404": "Another model than the served one.",
    "413": "The body is too long.",
    "429": "Busy, or over a limit of the key; see Retry-After.",
    "503": "Down or going down; a retry may succeed.",
    "504": "The deadline passed.",
    "default": "Anything else that goes wrong.",
}


@dataclass(frozen=True)
class Endpoint:
    """A path. `handle` gets the request and, where `body` is given, the checked body, and returns an ASGI application
    or what is sent as JSON; its docstring is the path's description."""

    method: str
    path: str  # as starlette has it
    handle: Callable[..., Awaitable[Any]]
    body: type[BaseModel] | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)  # media type -> kind; none: it is not in the document
    statuses: Mapping[str, str] = field(default_factory=lambda: {"200": "The answer."})  # that have these answers
    errors: Mapping[str, str] = field(default_factory=lambda: _ERRORS)
    error: Any = ErrorAnswer  # the kind of their answers
    reads_body: bool = False  # `handle` reads the body itself, and gets the request alone


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1 of all that have documented answers."""
    documented = [endpoint for endpoint in endpoints if endpoint.answers]
    kinds = {kind: mode for endpoint in documented for kind, mode in _kinds(endpoint)}
    by_kind, definitions = _schemas(tuple(kinds.items()))
    paths: dict[str, Any] = {}
    for endpoint in documented:
        path = re.sub(r":\w+}", "}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "colaserve", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": definitions},
    }


@cache
def _schemas(kinds: tuple[tuple[Any, JsonSchemaMode], ...]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The schema of each kind, and the definitions that they share: made once, since that takes a while."""
    schemas, definitions = TypeAdapter.json_schemas(
        [(kind, mode, TypeAdapter(kind)) for kind, mode in kinds], ref_template="#/components/schemas/{model}"
    )
    return {kind: schema for (kind, _), schema in schemas.items()}, definitions["$defs"]


def _kinds(endpoint: Endpoint) -> Iterator[tuple[Any, JsonSchemaMode]]:
    if endpoint.body is not None:
        yield endpoint.body, "validation"
    for kind in (*endpoint.answers.values(), endpoint.error):
        yield kind, "serialization"


def _operation(endpoint: Endpoint, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    answer = {media: {"schema": schemas[kind]} for media, kind in endpoint.answers.items()}
    error = {JSON: {"schema": schemas[endpoint.error]}}
    operation = {
        "operationId": getattr(endpoint.handle, "__name__", ""),
        "description": inspect.getdoc(endpoint.handle),
        "responses": {status: {"description": text, "content": answer} for status, text in endpoint.statuses.items()}
        | {status: {"description": text, "content": error} for status, text in endpoint.errors.items()},
    }
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas[endpoint.body]}}}
    if names := re.findall(r"{(\w+)", endpoint.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation
