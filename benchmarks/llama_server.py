"""llama.cpp's own server, and several answers of it at once: a peer of the `03_` bars."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.peers import PeerError, peer
from edgeinfer.measure.streams import Stream

HOST = "127.0.0.1"
# Another program may take a free port between our look and the server's bind.
_TRIES = 3


# Nothing of one answer may help or slow the next one.
_NO_CACHE = ("--cache-ram", "0", "--slot-prompt-similarity", "0", "--no-cache-prompt")


class LlamaServer:
    """A running llama-server, as a context manager.

    threads: None leaves them to the server. context: tokens of each of the `slots`. unified: one KV
    cache for all slots; left to itself, the server has one for each. cache_prompts: as it does by
    itself. program: default the peer built by `benchmarks.peers`. more: options of its own.
    `__enter__` returns when it is healthy and raises PeerError if that takes more than `start_s`.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None,
        slots: int,
        context: int,
        kv_type_k: str = "f16",
        kv_type_v: str = "f16",
        flash_attention: bool = True,
        unified: bool = False,
        cache_prompts: bool = False,
        program: Path | None = None,
        more: Sequence[str] = (),
        start_s: float = 120.0,
        answer_s: float = 600.0,
    ) -> None:
        self._command = [
            str(program or peer("llama-server")),
            *("--model", str(model), "--host", HOST),
            *([] if threads is None else ["--threads", str(threads), "--threads-batch", str(threads)]),
            *("--parallel", str(slots), "--ctx-size", str(slots * context)),
            *("--batch-size", "2048", "--ubatch-size", "512"),
            *("--cache-type-k", kv_type_k, "--cache-type-v", kv_type_v),
            *("--flash-attn", "on" if flash_attention else "off"),
            "--kv-unified" if unified else "--no-kv-unified",
            *([] if cache_prompts else _NO_CACHE),
            *("--threads-http", str(slots + 2), "--no-webui", "--offline"),
            *more,
        ]
        self._start_s = start_s
        self._answer_s = answer_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def __enter__(self) -> LlamaServer:
        for last in (*[False] * (_TRIES - 1), True):
            try:
                self._start()
                return self
            except PeerError as error:
                self.close()
                if last or "bind" not in str(error):
                    raise
            except BaseException:
                self.close()
                raise
        raise AssertionError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, kindly first. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def answer_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Stream]:
        """Answer all prompts (token ids, taken as they are) at once, each with exactly `new_tokens`
        tokens, greedily. Raises PeerError if one answer is not that."""
        found: list[Stream | PeerError] = [PeerError("no answer")] * len(prompts)
        # Connected before the clock starts, as the other side's client is.
        connections = [self._connect() for _ in prompts]

        def read(number: int) -> None:
            try:
                found[number] = _read_stream(connections[number], prompts[number], new_tokens)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                found[number] = PeerError(f"llama-server's answer broke off: {error!r}")
            except PeerError as error:
                found[number] = error

        threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(len(prompts))]
        try:
            for connection in connections:
                connection.connect()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except OSError as error:
            raise PeerError(f"llama-server takes no connection: {error}{self._last_words()}") from None
        finally:
            for connection in connections:
                connection.close()
        for result in found:
            if isinstance(result, PeerError):
                raise PeerError(f"{result}{self._last_words()}")
        return [result for result in found if isinstance(result, Stream)]

    def _start(self) -> None:
        self._port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        command = [*self._command, "--port", str(self._port)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror or error}") from None
        deadline = time.monotonic() + self._start_s
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise PeerError(
                    f"llama-server ended with {self._process.returncode}{self._last_words()}"
                )
            if time.monotonic() > deadline:
                raise PeerError(f"llama-server was not ready after {self._start_s:.0f} s")
            time.sleep(0.05)

    def _is_healthy(self) -> bool:
        connection = self._connect(timeout_s=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):  # not listening yet
            return False
        finally:
            connection.close()

    def _connect(self, timeout_s: float | None = None) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self._port, timeout=timeout_s or self._answer_s)

    def _last_words(self) -> str:
        """The end of what it printed, for a message."""
        if self._log is None:
            return ""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        errors = [line for line in lines if "error" in line.lower() or "bind" in line.lower()]
        last = (errors or [line for line in lines if line])[-1:]
        return f": {last[0][:300]}" if last else ""


def _read_stream(
    connection: http.client.HTTPConnection, prompt: Sequence[int], new_tokens: int
) -> Stream:
    """Ask for one answer and note when its tokens come. Raises PeerError, OSError, HTTPException."""
    body = {
        "prompt": list(prompt),
        "n_predict": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    asked = time.perf_counter()
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise PeerError(f"llama-server answered {response.status}: {response.read(300)!r}")
    points: list[tuple[float, int]] = []
    last: dict[str, Any] = {}
    while not last.get("stop"):
        line = response.readline()
        now = time.perf_counter()
        if not line:
            raise PeerError("llama-server's answer ended early")
        if not line.startswith(b"data:"):
            if line.startswith(b"error:"):
                raise PeerError(f"llama-server: {line[6:300].decode(errors='replace').strip()}")
            continue
        last = json.loads(line.removeprefix(b"data:"))
        if "error" in last:
            raise PeerError(f"llama-server: {last['error']}")
        # Tokens that end inside a character come with the next piece: it says how many there are.
        num_tokens = int(last["tokens_predicted"])
        if num_tokens > (points[-1][1] if points else 0):
            points.append((now, num_tokens))
    _check(last, len(prompt), new_tokens)
    return Stream(asked, tuple(points))


def _check(last: dict[str, Any], prompt_tokens: int, new_tokens: int) -> None:
    cached = last.get("timings", {}).get("cache_n", 0)
    have = (last["tokens_evaluated"], last["tokens_predicted"], cached)
    if have != (prompt_tokens, new_tokens, 0):
        raise PeerError(
            "llama-server's answer is not what was asked for:"
            f" {have[0]} prompt tokens ({have[2]} cached) and {have[1]} answered,"
            f" not {prompt_tokens} (0) and {new_tokens}"
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
