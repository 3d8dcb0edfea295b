"""The tables of docs/reference/configuration.md: `scripts/generate-config-docs`."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping

import click

from colaserve_client.fields import Field, flat_fields
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling
from colaserve_services.launch.options import sections_of
from colaserve_services.launch.settings import ROLES
from colaserve_services.rpc.metrics import Metrics


def filled(page: str) -> str:
    """The page with its tables as they must be; each stands between a comment that names it and one that ends it."""
    requests = flat_fields(GenerationRequest, NoiseSeed, Sampler, Sampling)
    tables = {"roles": roles(), "options": sections(), "requests": settings_of_requests(requests), "metrics": metrics()}
    for name, rows in tables.items():
        page = re.sub(rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", _between("\n".join(rows)), page, flags=re.DOTALL)
    return page


def _between(text: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{text}\n{found[2]}"


def settings_of_requests(table: Mapping[str, Field]) -> Iterator[str]:
    """A row for each field of the table."""
    yield "| Setting | Default | Meaning |"
    yield "|---|---|---|"
    for name, field in table.items():
        yield f"| `{name}` | {'' if field.default is None else field.default} | {field.help} |"


def roles() -> Iterator[str]:
    yield "| Role | Options |"
    yield "|---|---|"
    for role, settings in ROLES.items():
        yield f"| `{role}` | {', '.join(sections_of(settings))} |"


def metrics() -> Iterator[str]:
    yield "| Metric | Kind | Labels | Meaning |"
    yield "|---|---|---|---|"
    for name, kind, labels, text in Metrics().table:
        yield f"| `{name}` | {kind} | {', '.join(labels)} | {text} |"


def sections() -> Iterator[str]:
    found = {title: options for settings in ROLES.values() for title, options in sections_of(settings).items()}
    for title, options in found.items():
        yield f"## {title}\n"
        yield "| Option | Variable | Default | Meaning |"
        yield "|---|---|---|---|"
        yield from map(_row, options)
        yield ""


def _row(option: click.Option) -> str:
    text = (option.help or "").replace("|", "\\|")
    return f"| `{option.opts[0]}{_values(option)}` | `{option.envvar}` | {_default(option)} | {text} |"


def _values(option: click.Option) -> str:
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return f" {{{','.join(map(str, kind.choices))}}}"
    if isinstance(kind, click.Path):
        return " PATH" if kind.file_okay else " DIR"
    return {"integer range": " N", "float range": " X", "text": " TEXT"}.get(kind.name, f" {kind.name}")


def _default(option: click.Option) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag:
        return "off"
    return f"`{option.default}`" if option.show_default else ""


if __name__ == "__main__":
    print(filled(sys.stdin.read()), end="")
