"""`/docs`: the routes and the fields of their bodies as one plain page, made from our own OpenAPI description.

No script, and nothing is fetched from elsewhere: it reads the same without a network. `/openapi.json` has the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Plain = Mapping[str, Any]
STYLE = """
:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem } table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top;
padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884; overflow-wrap: anywhere } summary { cursor: pointer }
code { font-size: .9em }
"""
BOUNDS = {"minimum": "≥ {:.15g}", "exclusiveMinimum": "> {:.15g}", "maximum": "≤ {:.15g}", "maxItems": "at most {}"}


def reference(openapi: Plain) -> str:
    """The page."""
    title, version = escape(openapi["info"]["title"]), escape(openapi["info"]["version"])
    routes = "".join(
        _route(openapi, path, method, route)
        for path, methods in openapi["paths"].items()
        for method, route in methods.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: routes</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title} {version}</h1>"
        f'<p>OpenAI\'s API and a little more. Machines read <a href="/openapi.json">/openapi.json</a>.</p>{routes}'
        "</body></html>"
    )


def _route(openapi: Plain, path: str, method: str, route: Plain) -> str:
    does = escape(route.get("description") or route.get("summary", ""))
    rows = "".join(_row(*field) for field in _fields(openapi, _body(route)))
    table = f"<table><tr><th>field</th><th>what</th><th>default</th></tr>{rows}</table>" if rows else ""
    return f"<details open><summary><code>{method.upper()} {escape(path)}</code> {does}</summary>{table}</details>"


def _body(route: Plain) -> Plain:
    content = route.get("requestBody", {}).get("content", {})
    return next(iter(content.values()), {}).get("schema", {})


def _fields(openapi: Plain, schema: Plain) -> Iterator[tuple[str, str, str]]:
    """Name, type and default of each field of a body."""
    found = _resolved(openapi, schema)
    for name, field in found.get("properties", {}).items():
        default = "must be given" if name in found.get("required", ()) else _text(field.get("default"))
        yield name, _type(openapi, field), default


def _type(openapi: Plain, field: Plain) -> str:
    """The type in words: `integer ≥ 1, or null`."""
    if kinds := field.get("anyOf") or field.get("oneOf"):
        return ", or ".join(_type(openapi, kind) for kind in kinds)
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if choices := field.get("enum") or ([field["const"]] if "const" in field else []):
        return " | ".join(_text(choice) for choice in choices)
    items = f" of {_type(openapi, field['items'])}" if field.get("items") else ""
    bounds = [text.format(field[bound]) for bound, text in BOUNDS.items() if bound in field]
    return " ".join([str(field.get("type", "anything")) + items, *bounds])


def _resolved(openapi: Plain, schema: Plain) -> Plain:
    name = schema.get("$ref", "").rpartition("/")[2]
    return openapi["components"]["schemas"][name] if name else schema


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _row(name: str, kind: str, default: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(default)}</td></tr>"
