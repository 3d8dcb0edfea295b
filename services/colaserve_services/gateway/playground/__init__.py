"""The page at /playground: its files, beside this one, as they are. They name no other host and need no build step."""

from functools import partial
from importlib.resources import files
from pathlib import PurePath
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from colaserve_services.gateway.errors import ApiError
from colaserve_services.gateway.openapi import Endpoint

_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_FILES: Final = {
    "/playground" if file.name == "index.html" else f"/playground/{file.name}": (file.read_bytes(), kind)
    for file in files(__package__).iterdir()
    if (kind := _TYPES.get(PurePath(file.name).suffix))
}
PATHS: Final = frozenset(_FILES)


def endpoints() -> list[Endpoint]:
    """A path for each file."""
    return [Endpoint("GET", path, partial(_answer, *file)) for path, file in _FILES.items()]


def served(request: Request) -> bool:
    """Whether the page is there: on a loopback address, or where callers need a key."""
    return request.app.state.loopback or request.app.state.settings.keys is not None


async def _answer(content: bytes, kind: str, request: Request) -> Response:
    if not served(request):
        message = "/playground is served on loopback addresses, and elsewhere with --api-keys-file"
        raise ApiError(404, message, code="not_found")
    return Response(content, headers=_HEADERS, media_type=kind)
