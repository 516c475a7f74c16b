"""The owner's side of the worker process: start it, talk to it, notice when it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from queue import SimpleQueue
from typing import Any

from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine.draft_source import DraftSource
from edgeinfer.engine.request import Event, Request
from edgeinfer.engine.speculation import Speculate
from edgeinfer.engine.window import DEFAULT_SINKS, Eviction
from edgeinfer.engine.wire import (
    draft_to_wire,
    encoded,
    event_from_wire,
    files_to_wire,
    receive,
    request_to_wire,
)
from edgeinfer.errors import EdgeInferError, RequestFailed, WorkerDied, error_from_wire
from edgeinfer.machine.ledger import Automatic
from edgeinfer_models.config import ModelConfig
from edgeinfer_models.model_files import ModelFiles

log = logging.getLogger("edgeinfer.worker")

SHUTDOWN_S = 5.0  # the worker takes less (worker.py)
ILLEGAL_INSTRUCTION = (
    " (llama.cpp was compiled for another processor, or with a compiler that is wrong about this one;"
    " compile it again: `make clean setup`)"
)
PIPE_BUF: int = getattr(select, "PIPE_BUF", 512)  # written whole, or not at all

# Weights, KV cache and buffers on pages of 2 MiB where the system gives them to those who ask (Linux's
# usual setting, "madvise"): decode gains 4 to 7 % on a 135M model, prefill 2 %, in pairs of processes.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # glibc 2.35 and later; others ignore it


@dataclass(frozen=True)
class LoadCommand:
    backend: str
    files: ModelFiles
    settings: RuntimeSettings
    max_running: int = 1
    cache_bytes: int = 0
    config: ModelConfig | None = None  # None: a script
    automatic: Automatic = field(default_factory=Automatic)  # settings that may be changed to fit
    window: int | None = None  # tokens that the model sees at once; None: the whole context
    sinks: int = DEFAULT_SINKS
    eviction: Eviction = "streaming"
    speculate: Speculate = "auto"
    draft: DraftSource | None = None  # who drafts beside lookups
    drafts_folder: str = ""  # for what is put together of exits
    cache_disk_bytes: int = 0
    cache_folder: str = ""  # of the prompt cache on disk
    costs_folder: str = ""  # of what was measured of this machine; "": nothing is
    tunes_threads: bool = True  # by measured step costs


class EngineProcess:
    """One worker process. Not reusable once dead: make another.

    on_events([(key, event), …]) and on_refused(key, error) are called from the reader thread, in order;
    events that came together are told together.
    on_death(error) is called once, from the reader thread, when the process ended without `close`.

    What a pipe may not take at once is written by a thread of its own, so none of the others ever waits
    for a worker that is busy: the reader has to go on, or the worker could not write its events and read
    at all.
    """

    def __init__(
        self,
        on_events: Callable[[list[tuple[int, Event]]], None],
        on_refused: Callable[[int, EdgeInferError], None],
        on_death: Callable[[WorkerDied], None],
    ) -> None:
        self._on_events = on_events
        self._on_refused = on_refused
        self._on_death = on_death
        self._closing = False
        self._why_killed = ""
        self._commands: SimpleQueue[bytes | None] = SimpleQueue()
        self._num_unwritten = 0  # of them
        self._order = threading.Lock()  # of commands; never held while a write may wait
        self._replies: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._asked: dict[int, SimpleQueue[dict[str, Any] | None]] = {}
        self._ask_keys = count()
        self._load_ids = count()
        self._progress: Callable[[float], None] | None = None
        self._last_words: deque[str] = deque(maxlen=30)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgeinfer.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=worker_environment(os.environ),
            start_new_session=True,  # Ctrl+C in the terminal is for the owner
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._stderr = self._process.stderr
        self._listener = threading.Thread(target=self._listen, name="worker-stderr", daemon=True)
        self._listener.start()
        self._writer = threading.Thread(target=self._write, name="worker-commands", daemon=True)
        self._writer.start()
        # The last: it ends the others where the process has died already.
        self._reader = threading.Thread(target=self._read, name="worker-events", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    # -- commands --------------------------------------------------------------------------------

    def load(
        self, command: LoadCommand, progress: Callable[[float], None] | None = None
    ) -> Mapping[str, Any]:
        """Load a model in place of any other; the worker's facts about it. Blocks.
        Raises what the backend raised; WorkerDied if the process did not survive it."""
        self._progress = progress
        files = command.files
        load_id = next(self._load_ids)
        self._send(
            {
                "cmd": "load",
                "id": load_id,
                "backend": command.backend,
                "files": files_to_wire(files),
                "settings": asdict(command.settings),
                "max_running": command.max_running,
                "cache_bytes": command.cache_bytes,
                "config": None if command.config is None else asdict(command.config),
                "automatic": asdict(command.automatic),
                "cache_disk_bytes": command.cache_disk_bytes,
                "cache_folder": command.cache_folder,
                "window": command.window,
                "sinks": command.sinks,
                "eviction": command.eviction,
                "speculate": command.speculate,
                "draft": None if command.draft is None else draft_to_wire(command.draft),
                "drafts_folder": command.drafts_folder,
                "costs_folder": command.costs_folder,
                "tunes_threads": command.tunes_threads,
            }
        )
        reply = self._replies.get()
        while reply is not None and reply["id"] != load_id:  # of a load whose caller was interrupted
            reply = self._replies.get()
        self._progress = None
        if reply is None:
            raise self.epitaph(f"while it loaded {files.name}")
        if reply["ev"] == "load_failed":
            raise error_from_wire(reply["type"], reply["error"])
        return reply

    def cancel_load(self) -> None:
        self._send({"cmd": "cancel_load"})

    def submit(self, key: int, request: Request, waited_s: float = 0.0) -> None:
        """`waited_s`: time since the user asked, spent before this call; counts into TTFT."""
        self._send(
            {
                "cmd": "submit",
                "key": key,
                "request": request_to_wire(request),
                "waited_s": waited_s,
            }
        )

    def cancel(self, key: int) -> None:
        self._send({"cmd": "cancel", "key": key})

    def ask(self, what: str, **about: Any) -> dict[str, Any]:
        """A question that the worker answers at once, whatever runs (worker.py: `_answer`). Blocks.
        Raises RequestFailed with its reason, PromptTooLong, WorkerDied."""
        key = next(self._ask_keys)
        reply: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._asked[key] = reply
        self._send({"cmd": "ask", "key": key, "what": what, **about})
        answer = reply.get() if self.is_alive else None
        self._asked.pop(key, None)
        if answer is None:
            raise self.epitaph("while it was asked something")
        if "error" in answer:
            raise error_from_wire(answer.get("type", RequestFailed.__name__), answer["error"])
        return answer

    def unload(self) -> None:
        self._send({"cmd": "unload"})

    def close(self) -> None:
        """End the process: politely, then not."""
        self._closing = True
        self._send({"cmd": "shutdown"})
        self._commands.put(None)  # which closes its stdin: ends it even in the middle of a step
        try:
            self._process.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in (self._writer, self._reader, self._listener):
            thread.join(SHUTDOWN_S)
        self._close_streams()

    def kill(self, why: str) -> None:
        """End the process at once; `on_death` says why."""
        self._why_killed = why
        self._process.kill()

    def _close_streams(self) -> None:
        for stream in (self._stdin, self._stdout, self._stderr):
            with contextlib.suppress(OSError):
                stream.close()

    def epitaph(self, when: str = "") -> WorkerDied:
        """How the process ended, in one line."""
        try:
            code = self._process.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            return WorkerDied(f"the model's process stopped answering {when}")
        self._listener.join(0.5)
        if self._why_killed:
            return WorkerDied(f"the model's process was ended: {self._why_killed}")
        if code < 0:
            try:
                how = f"was killed by {signal.Signals(-code).name}"
                how += ILLEGAL_INSTRUCTION if -code == signal.SIGILL else ""
            except ValueError:
                how = f"was killed by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += " (out of memory, or somebody's kill -9)"
        reason = next((w for w in self._last_words if "ASSERT" in w or "error" in w.lower()), "")
        message = f"the model's process {how} {when}".rstrip()
        return WorkerDied(message + (f": {reason}" if reason else ""))

    def _send(self, message: Mapping[str, Any]) -> None:
        data = encoded(message)
        with self._order:
            if not self._num_unwritten and len(data) <= PIPE_BUF and self._takes_at_once():
                with contextlib.suppress(OSError, ValueError):
                    os.write(self._stdin.fileno(), data)
                return
            self._num_unwritten += 1
            self._commands.put(data)

    def _takes_at_once(self) -> bool:
        """Whether the pipe has room for PIPE_BUF bytes, which are then written whole without a wait."""
        if sys.platform == "win32" or self._stdin.closed:
            return False
        poll = select.poll()
        poll.register(self._stdin, select.POLLOUT)
        return [event for _, event in poll.poll(0)] == [select.POLLOUT]

    def _write(self) -> None:
        # A dead process is reported by the reader thread, to everyone who waits.
        while (data := self._commands.get()) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stdin.write(data)
                self._stdin.flush()
            with self._order:
                self._num_unwritten -= 1
        with contextlib.suppress(OSError):
            self._stdin.close()

    # -- the reader threads ----------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            message = None
            with contextlib.suppress(WorkerDied, OSError, ValueError):
                message = receive(self._stdout)
            if message is None:
                break
            kind = message["ev"]
            if kind == "events":
                self._on_events([(told["key"], event_from_wire(told)) for told in message["events"]])
            elif kind == "refused":
                self._on_refused(message["key"], error_from_wire(message["type"], message["error"]))
            elif kind == "progress":
                if self._progress is not None:
                    self._progress(message["fraction"])
            elif kind == "answer":
                waiting = self._asked.get(message["key"])
                if waiting is not None:
                    waiting.put(message)
            else:
                self._replies.put(message)
        if not self._closing and self.is_alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
            if self.is_alive:  # it sent garbage: not to be trusted any more
                self._process.kill()
        self._replies.put(None)
        for waiting in list(self._asked.values()):
            waiting.put(None)
        if not self._closing:
            error = self.epitaph()
            self._commands.put(None)
            self._writer.join(SHUTDOWN_S)
            self._close_streams()
            self._on_death(error)

    def _listen(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed under us: the process is gone
            for line in iter(self._stderr.readline, b""):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._last_words.append(text)
                    log.debug("%s", text)


def worker_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The worker's: ours, with what must be set before a process starts."""
    environment = {**inherited, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"}
    tunables = inherited.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, _HUGE_PAGES)))
    return environment
