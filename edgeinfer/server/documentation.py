"""/docs: the routes as a page that works without a network, and the OpenAPI document behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

_STATIC = "/static-offline-docs"  # fastapi_offline's own

# They say nothing but which routes there are, and a browser cannot send a key for a page.
OPEN_PATHS = frozenset(
    {
        "/docs",
        "/docs/oauth2-redirect",
        "/openapi.json",
        f"{_STATIC}/favicon.png",
        f"{_STATIC}/swagger-ui-bundle.js",
        f"{_STATIC}/swagger-ui.css",
    }
)

_ERROR: dict[str, Any] = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_MEANINGS = {
    "400": "The body is not what this route takes; `param` names the field.",
    "401": "A key is needed, or the key is not right.",
    "403": "The Host or the Origin is not allowed here.",
    "404": "There is no such model or route.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "Too many requests wait already; Retry-After says when to come again.",
    "500": "Something failed inside; the log says what, under the request's id.",
    "503": "The model's process died or the endpoint is closing.",
    "504": "The answer took longer than --timeout.",
    "507": "The model does not fit into memory.",
}
_STREAMS = ("/v1/chat/completions", "/v1/completions")


def describe_errors_and_keys(app: FastAPI) -> None:
    """Make the app's OpenAPI document say what the guard and the error handlers do."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = original()
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Error"] = _ERROR
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _describe(operation, path, method)
        app.openapi_schema = document
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(operation: dict[str, Any], path: str, method: str) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for status, meaning in _MEANINGS.items():
        if method == "post" or status in ("401", "403", "404"):
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            responses[status] = {"description": meaning, "content": content}
    if path in _STREAMS:
        streamed = {"schema": {"type": "string", "description": "with `stream`: server-sent events"}}
        responses["200"].setdefault("content", {})["text/event-stream"] = streamed
