"""The OpenAPI document as one plain page: no script, nothing fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem; font-size: 1.1rem } h2 code { background: #eef; padding: .15rem .4rem; border-radius: 4px }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .6rem; vertical-align: top }
tr { border-top: 1px solid #ddd } td:nth-child(2) { color: #555; white-space: nowrap }
"""


def root_page(links: Mapping[str, str]) -> str:
    """HTML with relative links, each with what is behind it."""
    lines = "".join(
        f'<li><a href="{escape(link)}">/{escape(link)}</a> {escape(told)}</li>' for link, told in links.items()
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>colaserve</title>
<style>{_STYLE}</style></head><body><h1>colaserve</h1><p>OpenAI's API for a continuous latent diffusion language model.
Its base URL ends in <code>/v1</code>.</p><ul>{lines}</ul></body></html>"""


def docs_page(document: Mapping[str, Any]) -> str:
    """HTML with every endpoint, the fields of its body and its answers."""
    info = document["info"]
    sections = "\n".join(
        _section(method, path, operation, document)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}</title>
<style>{_STYLE}</style></head><body><h1>{escape(info["title"])} {escape(info["version"])}</h1>
<p>{escape(info.get("description", ""))} Machine-readable: <a href="openapi.json">openapi.json</a>.</p>
{sections}</body></html>"""


def _section(method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    heading = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    answers = ((code, "", answer.get("description", "")) for code, answer in operation["responses"].items())
    return heading + _table(["Field", "Type", ""], _body_rows(operation, document)) + _table(["Status"], answers)


def _table(heads: list[str], rows: Iterator[tuple[str, str, str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if lines else ""


def _body_rows(operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = _resolved(content.get("schema", {}), document)
    for name, field in schema.get("properties", {}).items():
        needed = " (required)" if name in schema.get("required", ()) else ""
        yield name + needed, _type(field, document), field.get("description", "")


def _type(field: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(one, document) for one in field["anyOf"] if one.get("type") != "null")
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field or "const" in field:
        return " | ".join(repr(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), document)}"
    return f"{field.get('type', 'any')}{_range(field)}"


def _range(field: Mapping[str, Any]) -> str:
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    return f" {'' if low is None else f'{low:.10g}'}..{'' if high is None else f'{high:.10g}'}"


def _resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = document["components"]["schemas"][name] if name else schema
    return found
