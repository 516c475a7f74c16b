"""What every request passes before the app sees it: whose it is, by which name it came, how large it is.

In this order: Host (403), Origin (403), a preflight (204), the key (401), the body (413, 408). What the
app raises becomes an answer here, and never a traceback.
"""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeinfer.errors import EdgeInferError, one_line
from edgeinfer.server.api_keys import ApiKeys
from edgeinfer.server.documentation import OPEN_PATHS
from edgeinfer.server.errors import ApiError, Headers, as_api_error, internal_error
from edgeinfer.server.exchange import BodyBudget, Exchange, too_large
from edgeinfer.server.hosts import Authority, HostRules, OriginRules, parse_authority

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger("edgeinfer.server")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_HEADER_NAME = re.compile(rb"[a-z0-9!#$&'*+.^_`|~-]{1,64}")
_MOST_REQUESTED_HEADERS = 64
_METHODS = b"GET, HEAD, POST, PUT, DELETE, OPTIONS"
_PREFLIGHT_MAX_AGE_S = b"600"


@dataclass(frozen=True)
class GuardSettings:
    """keys: none, and everybody who gets here may use it. open_paths: what needs no key.

    allow_hosts, allow_origins: beside those that are always right (hosts.py). An origin `*` lets every
    web page in, sandboxed ones too, and then no answer allows credentials; `check_binding` says where it
    is refused.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_bodies_bytes: int = 128 << 20  # of all requests whose answers have not begun
    body_timeout_s: float = 30.0
    open_paths: frozenset[str] = OPEN_PATHS | {"/health"}


def check_names(settings: GuardSettings) -> None:
    """Raises UsageError for allowed names that are none, before anything slow is done."""
    HostRules(settings.allow_hosts)
    OriginRules(settings.allow_origins)


class Guard:
    """Pure ASGI middleware, the outermost one. Raises UsageError for allowed names that are none."""

    def __init__(self, app: ASGIApp, settings: GuardSettings | None = None) -> None:
        self._app = app
        self._settings = settings or GuardSettings()
        self._hosts = HostRules(self._settings.allow_hosts)
        self._origins = OriginRules(self._settings.allow_origins)
        self._budget = BodyBudget(self._settings.max_bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:  # a websocket: nothing here speaks it, and what is not looked at is refused
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = _Head(scope)
        exchange = Exchange(
            receive,
            send,
            has_body=head.has_body,
            max_bytes=self._settings.max_body_bytes,
            timeout_s=self._settings.body_timeout_s,
            budget=self._budget,
        )
        request_id = head.request_id()
        exchange.headers.append((b"x-request-id", request_id.encode()))
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            origin = self._check_names(head, exchange)
            if origin is not None and head.is_preflight:
                exchange.headers += _preflight_grants(head)
                await exchange.answer(204, [])
                return
            self._check_key(head, scope["path"])
            self._check_length(head)
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            await _failed(exchange, error, request_id)
        finally:
            exchange.release()

    def _check_names(self, head: _Head, exchange: Exchange) -> bytes | None:
        """The page's origin, where there is one. Raises ApiError."""
        host = self._check_host(head.all(b"host"))
        if not self._origins.allows_any:
            exchange.headers.append((b"vary", b"Origin"))
        origins = head.all(b"origin")
        if not origins:
            return None
        text = origins[0].decode("latin-1")
        if len(origins) > 1 or not self._origins.allows(text, host):
            raise ApiError(
                403,
                f"web pages of {text[:200]!r} may not use this endpoint; if they should, start it with"
                " --allow-origin and this origin",
                "permission_error",
                code="origin_not_allowed",
            )
        if self._origins.allows_any:
            exchange.headers.append((b"access-control-allow-origin", b"*"))
        else:
            exchange.headers.append((b"access-control-allow-origin", origins[0]))
            exchange.headers.append((b"access-control-allow-credentials", b"true"))
        exchange.headers.append((b"access-control-expose-headers", b"X-Request-Id, Retry-After"))
        return origins[0]

    def _check_host(self, values: list[bytes]) -> Authority:
        host = parse_authority(values[0].decode("latin-1")) if len(values) == 1 else None
        if host is None:
            raise ApiError(
                403,
                "the Host header is missing, double or malformed; it must name this endpoint, for"
                " example 127.0.0.1 or localhost with the port",
                "permission_error",
                code="host_not_allowed",
            )
        if not self._hosts.allows(host):
            raise ApiError(
                403,
                f"this endpoint does not go by the name {host.host[:200]!r}; call it by its IP address"
                " or localhost, or start it with --allow-host and this name",
                "permission_error",
                code="host_not_allowed",
            )
        return host

    def _check_key(self, head: _Head, path: str) -> None:
        keys = self._settings.keys
        if len(keys) == 0 or path in self._settings.open_paths:
            return
        sent = head.keys()
        # Some programs fill one header with a placeholder: either may hold the key.
        if any(keys.match(key) for key in sent):
            return
        if sent:
            message = "the API key is wrong; give the one that this endpoint was started with"
            challenge = 'Bearer realm="edgeinfer", error="invalid_token"'
        else:
            message = (
                "this endpoint needs an API key and the request has none; send it as"
                " `Authorization: Bearer KEY` or `x-api-key: KEY`"
            )
            challenge = 'Bearer realm="edgeinfer"'
        raise ApiError(
            401,
            message,
            "authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": challenge},
        )

    def _check_length(self, head: _Head) -> None:
        lengths = set(head.all(b"content-length"))
        if not lengths:
            return
        length = lengths.pop()
        if lengths or not length.isdigit() or len(length) > 20:
            raise ApiError(400, "the Content-Length is not a number", "invalid_request_error")
        if int(length) > self._settings.max_body_bytes:
            raise too_large(self._settings.max_body_bytes)


