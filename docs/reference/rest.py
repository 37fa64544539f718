"""docs/api-rest.md: every route and field of the REST API, from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from docs.reference.markdown import code, page, table
from gateway.rest.app import create_routes

_INTRODUCTION = """\
What a running gateway tells at `GET /openapi.json`, as a page. Which fields of OpenAI's and Anthropic's APIs are
supported, accepted or refused, and what replies and errors look like: [openai-compat.md](openai-compat.md). How to
try it: `easyspec up`, then `curl http://127.0.0.1:8000/v1/models`."""


def rest_page() -> str:
    document = create_routes(None).openapi()  # type: ignore[arg-type]  # no request is made
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    routes = [
        (code(f"{method} {path}"), _body(operation), operation.get("description", ""))
        for method, path, operation in operations
    ]
    schemas = document["components"]["schemas"]
    bodies = [name for name in schemas if name not in ("HTTPValidationError", "ValidationError")]
    parts = [part for name in bodies for part in _schema(name, schemas[name])]
    return page(
        "REST API reference",
        "the gateway's OpenAPI document",
        _INTRODUCTION,
        table(("route", "body", "what"), routes),
        *parts,
    )


def _body(operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    return " or ".join(_type(media["schema"]) for media in content.values())


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    if "description" in schema:
        yield schema["description"]
    required = schema.get("required", ())
    yield table(
        ("field", "type", "what"),
        [
            (code(field), _type(value), ("Required. " if field in required else "") + value.get("description", ""))
            for field, value in schema.get("properties", {}).items()
        ],
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return ", ".join(code(str(value)) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
