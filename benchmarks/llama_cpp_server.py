"""llama-cpp-python's two servers, peers of the endpoint's bars."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.llama_server import HOST, free_port
from benchmarks.peers import PeerError, source_package


class PythonServer:
    """A Python process that serves, as a context manager. If it is not ready in time, PeerError."""

    def __init__(self, name: str, arguments: Sequence[str], port: int, start_s: float = 120.0) -> None:
        self._name = name
        self._port = port
        self._start_s = start_s
        self._command = [sys.executable, *arguments]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def __enter__(self) -> PythonServer:
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
                raise PeerError(f"{self._name} did not start: {' '.join(words)[:300]}")
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


def llama_cpp_server(model: Path, *, threads: int, context: int) -> PythonServer:
    """`python -m llama_cpp.server`. Its dependencies are llama-cpp-python's extra `server`."""
    port = free_port()
    arguments = [
        *("-m", "llama_cpp.server", "--model", str(model), "--host", HOST),
        *("--port", str(port), "--n_ctx", str(context)),
        *("--n_threads", str(threads), "--n_threads_batch", str(threads)),
        *("--flash_attn", "true", "--interrupt_requests", "false", "--verbose", "false"),
    ]
    return PythonServer("llama_cpp.server", arguments, port)


def example_server(
    model: Path, folder: Path, *, threads: int, context: int, longest: int, sequences: int
) -> PythonServer:
    """`examples/server` of llama-cpp-python's source package, with its cache of sequences on disk in
    `folder`, where its configuration is written too. context: tokens in all; longest: of one
    conversation."""
    port = free_port()
    config = {
        "server": {"host": HOST, "port": port},
        "model": {
            "path": str(model),
            "n_ctx": context,
            "max_seq_len": longest,
            "n_seq_max": sequences,
            "kv_unified": True,
            "threads": threads,
            "threads_batch": threads,
            "flash_attn": True,
            "n_batch": 512,
            "n_ubatch": 512,
            "store_logits": False,
        },
        "disk_cache": {"path": str(folder / "sequences"), "max_bytes": 2**32},
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    script = source_package() / "examples" / "server" / "server.py"
    return PythonServer("examples/server", [str(script), "-C", str(file)], port)
