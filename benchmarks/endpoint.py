"""`edgeinfer serve` as a process of its own, for the bars."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from urllib.parse import urlsplit

from benchmarks.peers import PeerError

_PROGRAM = (sys.executable, "-c", "from edgeinfer.cli import main; main()")
_URL = re.compile(r"answers at (http://\S+?)/v1")


class EndpointProcess:
    """As a context manager: `__enter__` returns when it answers. Raises PeerError."""

    def __init__(self, arguments: Sequence[str], start_s: float = 120.0) -> None:
        self._command = [*_PROGRAM, "serve", "--port", "0", *arguments]
        self._start_s = start_s
        self._said: deque[str] = deque(maxlen=50)
        self._is_up = threading.Event()
        self.url = ""

    def __enter__(self) -> EndpointProcess:
        self.spawn()
        self.wait_until_up()
        return self

    def spawn(self) -> None:
        """Start it, without waiting for it to answer; `close` is the caller's."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait_until_up(self) -> None:
        """Raises PeerError, having closed it."""
        deadline = time.monotonic() + self._start_s
        while not self._is_up.wait(0.05):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise PeerError(f"edgeinfer serve did not start: {' | '.join(self._said)}")

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.strip())
            if match := _URL.search(line):
                self.url = match[1]
                self._is_up.set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> list[str]:
        return list(self._said)

    def is_healthy(self) -> bool:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """As Ctrl+C would, then not. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        self._listener.join(5)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
