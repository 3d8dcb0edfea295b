"""Pages for people: links, and the OpenAPI document. No script, nothing fetched from elsewhere."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Final

from colaserve_client.fields import LARGE

_STYLE: Final = """
:root { color-scheme: light dark; color: light-dark(#222, #ddd); background: light-dark(#fff, #16181b) }
a { color: light-dark(#0b5cad, #7fbcff) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; font-size: 1.1rem; overflow-wrap: anywhere }
h2 code { background: light-dark(#eef, #223); padding: .15rem .4rem; border-radius: 4px }
table { border-collapse: collapse; width: 100%; margin-top: 1rem }
td, th { text-align: left; padding: .25rem .6rem; vertical-align: top; overflow-wrap: anywhere }
th { white-space: nowrap } td:first-child { min-width: 11rem } .fields td:nth-child(2) { min-width: 9rem }
tr { border-top: 1px solid light-dark(#ddd, #444) }
@media (max-width: 45rem) { table, tbody, tr, td { display: block } tr:has(th) { display: none } tr { padding: .4rem 0 }
  td { padding: .05rem 0 } td:first-child { font-weight: 600 } td:empty { display: none }
  .fields td:nth-child(3)::before { content: "default: " } }
"""


def root_page(links: Mapping[str, str]) -> str:
    """HTML with relative links, each with what is behind it."""
    lines = "".join(f'<li><a href="{link}">/{link}</a> {escape(behind)}</li>' for link, behind in links.items())
    about = "OpenAI's API for a continuous latent diffusion language model. Its base URL ends in <code>/v1</code>."
    return _page("colaserve", f"<h1>colaserve</h1><p>{about}</p><ul>{lines}</ul>")


@dataclass(frozen=True)
class Served:
    """What the served model takes for a field that is left out, and the most that one of a name may be."""

    defaults: Mapping[str, Any]
    most: Mapping[str, int]


def docs_page(document: Mapping[str, Any], served: Served, playground: bool) -> str:
    """HTML with every endpoint, the fields of its body and its answers. `playground`: whether there is one to link."""
    info, schemas = document["info"], document["components"]["schemas"]
    sections = "\n".join(
        _section(method, path, operation, schemas, served)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    about = f'{escape(info["description"])} Machine-readable: <a href="openapi.json">openapi.json</a>.'
    if playground:
        about += ' To try it: <a href="playground">playground</a>.'
    return _page(info["title"], f"<h1>{info['title']} {info['version']}</h1><p>{about}</p>\n{sections}")


def _page(title: str, body: str) -> str:
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{_STYLE}</style></head><body>{body}</body></html>"""


def _section(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any], served: Served) -> str:
    heading = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{_text(operation['description'])}</p>"
    answers = ((code, answer["description"]) for code, answer in operation["responses"].items())
    body = operation.get("requestBody", {}).get("content", {}).values()
    rows = (row for content in body for row in _fields(content["schema"], schemas, served))
    fields = _table("fields", ["Field", "Type", "Default", "Meaning"], rows)
    return heading + fields + _table("statuses", ["Status", "Meaning"], answers)


def _text(text: str) -> str:
    """HTML of plain text in which backticks mark code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _table(name: str, heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f'<table class="{name}"><tr>{head}</tr>{lines}</table>' if lines else ""


def _fields(
    reference: Mapping[str, Any], schemas: Mapping[str, Any], served: Served, path: str = ""
) -> Iterator[tuple[str, ...]]:
    """A row for each field of a schema, and behind it for each field in it."""
    schema = schemas[_name(reference)]
    for name, field in schema.get("properties", {}).items():
        needed, where = name in schema.get("required", ()), f"{path}{name}"
        about = field.get("description", "")
        own, end, rest = about.removeprefix("[").partition("]") if about.startswith("[") else ("", "", about)
        default = own if end else json.dumps("" if needed else served.defaults.get(name, "")).strip('"')
        yield f"{where} (required)" if needed else where, _type(field, served.most.get(name)), default, rest.strip()
        within = served if name in ("sampler", "sampling") else replace(served, defaults={})
        for items, inner in _objects(field):
            yield from _fields(inner, schemas, within, f"{where}{items}.")


def _objects(field: Mapping[str, Any], items: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas that a field refers to, each with a [] for a list around it."""
    if "$ref" in field:
        yield items, field
    for one in field.get("anyOf", ()):
        yield from _objects(one, items)
    if "items" in field:
        yield from _objects(field["items"], f"{items}[]")


def _name(schema: Mapping[str, Any]) -> str:
    """Of the schema that is referred to."""
    return str(schema["$ref"]).rpartition("/")[2]


def _type(field: Mapping[str, Any], most: int | None) -> str:
    """The type and the range of a field; `most` stands for a bound that only says what its type holds."""
    if "anyOf" in field:
        return " or ".join(_type(one, most) for one in field["anyOf"] if one.get("type") != "null")
    if "$ref" in field:
        return _name(field)
    if "enum" in field or "const" in field:
        return " | ".join(repr(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), most)}"
    if field.get("type") not in ("integer", "number"):
        return str(field.get("type", "any"))
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    low, high = None if low is not None and low <= -LARGE else low, most if high is None or high >= LARGE else high
    ends = ["" if end is None else str(end) if isinstance(end, int) else f"{end:.10g}" for end in (low, high)]
    return f"{field['type']} {'..'.join(ends)}" if any(ends) else str(field["type"])
