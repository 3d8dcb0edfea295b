"""Nothing that callers and operators rely on goes unnoticed: data/surface_c185997.json, compared with the tree.

The snapshot is what `surface` found at commit c185997. What was removed since is listed below, with the reason; options
of `up` are listed in CHANGELOG.md. `python tests/test_surface.py` prints the surface of today.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import click
import httpx
from google.protobuf.descriptor import FileDescriptor
from prometheus_client import CollectorRegistry

import colaserve.v1
from colaserve_client import errors as client_errors
from colaserve_client.cli import exits
from colaserve_client.cli.main import cli
from colaserve_services import errors
from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc.errors import grpc_code, http_status
from colaserve_services.rpc.metrics import Aliases, Metrics

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "data" / "surface_c185997.json"

REMOVED = {  # path in the snapshot: why it went
    "grpc and http statuses.DATA_LOSS 503": "messages carry no checksums: that bytes arrive as sent is TLS's work",
    "metrics.vllm:gpu_cache_usage_perc": "vLLM calls it vllm:kv_cache_usage_perc now, and so does --metrics-aliases",
    "verbs.bench ablate": "it replaced private parts of the engine; its last figures are in docs/performance.md",
}


def surface() -> dict[str, Any]:
    """What can be relied on, by kind; every leaf is a fact."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    families = [*registry.collect(), *Aliases(metrics).collect()]
    return {
        "verbs": dict.fromkeys(sorted(verbs(cli)), True),
        "exit codes": {str(code): True for code in exits.MEANINGS},
        "exit codes of errors": {name: exits.code_of(error) for name, error in made(client_errors)},
        "grpc and http statuses": {f"{grpc_code(error).name} {http_status(error)}": True for _, error in made(errors)},
        "errors by status": {code.name: kind.__name__ for code, kind in client_errors.ERROR_BY_CODE.items()},
        "metrics": {family.name: family.type for family in families} | documented_metrics(),
        "routes": dict.fromkeys(asyncio.run(routes()), True),
        "http statuses": dict.fromkeys((status for status, _ in documented_errors()), True),
        "http errors": {code: f'"{code}"' in gateway_source() for _, code in documented_errors()},
        "protos": dict(protos()),
    }


def verbs(group: click.Group, prefix: str = "") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        yield prefix + name
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from verbs(command, f"{prefix}{name} ")


def made(module: Any) -> Iterator[tuple[str, Exception]]:
    """An error of each of a module's classes."""
    for name, kind in sorted(vars(module).items()):
        if isinstance(kind, type) and issubclass(kind, module.ColaserveError):
            yield name, kind("field", "text") if module is errors and name == "InvalidRequest" else kind("text")


async def routes() -> list[str]:
    """Method and path: of the OpenAPI document, and the pages that are not in it."""
    app = create_app(object(), GatewaySettings())
    found = [f"{method.upper()} {path}" for path, methods in app.state.document["paths"].items() for method in methods]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        return found + [
            f"GET {path}" for path in ("/", "/docs", "/openapi.json") if (await client.get(path)).is_success
        ]


def gateway_source() -> str:
    return "".join(path.read_text() for path in (ROOT / "services/colaserve_services/gateway").rglob("*.py"))


def pages() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))


def documented_errors() -> list[tuple[str, str]]:
    """(status, code) of the gateway's error table: statuses | codes | when."""
    rows = re.findall(r"^\| ((?:[45]\d\d(?:, )?)+) \| ((?:`\w+`(?:, )?)+) \|", pages(), re.MULTILINE)
    return [pair for statuses, codes in rows for pair in product(statuses.split(", "), re.findall(r"\w+", codes))]


def documented_metrics() -> dict[str, Any]:
    """Labels, from the generated reference: metric | kind | labels | meaning."""
    rows = re.findall(r"^\| `(colaserve_\w+)` \| (\w+) \| ([^|]*) \|", pages(), re.MULTILINE)
    return {f"{name} labels": sorted(re.findall(r"\w+", labels)) for name, _, labels in rows}


def protos() -> Iterator[tuple[str, Any]]:
    folder = Path(next(iter(colaserve.v1.__path__)))
    for module in sorted(folder.glob("*_pb2.py")):
        yield from described(import_module(f"colaserve.v1.{module.stem}").DESCRIPTOR)


def described(file: FileDescriptor) -> Iterator[tuple[str, Any]]:
    for name, service in file.services_by_name.items():
        for method in service.methods:
            yield f"{name}.{method.name}", [method.input_type.name, method.output_type.name]
    for enum in file.enum_types_by_name.values():
        yield from ((value.name, value.number) for value in enum.values)
    for name, message in file.message_types_by_name.items():
        yield from ((f"{name}.{field.name}", field.number) for field in message.fields)


def lost(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as it was, by path."""
    return {
        f"{kind}.{name}": (fact, now[kind].get(name))
        for kind, facts in before.items()
        for name, fact in facts.items()
        if now[kind].get(name) != fact
    }


def test_nothing_is_lost_but_what_was_removed_on_purpose() -> None:
    found = lost(json.loads(SNAPSHOT.read_text(encoding="utf-8")), surface())
    assert {path: change for path, change in found.items() if path not in REMOVED} == {}
    assert REMOVED.keys() <= found.keys(), "what is back is listed no more"


if __name__ == "__main__":
    print(json.dumps(surface(), indent=1))
