"""A client without manners: what it sends is what is on the wire, byte for byte."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answer:
    """headers: names in lower case; what comes twice is joined by commas."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape, or KeyError, TypeError, ValueError."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        if set(error) != {"message", "type", "param", "code"}:
            raise KeyError(f"an error has other fields: {sorted(error)}")
        return error

    @property
    def code(self) -> str | None:
        code: str | None = self.error["code"]
        return code


class RawConnection:
    """One connection. Reading raises EOFError where the server closes it first."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._socket = socket.create_connection((host, port), timeout=PATIENCE_S)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def send_request(
        self,
        path: str,
        body: bytes | None = None,
        /,
        *,
        method: str | None = None,
        **headers: str | None,
    ) -> None:
        """Header names with `_` for `-`; None leaves a header out (Host comes by itself)."""
        self.send(self.head(path, body, method=method, **headers) + (body or b""))

    def head(
        self,
        path: str,
        body: bytes | None = None,
        /,
        *,
        method: str | None = None,
        **headers: str | None,
    ) -> bytes:
        fields: dict[str, str | None] = {"host": f"{self.host}:{self.port}"}
        if body is not None:
            fields["content_length"] = str(len(body))
        fields.update(headers)
        lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1"]
        lines += [
            f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        /,
        *,
        method: str | None = None,
        **headers: str | None,
    ) -> Answer:
        self.send_request(path, body, method=method, **headers)
        return self.answer(with_body=method != "HEAD")

    def answer(self, *, with_body: bool = True) -> Answer:
        status, headers = self.answer_head()
        if not with_body or status in (204, 304):
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, b"".join(self.chunks()))
        if "content-length" in headers:
            return Answer(status, headers, self._exactly(int(headers["content-length"])))
        return Answer(status, headers, self._file.read())

    def answer_head(self) -> tuple[int, dict[str, str]]:
        version, _, rest = self._line().partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not an answer: {version!r} {rest!r}")
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.partition(": ")
            name = name.lower()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return int(rest.split(" ")[0]), headers

    def chunks(self) -> Iterator[bytes]:
        while size := int(self._line(), 16):
            yield self._exactly(size)
            self._line()
        self._line()

    def is_closed(self) -> bool:
        """Wait for the server's end of the connection. False: it sends something instead."""
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True

    def send_until_refused(self, piece: bytes, most: int) -> int:
        """Send `piece` up to `most` times; the number it took until the server closed (or `most`)."""
        for number in range(most):
            try:
                self.send(piece)
            except ConnectionError:
                return number
        return most

    def drip(self, data: bytes, pause_s: float = 0.02) -> int:
        """Send a byte at a time until the server says something; the number it took until then."""
        for number, byte in enumerate(data):
            if select.select([self._socket], [], [], pause_s)[0]:
                return number
            self.send(bytes([byte]))
        return len(data)

    def reset(self) -> None:
        """Leave so that the server's system is told of an error, not of an end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _line(self) -> str:
        line = self._file.readline(1 << 20)
        if not line.endswith(b"\r\n"):
            raise EOFError(f"the connection ended after {line!r}")
        return line[:-2].decode("latin-1")

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError(f"the connection ended after {len(data)} of {size} bytes")
        return data
