"""What a client is told went wrong: a status and OpenAI's `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from edgeinfer.errors import (
    BackendUnavailable,
    ConstraintInvalid,
    ContextFull,
    EdgeInferError,
    HubUnreachable,
    ModelNotFound,
    ModelTooLarge,
    PromptTooLong,
    TemplateError,
    ToolsInvalid,
    UsageError,
    WorkerDied,
    one_line,
)

Headers = list[tuple[bytes, bytes]]

# OpenAI's vocabulary, and llama-server's word for a prompt that does not fit.
ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
    "exceed_context_size_error",
]

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

# OpenAI's clients repeat every 5xx twice unless they are told not to.
_REPEATING_IS_VAIN = MappingProxyType({"x-should-retry": "false"})


class ApiError(Exception):
    """Raised anywhere below the guard, it becomes the answer, if none has begun.

    message: what happened and what to do next; made one line. param: the field of the body it is about.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: ErrorType,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        super().__init__(one_line(message))
        self.status = status
        self.type: ErrorType = type
        self.param = param
        self.code = code
        self.headers = dict(headers)

    @property
    def body(self) -> dict[str, object]:
        return error_body(str(self), self.type, self.param, self.code)

    def on_the_wire(self) -> tuple[Headers, bytes]:
        """Headers and content, as ASGI has them."""
        content = json.dumps(self.body).encode()
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", str(len(content)).encode()))
        return headers, content


def internal_error(request_id: str) -> ApiError:
    """For what nobody foresaw. Its reason is for the log, which has it under the request's id."""
    return ApiError(
        500,
        f"something failed inside edgeinfer; its log says what, under {request_id}",
        "server_error",
        code="internal_error",
    )


def error_body(
    message: str, type: ErrorType, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """Also what a stream sends that fails after its status has gone out."""
    error = {"message": one_line(message), "type": type, "param": param, "code": code}
    return {"error": error}


def invalid(message: str, param: str | None = None) -> ApiError:
    """A field of the body that cannot be as it is."""
    return ApiError(400, message, "invalid_request_error", param)


@dataclass(frozen=True)
class Mapped:
    status: int
    type: ErrorType
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


# The nearest class counts. Everything else is 500 with the error's own words, which are meant for users.
STATUS_OF: dict[type[EdgeInferError], Mapped] = {
    EdgeInferError: Mapped(500, "server_error"),
    UsageError: Mapped(400, "invalid_request_error"),
    ConstraintInvalid: Mapped(400, "invalid_request_error", "unsupported_schema"),
    ToolsInvalid: Mapped(400, "invalid_request_error", "invalid_tools"),
    # While a model is served, its backend lacks nothing but what a request asks of it.
    BackendUnavailable: Mapped(400, "invalid_request_error", "unsupported_by_backend"),
    TemplateError: Mapped(400, "invalid_request_error", "template_error"),
    PromptTooLong: Mapped(400, "exceed_context_size_error", "context_length_exceeded"),
    ContextFull: Mapped(400, "exceed_context_size_error", "context_length_exceeded"),
    ModelNotFound: Mapped(404, "not_found_error", "model_not_found"),
    ModelTooLarge: Mapped(507, "server_error", "model_too_large", _REPEATING_IS_VAIN),
    HubUnreachable: Mapped(503, "server_error", "hub_unreachable"),
    WorkerDied: Mapped(503, "server_error", "worker_died", {"retry-after": "1"}),
}


def as_api_error(error: ApiError | EdgeInferError) -> ApiError:
    if isinstance(error, ApiError):
        return error
    nearest = next(cls for cls in type(error).__mro__ if cls in STATUS_OF)
    mapped = STATUS_OF[nearest]
    return ApiError(mapped.status, str(error), mapped.type, code=mapped.code, headers=mapped.headers)
