"""`python -m llama_cpp.server`, a peer of the endpoint's bars."""

from __future__ import annotations

import http.client
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from benchmarks.llama_server import HOST, free_port
from benchmarks.peers import PeerError


class LlamaCppServer:
    """As a context manager. Its dependencies are llama-cpp-python's extra `server`; without them, or if
    it is not ready in time, PeerError."""

    def __init__(self, model: Path, *, threads: int, context: int, start_s: float = 120.0) -> None:
        self._port = free_port()
        self._start_s = start_s
        self._command = [
            sys.executable,
            *("-m", "llama_cpp.server", "--model", str(model), "--host", HOST),
            *("--port", str(self._port), "--n_ctx", str(context)),
            *("--n_threads", str(threads), "--n_threads_batch", str(threads)),
            *("--flash_attn", "true", "--interrupt_requests", "false", "--verbose", "false"),
        ]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def __enter__(self) -> LlamaCppServer:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + self._start_s
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                words = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
                self.__exit__(None, None, None)
                raise PeerError(f"llama_cpp.server did not start: {' '.join(words)[:300]}")
            time.sleep(0.1)
        return self

    def _is_up(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
