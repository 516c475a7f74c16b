"""What a connection is told that never became a request."""

from __future__ import annotations

from edgeinfer.server.errors import ApiError, ErrorType

CLOSE = (b"connection", b"close")

_TLS_HANDSHAKE = b"\x16\x03"

_CODES: dict[int, tuple[ErrorType, str]] = {
    400: ("invalid_request_error", "malformed_request"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    414: ("invalid_request_error", "url_too_long"),
    429: ("rate_limit_error", "too_many_requests"),
    431: ("invalid_request_error", "headers_too_large"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    505: ("invalid_request_error", "http_version_not_supported"),
}


def refusal(status: int, message: str) -> ApiError:
    kind, code = _CODES[status]
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    return ApiError(status, message, kind, code=code, headers=headers)


def head_too_large(max_head_bytes: int) -> ApiError:
    return refusal(431, f"the request's head is larger than {max_head_bytes} bytes")


def malformed(data: bytes, error: Exception) -> ApiError:
    """data: what the parser had been given. error: its complaint."""
    if data.startswith(_TLS_HANDSHAKE):
        return refusal(400, "this endpoint speaks http, not https; change the address's beginning")
    return refusal(400, f"this is not an HTTP request that can be read ({type(error).__name__})")
