"""The process that owns a backend: `python -m edgeinfer.engine.worker`, commands on stdin, events on
stdout.

It exists because native code can abort on a hostile model, and because a busy user interface must not
hold the interpreter lock of the thread that runs the model. It ends when stdin closes, so it never
outlives its owner.

Threads: the main one loads models, runs steps and writes events; the preparing one tokenizes (native,
without the lock) and compiles grammars; the intake one reads commands and, for a cancel, interrupts the
running step, whatever the others do. A fourth one for writing would take a core from a decode thread
each time it is woken (measured: 1.5 % of a small model's decode on two cores).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO

from edgeinfer.backend import BLOCK_TOKENS, Runtime, RuntimeSettings
from edgeinfer.constraint import Constraint
from edgeinfer.engine.disk_cache import DiskCache
from edgeinfer.engine.drafting import Drafting, Target
from edgeinfer.engine.engine import Engine, Events
from edgeinfer.engine.grammar import Matcher
from edgeinfer.engine.measured_costs import MeasuredCosts
from edgeinfer.engine.memory import load_fitted, report_memory
from edgeinfer.engine.request import Ended, Queued, RunStats, Started
from edgeinfer.engine.tuner import Tuner
from edgeinfer.engine.window import Window
from edgeinfer.engine.wire import (
    config_from_wire,
    draft_from_wire,
    event_to_wire,
    files_from_wire,
    receive,
    request_from_wire,
    send,
)
from edgeinfer.errors import EdgeInferError, LoadFailed, PromptTooLong, RequestFailed
from edgeinfer.machine.ledger import Automatic
from edgeinfer.machine.probe import probe_machine
from edgeinfer.registry import get_backend

PROGRESS_INTERVAL_S = 0.03
# A fast answer's text is told so far apart: every write wakes the owner, on a core that a decode thread
# may be running on, and thirty a second look as smooth as two hundred.
TELL_INTERVAL_S = 1 / 30
# For the same reason the turn of a request whose prompt is read in less than this is told with its first
# token.
SOON_S = 0.25
REST_S = 0.03  # without a command before idle time is used
SHUTDOWN_S = 1.0  # a step that cannot be interrupted is not waited for longer
BLOCK_HEAD_BYTES = 2**20  # of a snapshot, beside its keys and values: more than it can have
SAVE_S = 2.0  # longest that conversations are written to disk at the end
PROMPT_END = 64  # characters of a prompt that are told back
SHORT = 4096  # characters of a prompt that the intake thread tokenizes itself
PLAUSIBLE_BYTES = 16  # of text for each token of context; more is looked at before it is tokenized
MOST_STREAMED = 2**20  # tokens of a conversation whose beginning need not fit into the context


class Worker:
    def __init__(self, commands: BinaryIO, events: BinaryIO) -> None:
        self._commands = commands
        self._events = events
        self._write_lock = threading.Lock()
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._unprepared: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._num_unprepared = 0
        self._held: Events = []  # to be told with the next ones
        self._preparing: set[int] = set()  # keys of requests that the main thread does not know yet
        self._given_up: set[int] = set()  # of those, the ones that were cancelled
        self._preparing_lock = threading.Lock()
        self._engine: Engine | None = None
        self._load_cancelled = False
        self._is_saving = False
        self._costs: MeasuredCosts | None = None
        self._drafting: Drafting | None = None

    # -- the main thread -------------------------------------------------------------------------

    def run(self) -> None:
        threading.Thread(target=self._intake, name="intake", daemon=True).start()
        threading.Thread(target=self._prepare_all, name="preparing", daemon=True).start()
        while True:
            engine = self._engine
            busy = engine is not None and engine.has_work
            while not (busy and self._queue.empty()):
                command = self._queue.get() if busy else self._await_command()
                if self._costs is not None:
                    self._costs.command_taken()
                if command["cmd"] == "shutdown":
                    self._is_saving = True
                    self._close_engine()
                    return
                self._obey(command)
                engine = self._engine
                busy = engine is not None and engine.has_work
            assert engine is not None
            try:
                events = engine.step()
            except Exception as error:  # a bug of ours: every request learns it, none hangs
                logging.getLogger("edgeinfer.worker").exception("a step failed")
                events = engine.fail_all(RequestFailed(f"the engine failed: {error!r}"))
            is_new = any(isinstance(event, Started) for _, event in events)
            if is_new and engine.has_work and engine.reads_within(SOON_S):
                self._held += events
            else:
                self._tell(events)

    def _await_command(self) -> dict[str, Any]:
        """The next one. What nobody waits for is done until it comes, but not at once: who has just had
        an answer may ask again."""
        with contextlib.suppress(Empty):
            return self._queue.get(timeout=REST_S)
        while self._queue.empty() and self._use_idle():
            pass
        return self._queue.get()

    def _use_idle(self) -> bool:
        """Do a piece of what nobody waits for; False if there is none."""
        if self._engine is not None and self._engine.use_idle():
            return True
        if self._costs is not None and self._costs.use_idle():
            return True
        return self._drafting is not None and self._drafting.decide()

    def _obey(self, command: Mapping[str, Any]) -> None:
        kind = command["cmd"]
        if kind == "load":
            self._load(command)
            return
        engine = self._engine
        if kind == "submit":
            key = command["key"]
            if command["given_up"]:
                self._tell([(key, Ended("cancelled", self._stats_of_nothing()))])
            elif engine is None:
                self._refuse(key, RequestFailed("no model is loaded"))
            elif "error" in command:
                self._refuse(key, command["error"])
            else:
                events = engine.submit(
                    key,
                    command["request"],
                    command["tokens"],
                    command["received"],
                    command.get("matcher"),
                    command.get("kept", 0),
                )
                if "queued" in command:
                    events = [(key, command["queued"]), *events]
                if engine.has_work:
                    self._held += events
                else:
                    self._tell(events)
        elif kind == "cancel" and engine is not None:
            self._tell(engine.cancel(command["key"]))
        elif kind == "unload" and engine is not None:
            self._tell(engine.fail_all(RequestFailed("the model was unloaded")))
            self._close_engine()

    def _stats_of_nothing(self) -> RunStats:
        engine = self._engine
        if engine is None:
            return RunStats(finish_reason="cancelled")
        facts = engine.runtime.facts
        return RunStats(finish_reason="cancelled", backend=facts.backend, model=engine.model)

    def _load(self, command: Mapping[str, Any]) -> None:
        """One `loaded` or `load_failed` event comes of every load command."""
        self._close_engine()
        begin = time.perf_counter()
        last = 0.0

        def progress(fraction: float) -> bool:
            nonlocal last
            now = time.perf_counter()
            if now - last >= PROGRESS_INTERVAL_S or fraction >= 1.0:
                last = now
                self._send({"ev": "progress", "fraction": fraction})
            return not self._load_cancelled

        files = files_from_wire(command["files"])
        settings = dict(command["settings"])
        settings["adapters"] = tuple((path, scale) for path, scale in settings["adapters"])
        config = None if command["config"] is None else config_from_wire(command["config"])
        try:
            folder = Path(command["costs_folder"]) if command["costs_folder"] else None
            backend = get_backend(command["backend"])
            fit, runtime = load_fitted(
                backend,
                files,
                config,
                RuntimeSettings(**settings),
                command["cache_bytes"],
                Automatic(**command["automatic"]),
                progress,
                folder,
            )
            if self._load_cancelled:
                runtime.close()
                raise LoadFailed(f"loading {files.name} was cancelled")
        except EdgeInferError as error:
            self._load_failed(command, type(error).__name__, str(error))
            return
        except Exception as error:
            logging.getLogger("edgeinfer.worker").exception("loading failed")
            self._load_failed(command, "LoadFailed", f"{files.name}: {error!r}")
            return
        tuner: Tuner | None = None
        weighs_drafts = command["speculate"] != "off"
        if folder and runtime.facts.can.threads and (command["tunes_threads"] or weighs_drafts):
            self._costs = MeasuredCosts(
                runtime,
                folder,
                time.perf_counter() - begin,
                {"gpu_layers": str(fit.settings.gpu_layers)},
                tunes_threads=command["tunes_threads"],
            )
            self._costs.measure_first()
            tuner = self._costs.tuner
        elif runtime.facts.can.threads:
            tuner = Tuner.of_padding(runtime.facts.threads, runtime.facts.threads_batch)
        window = Window.of(
            runtime.facts.context,
            command["window"],
            command["sinks"],
            command["eviction"] if runtime.facts.can.heavy_hitters else "streaming",
        )
        num_layers = config.num_layers if config is not None else 0
        self._drafting = drafting = Drafting(
            command["speculate"],
            None if command["draft"] is None else draft_from_wire(command["draft"]),
            Target(backend, files, num_layers, fit.settings, runtime, window, tuner),
            Path(command["drafts_folder"]),
            lambda: probe_machine().available_bytes,
        )
        self._engine = Engine(
            runtime,
            model=files.name,
            max_running=command["max_running"],
            cache_bytes=fit.cache_bytes,
            disk=self._disk(command, runtime),
            window=window,
            tell_interval_s=TELL_INTERVAL_S,
            tuner=tuner,
            speculation=drafting.speculation,
            no_speculation=drafting.reason or "none",
        )
        # What is here now stays; a full collection in the middle of an answer need not look at it.
        gc.collect()
        gc.freeze()
        memory = report_memory(files.name, fit.ledger, runtime, drafting.memory)
        facts = runtime.facts
        tokenizer = runtime.tokenizer
        self._send(
            {
                "ev": "loaded",
                "id": command["id"],
                "load_s": time.perf_counter() - begin,
                "backend": facts.backend,
                "device": facts.device,
                "context": self._engine.window.size,
                "context_trained": facts.context_trained,
                "vocab_size": facts.vocab_size,
                "kv_type_k": facts.kv_type_k,
                "kv_type_v": facts.kv_type_v,
                "kv_bytes_per_token": facts.kv_bytes_per_token,
                "threads": facts.threads,
                "threads_batch": facts.threads_batch,
                "memory": [asdict(use) for use in memory.uses],
                "predicted_bytes": memory.predicted_bytes,
                "resident_bytes": memory.resident_bytes,
                "cache_bytes": fit.cache_bytes,
                "bos": tokenizer.text(tokenizer.bos) if tokenizer.bos is not None else "",
                "eos": tokenizer.text(tokenizer.eos) if tokenizer.eos is not None else "",
                "warnings": [*fit.warnings, *facts.warnings, *drafting.warnings],
            }
        )

    def _disk(self, command: Mapping[str, Any], runtime: Runtime) -> DiskCache | None:
        if not command["cache_disk_bytes"]:
            return None

        def is_busy() -> bool:
            return self._engine is not None and self._engine.has_work

        return DiskCache(
            Path(command["cache_folder"]),
            runtime.identity(),
            command["cache_disk_bytes"],
            name=command["files"]["name"],
            most_block_bytes=2 * BLOCK_TOKENS * runtime.facts.kv_bytes_per_token + BLOCK_HEAD_BYTES,
            is_busy=is_busy,
        )

    def _close_engine(self) -> None:
        if self._costs is not None:
            self._costs.save()
            self._costs = None
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close(SAVE_S)
        if self._drafting is not None:
            self._drafting.close()
            self._drafting = None

    def _load_failed(self, command: Mapping[str, Any], kind: str, message: str) -> None:
        self._send({"ev": "load_failed", "id": command["id"], "type": kind, "error": message})

    def _refuse(self, key: int, error: Exception) -> None:
        kind = type(error) if isinstance(error, EdgeInferError) else RequestFailed
        self._send({"ev": "refused", "key": key, "type": kind.__name__, "error": str(error)})

    def _tell(self, events: Events) -> None:
        if self._held and threading.current_thread() is threading.main_thread():
            events, self._held = [*self._held, *events], []
        if events:
            told = [{"key": key, **event_to_wire(event)} for key, event in events]
            self._send({"ev": "events", "events": told})

    def _send(self, *messages: Mapping[str, Any]) -> None:
        with self._write_lock, contextlib.suppress(OSError):  # the owner is gone: stdin will say so
            send(self._events, *messages)

    # -- the intake thread -----------------------------------------------------------------------

    def _intake(self) -> None:
        try:
            while True:
                command = None
                with contextlib.suppress(EdgeInferError, OSError, ValueError):
                    command = receive(self._commands)
                if command is None:
                    os._exit(0)  # the owner is gone, and the main thread may be deep in native code
                self._take(command)
                if command["cmd"] == "shutdown":
                    time.sleep(SHUTDOWN_S)  # for the main thread to put away what it has
                    if self._is_saving:
                        time.sleep(SAVE_S)
                    os._exit(0)
        except BaseException:  # a bug of ours: a worker that hears nothing more is worth less than none
            logging.getLogger("edgeinfer.worker").exception("reading commands failed")
            os._exit(1)

    def _take(self, command: dict[str, Any]) -> None:
        """Pass a command on; those that must not wait for the preparation of others go past it."""
        kind = command["cmd"]
        if kind == "cancel_load":
            self._load_cancelled = True
        elif kind == "ask":
            if command["what"] == "status":
                self._tell_answer(command)
            else:
                with self._preparing_lock:
                    self._num_unprepared += 1
                self._unprepared.put(command)
        elif kind == "cancel":
            self._cancel(command)
        else:
            self._announce()  # before a long prompt is tokenized: its steps have all the cores
            if kind == "submit":
                command["received"] = time.perf_counter() - command.pop("waited_s")
                with self._preparing_lock:
                    self._preparing.add(command["key"])
            elif kind == "load":
                self._load_cancelled = False
            if kind == "submit" and not self._num_unprepared and _is_short(command["request"]):
                self._prepare(command)
                return
            with self._preparing_lock:
                self._num_unprepared += 1
            self._unprepared.put(command)
            if kind == "shutdown":
                self._interrupt_step()

    def _cancel(self, command: dict[str, Any]) -> None:
        with self._preparing_lock:
            if command["key"] in self._preparing:
                self._given_up.add(command["key"])
                return
        self._announce()
        self._queue.put(command)
        engine = self._engine
        if engine is not None and engine.is_alone(command["key"]):
            self._interrupt_step()

    def _announce(self) -> None:
        """A command is on its way to the main thread, which may be measuring."""
        costs = self._costs
        if costs is not None:
            costs.command_arrives()

    def _interrupt_step(self) -> None:
        engine = self._engine
        if engine is not None and engine.runtime.facts.can.abort:
            engine.runtime.abort()

    # -- the preparing thread --------------------------------------------------------------------

    def _prepare_all(self) -> None:
        """Commands in the order they came: what ends a model comes after what reads its vocabulary."""
        while True:
            command = self._unprepared.get()
            kind = command["cmd"]
            if kind == "ask":
                self._tell_answer(command)
            elif kind == "submit":
                self._prepare(command)
            else:
                self._queue.put(command)
            with self._preparing_lock:
                self._num_unprepared -= 1

    def _prepare(self, command: dict[str, Any]) -> None:
        key = command["key"]
        if key not in self._given_up:
            try:
                request = command["request"] = request_from_wire(command["request"])
                is_bounded = request.overflow != "stream" or request.embedding
                command["tokens"] = self._tokenize(request.prompt, request.tokens, is_bounded)
                if request.kept_characters and request.prompt is not None:
                    command["kept"] = len(self._tokenize(request.prompt[: request.kept_characters]))
                command["matcher"] = self._match(request.constraint)
                self._tell_queued(command)
            except EdgeInferError as error:
                command["error"] = error
            except Exception as error:  # of this request, which learns it
                logging.getLogger("edgeinfer.worker").exception("preparing a request failed")
                command["error"] = RequestFailed(f"the request could not be prepared: {error!r}")
        with self._preparing_lock:
            self._preparing.discard(key)
            command["given_up"] = key in self._given_up
            self._given_up.discard(key)
            self._queue.put(command)  # inside: a cancel from now on comes after it

    def _tell_answer(self, question: Mapping[str, Any]) -> None:
        try:
            answer = self._answer(question)
        except EdgeInferError as error:
            answer = {"error": str(error), "type": type(error).__name__}
        except Exception as error:  # whoever asked waits for it
            logging.getLogger("edgeinfer.worker").exception("answering a question failed")
            answer = {"error": f"it could not be worked out: {error!r}"}
        self._send({"ev": "answer", "key": question["key"], **answer})

    def _match(self, constraint: Constraint | None) -> Matcher | None:
        """Made here, as nobody waits for this thread. None where the engine will refuse the request.
        Raises ConstraintInvalid."""
        engine = self._engine
        if constraint is None or engine is None or not engine.runtime.facts.can.token_masks:
            return None
        return engine.grammars.matcher(constraint)

    def _tell_queued(self, command: dict[str, Any]) -> None:
        """Told from here: the main thread may be in a long step, and whoever asks wants to know."""
        engine, tokens = self._engine, command["tokens"]
        if engine is not None and engine.refusal(command["request"], tokens) is None:
            prompt = command["request"].prompt or ""
            queued = Queued(len(tokens), prompt[-PROMPT_END:])
            if engine.has_work or not self._queue.empty():
                self._tell([(command["key"], queued)])
            else:  # it is told with the request's turn, which comes at once: each write wakes the owner
                command["queued"] = queued

    def _answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What a question is answered with: its reply's fields, `error` among them if there is none."""
        engine, what = self._engine, question["what"]
        if engine is None:
            return {"error": "no model is loaded"}
        tokenizer = engine.runtime.tokenizer
        if what == "count":
            return {"tokens": len(self._tokenize(question["prompt"]))}
        if what == "tokenize":
            tokens = tokenizer.encode(
                question["text"],
                add_special=question["add_special"],
                parse_special=question["parse_special"],
            )
            return {"tokens": tokens, "texts": [tokenizer.text(token) for token in tokens]}
        if what == "detokenize":
            tokens = question["tokens"]
            wrong = next((t for t in tokens if not 0 <= t < tokenizer.vocab_size), None)
            if wrong is not None:
                return {"error": f"token {wrong} is outside the vocabulary of {tokenizer.vocab_size}"}
            return {"text": tokenizer.decode(tokens)}
        if what == "drafts":
            return {"drafts": self._about_drafts(question["context"])}
        return {"status": asdict(engine.status())}

    def _about_drafts(self, context: int) -> dict[str, Any]:
        drafting = self._drafting
        if drafting is None or drafting.speculation is None:
            return {"reason": "" if drafting is None else drafting.reason, "costs": [], "model": {}}
        speculation = drafting.speculation
        costs = [list(pair) for pair in speculation.costs(context).items()]
        return {"reason": "", "costs": costs, "model": speculation.about_model(context)}

    def _tokenize(
        self, prompt: str | None, tokens: Iterable[int] | None = None, is_bounded: bool = True
    ) -> list[int]:
        """is_bounded: it is refused if it does not fit into the context. Raises PromptTooLong."""
        if tokens is not None:
            return list(tokens)
        engine = self._engine
        if engine is None:
            raise RequestFailed("no model is loaded")
        assert prompt is not None
        tokenizer = engine.runtime.tokenizer
        context = engine.runtime.facts.context if is_bounded else MOST_STREAMED
        if len(prompt) > PLAUSIBLE_BYTES * context:  # seconds of tokenizing, for nothing
            least = len(prompt) // engine.longest_piece
            if least >= context:
                raise PromptTooLong(least, context, at_least=True)
        # A template that writes the bos token itself must not get a second one.
        bos = tokenizer.text(tokenizer.bos) if tokenizer.bos is not None else ""
        add_special = tokenizer.adds_bos and not (bos and prompt.startswith(bos))
        return tokenizer.encode(prompt, add_special=add_special, parse_special=True)


def _is_short(request: Mapping[str, Any]) -> bool:
    """Whether it is made ready in less time than it takes to wake another thread for it."""
    is_text = request["prompt"] is not None and len(request["prompt"]) <= SHORT
    return is_text and request["constraint"] is None


def main() -> None:
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", None)):
        if number is not None:  # the terminal's signals are the owner's to handle
            signal.signal(number, signal.SIG_IGN)
    import psutil  # noqa: F401 (tens of ms: here the owner is still reading the model's header)

    wanted = os.environ.get("EDGEINFER_LOG", "").upper()
    known = logging.getLevelNamesMapping()
    logging.basicConfig(stream=sys.stderr, level=known.get(wanted, logging.ERROR))
    commands = os.fdopen(os.dup(0), "rb", buffering=0)
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever native code prints must not end up between two events
    Worker(commands, events).run()


if __name__ == "__main__":
    main()