class _Head:
    """A request's headers. Names come in lower case (ASGI)."""

    def __init__(self, scope: Scope) -> None:
        self._headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name, []).append(value)
        self.is_preflight = (
            scope["method"] == "OPTIONS" and b"access-control-request-method" in self._headers
        )

    def all(self, name: bytes) -> list[bytes]:
        return self._headers.get(name, [])

    @property
    def has_body(self) -> bool:
        return b"transfer-encoding" in self._headers or any(
            value != b"0" for value in self.all(b"content-length")
        )

    def keys(self) -> list[bytes]:
        sent = [value.strip() for value in self.all(b"x-api-key")]
        for value in self.all(b"authorization"):
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                sent.append(key.strip())
        return [key for key in sent if key]

    def request_id(self) -> str:
        given = self.all(b"x-request-id")
        if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
            return given[0].decode("ascii")
        return f"req_{secrets.token_hex(8)}"


def _preflight_grants(head: _Head) -> Headers:
    asked = b",".join(head.all(b"access-control-request-headers")).lower().split(b",")
    names = [name.strip() for name in asked[:_MOST_REQUESTED_HEADERS]]
    grants: Headers = [
        (b"vary", b"Access-Control-Request-Headers, Access-Control-Request-Private-Network"),
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", _PREFLIGHT_MAX_AGE_S),
    ]
    sane = [name for name in names if _HEADER_NAME.fullmatch(name)]
    if sane:
        grants.append((b"access-control-allow-headers", b", ".join(sane)))
    if head.all(b"access-control-request-private-network") == [b"true"]:
        grants.append((b"access-control-allow-private-network", b"true"))
    return grants


async def _failed(exchange: Exchange, error: Exception, request_id: str) -> None:
    """Make an answer of what was raised. If one has begun, returning leaves it unfinished, and the
    server closes the connection."""
    if exchange.is_refused or exchange.is_disconnected:
        # The app's way of saying that its client is gone. It may be a fault in its cleaning up, too.
        log.info("request %s ended early: %s", request_id, one_line(repr(error)))
        return
    if isinstance(error, ApiError | EdgeInferError):
        answer = as_api_error(error)
        if answer.status >= 500:
            log.warning("request %s failed: %s", request_id, error)
    else:
        log.error("request %s failed inside", request_id, exc_info=error)
        answer = internal_error(request_id)
    await exchange.refuse(answer)
