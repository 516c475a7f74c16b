"""A transport that closes without tearing down the answer it has just sent.

A socket closed while the client still sends is reset, and the reset throws away what the client has not
read yet: the 413 that says why. So our half is closed first, and what still comes is read and dropped,
for a bounded time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class GentleTransport(asyncio.Transport):
    """What uvicorn's protocol uses of a transport.

    may_linger: asked at `close()`, whether the client may still be sending. on_linger: told when it
    begins; from then on the protocol drops what it gets.
    """

    def __init__(
        self,
        inner: asyncio.Transport,
        *,
        linger_s: float,
        may_linger: Callable[[], bool],
        on_linger: Callable[[], None],
    ) -> None:
        super().__init__()
        self._inner = inner
        self._linger_s = linger_s
        self._may_linger = may_linger
        self._on_linger = on_linger
        self._end: asyncio.TimerHandle | None = None

    @property
    def is_lingering(self) -> bool:
        return self._end is not None

    def is_closing(self) -> bool:
        return self.is_lingering or self._inner.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self._may_linger() or not self._inner.can_write_eof():
            self._inner.close()
            return
        self._end = asyncio.get_running_loop().call_later(self._linger_s, self.close_now)
        self._inner.resume_reading()
        self._inner.write_eof()
        self._on_linger()

    def close_now(self) -> None:
        """What is written is still sent, as far as the client takes it."""
        self.lost()
        self._inner.close()

    def lost(self) -> None:
        if self._end is not None:
            self._end.cancel()

    def abort(self) -> None:
        self.lost()
        self._inner.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.is_lingering:
            self._inner.write(data)

    def pause_reading(self) -> None:
        if not self.is_lingering:
            self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)
