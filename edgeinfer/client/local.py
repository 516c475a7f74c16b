"""A model in a worker process of this machine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from edgeinfer.client.client import Client, Generation, LoadProgress, ModelInfo, Token
from edgeinfer.constraint import Constraint, as_lark, check_constraint
from edgeinfer.engine.process import EngineProcess
from edgeinfer.engine.request import Ended, EngineStatus, Event, Message, Request, RunStats
from edgeinfer.errors import EdgeInferError, LoadFailed, RequestFailed, UnsupportedModel, WorkerDied
from edgeinfer.machine.gpus import find_gpus, gpu_finding
from edgeinfer.machine.ledger import MemoryUse
from edgeinfer.open import OpenOptions, OpenPlan, plan_open
from edgeinfer_models.reasoning import constrained_after_reasoning, reasoning_tags
from edgeinfer_models.store import record_last_used

if TYPE_CHECKING:
    from edgeinfer_models.chat_template import TemplateRenderer, TemplateSource

# Deaths without an answer in between, after which the worker is no longer restarted by itself.
MAX_DEATHS_IN_A_ROW = 3
MOST_SENT_AT_ONCE = 16_384  # characters or tokens: writing them as JSON takes the caller's time
FOUND_BY = 200  # characters of a message by which it is found in the rendered prompt
LONGEST_TURN_HEADER = 80  # characters; more before the first message is a system prompt of the template
SUBMIT_TRIES = 3  # where the worker dies while a request is made ready for it


@dataclass
class _Pending:
    """A request on its way: `sent_to` is the process that has it, once one has."""

    generation: Generation
    on_event: Callable[[Event], None]
    request: Request
    started: float
    sent_to: EngineProcess | None = None


class LocalClient(Client):
    """Renders templates, owns the worker process, starts it again when it dies.

    pull_missing(name): fetch a catalogue or hub model that is not here; without it, loading fails.
    after_events(): may be replaced; called in the thread that tells events, when all of those that came
    together (a step's, of all streams) are told.
    """

    after_events: Callable[[], None]

    def __init__(self, options: OpenOptions, pull_missing: Callable[[str], None] | None = None) -> None:
        self._options = options
        self._pull_missing = pull_missing
        self._lock = threading.RLock()
        self._load_lock = threading.Lock()
        self._process: EngineProcess | None = None
        self._plan: OpenPlan | None = None
        self._info: ModelInfo | None = None
        self._renderer: TemplateRenderer | None = None
        self._pending: dict[int, _Pending] = {}
        self._keys = count(1)
        self._closed = False
        self._load_cancelled = False
        self._progress: LoadProgress | None = None
        self._deaths = 0
        self._control_tokens: dict[str, int | None] = {}
        self.after_events = lambda: None
        # Rendering may take seconds with a hostile template; it must not hold the caller.
        self._renderers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="render")

    # -- loading ---------------------------------------------------------------------------------

    def load(self, progress: LoadProgress | None = None) -> ModelInfo:
        with self._load_lock:
            self._progress = progress
            if self._info is not None and self._process is not None and self._process.is_alive:
                return self._info
            self._load_cancelled = False
            if self._closed:
                raise LoadFailed("the client is closed")
            self.report_progress("checking the model", 0.0)
            # The process starts (0.2 s of imports) while the file's header is read here.
            process = self._spawn()
            if self._plan is not None and not _is_there(self._plan):
                self._plan = None  # deleted since it was unloaded: converted again, or said to be gone
            plan = self._plan or plan_open(self._options, self._pull_missing, self._converting)
            self._plan = plan
            if self._load_cancelled:
                raise LoadFailed(f"loading {plan.name} was cancelled")
            if self._renderer is None:
                self._keep_renderer(_start_renderer(plan))
            self.report_progress(f"loading {plan.name}", 0.0)
            # A load that fails leaves the process to the next one; one that kills it, to `_on_death`.
            facts = process.load(
                plan.command,
                lambda fraction: self.report_progress(f"loading {plan.name}", fraction),
            )
            self._info = _model_info(plan, facts, self._gpu_warnings(facts))
            if plan.spec and self._options.remember:
                with contextlib.suppress(OSError):  # a read-only home: remembering is a convenience
                    record_last_used(plan.spec)
            self.report_progress(f"loaded {plan.name}", 1.0)
            return self._info

    def _gpu_warnings(self, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """About a graphics card that could have had the model, if its user did not decline it."""
        if facts["backend"] != "llamacpp" or facts["device"] != "cpu" or self._options.gpu_layers == 0:
            return ()
        return tuple(gpu_finding(gpu) for gpu in find_gpus() if gpu.worth_warning)[:1]

    def report_progress(self, what: str, fraction: float) -> None:
        """Tell the one who waits for `load`; a `pull_missing` calls it too."""
        if self._progress is not None:
            self._progress(what, fraction)

    def _converting(self, what: str, fraction: float) -> None:
        if self._load_cancelled:
            raise LoadFailed("loading was cancelled; nothing is left of the conversion")
        self.report_progress(what, fraction)

    def _keep_renderer(self, renderer: TemplateRenderer) -> None:
        with self._lock:
            if not self._closed:
                self._renderer = renderer
                return
        renderer.close()
        raise LoadFailed("the client is closed")

    def _spawn(self) -> EngineProcess:
        with self._lock:
            if self._closed:  # while this was about to load
                raise LoadFailed("the client is closed")
            if self._process is not None and self._process.is_alive:
                return self._process

            def on_death(error: WorkerDied) -> None:
                with self._lock:  # which is held until `process` is there
                    dead = process
                self._on_death(dead, error)

            process = EngineProcess(self._on_events, self._on_refused, on_death)
            self._process, self._info = process, None
            return process

    @property
    def info(self) -> ModelInfo | None:
        return self._info

    @property
    def spec(self) -> str:
        """How a user names the model: a catalogue name, a hub name, a path; "" before a load."""
        return self._plan.spec if self._plan else ""

    @property
    def template(self) -> TemplateSource | None:
        """The model's chat template, once a load began."""
        return self._plan.template if self._plan else None

    @property
    def worker_pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None else None

    def reopen(self, options: OpenOptions) -> None:
        """Forget the model but keep the process: the next `load` puts another one into it."""
        with self._load_lock:
            self._options = options
            self._plan = None
            self._info = None
            self._close_renderer()

    def unload(self) -> bool:
        """End the model's process, unless a request needs it; the next one loads it again. Returns
        whether there was something to end."""
        with self._lock:
            process = self._process
            if process is None or self._pending or self._info is None:
                return False
            self._process = self._info = None
        process.close()
        return True

    def end_hanging_process(self, silent_s: float) -> None:
        """End the worker, which has not answered for `silent_s`. Its requests fail; it starts again."""
        process = self._process
        if process is not None:
            process.kill(f"it had not answered for {silent_s:.0f} s")

    @property
    def is_load_cancelled(self) -> bool:
        """Whether the load that runs is wanted no more; a `pull_missing` may look, and raise."""
        return self._load_cancelled

    def cancel_load(self) -> None:
        self._load_cancelled = True
        process = self._process
        if process is not None:
            process.cancel_load()

    # -- requests --------------------------------------------------------------------------------

    def start(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Generation:
        key = next(self._keys)
        generation = Generation(lambda: self._cancel(key))
        pending = _Pending(generation, on_event or generation.put, request, time.perf_counter())
        with self._lock:
            self._pending[key] = pending
            if not self._closed:
                if not self._send_at_once(key, pending):
                    self._renderers.submit(self._submit, key, pending)
                return generation
        self._end(key, "failed", LoadFailed("the client is closed"))
        return generation

    def _send_at_once(self, key: int, pending: _Pending) -> bool:
        """Send what needs no rendering and no load: that takes less than waking a thread for it."""
        process, request = self._process, pending.request
        if (
            process is None
            or self._info is None
            or request.messages is not None
            or len(request.prompt or request.tokens or "") > MOST_SENT_AT_ONCE
            or not process.is_alive
        ):
            return False
        pending.sent_to = process
        process.submit(key, request)
        return True

    def _submit(self, key: int, pending: _Pending) -> None:
        try:
            for _ in range(SUBMIT_TRIES):
                if self._info is None or self._process is None or not self._process.is_alive:
                    self.load()  # the worker died, or nobody loaded yet
                rendered = self._render(pending.request)
                with self._lock:
                    if key not in self._pending:  # cancelled meanwhile
                        return
                    process = self._process
                    if process is not None and self._info is not None:
                        pending.sent_to = process
                        process.submit(key, rendered, time.perf_counter() - pending.started)
                        return
            raise WorkerDied("the model's process died before the request reached it")
        except EdgeInferError as error:
            self._end(key, "failed", error)
        except Exception as error:  # a bug of ours must still end the request
            self._end(key, "failed", RequestFailed(f"the request could not be made: {error!r}"))

    def _render(self, request: Request) -> Request:
        if request.messages is None:
            return request
        if self._renderer is None:
            raise UnsupportedModel("this model has no chat template and none fits it")
        prompt = self._renderer.render(
            [message.as_template_value() for message in request.messages],
            tools=list(request.tools) or None,
            options=dict(request.template_options),
        )
        stop = request.stop
        if self._plan and request.takes_stops:
            stop = (*stop, *self._plan.template.stop)  # which may be part of a text in JSON
        constraint = request.constraint
        if constraint is not None and request.may_think:
            constraint = self._after_thought(constraint, prompt)
        return replace(
            request,
            messages=None,
            tools=(),
            prompt=prompt,
            stop=stop,
            constraint=constraint,
            kept_characters=system_length(request, prompt) if request.overflow == "stream" else 0,
        )

    def rendered_beginning(self, request: Request) -> Request:
        """What every prompt with these messages and tools begins with, to be read and kept for good."""
        messages = request.messages or ()
        whole = replace(request, messages=(*messages, Message("user", "…")), overflow="stream")
        rendered = self._render(whole)
        assert rendered.prompt is not None
        prompt = rendered.prompt[: rendered.prompt.rindex("…")]
        return Request(prompt=prompt, max_tokens=1, pinned=True)

    def _after_thought(self, constraint: Constraint, prompt: str) -> Constraint:
        """For a model that thinks first: the thought is free. Raises ConstraintInvalid."""
        tags = reasoning_tags(self._plan.template) if self._plan else None
        if tags is None or constraint.kind == "regex":
            return constraint
        if constraint.is_json:
            check_constraint(constraint)  # inside another grammar its faults could not be named
        grammar = constrained_after_reasoning(
            as_lark(constraint),
            tags,
            opened=tags.opened_by(prompt),
            tokens=self.control_tokens(tags.visible_tokens),
        )
        return Constraint("lark", grammar)

    def control_tokens(self, texts: Sequence[str]) -> dict[str, int]:
        """Those of the texts that are one control token in the loaded model's vocabulary."""
        for text in texts:
            if text not in self._control_tokens:
                found = self.tokenize(text, parse_special=True)
                plain = self.tokenize(text, parse_special=False)
                is_control = len(found) == 1 and plain != found
                self._control_tokens[text] = found[0].id if is_control else None
        ids = {text: self._control_tokens[text] for text in texts}
        return {text: token for text, token in ids.items() if token is not None}

    def count_tokens(self, request: Request) -> int:
        if request.tokens is not None:
            return len(request.tokens)
        self.load()
        rendered = self._render(request)
        assert rendered.prompt is not None
        return int(self._ask("count", prompt=rendered.prompt)["tokens"])

    def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> tuple[Token, ...]:
        reply = self._ask("tokenize", text=text, add_special=add_special, parse_special=parse_special)
        return tuple(Token(*pair) for pair in zip(reply["tokens"], reply["texts"], strict=True))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._ask("detokenize", tokens=list(tokens))["text"])

    def drafts(self, context: int) -> dict[str, Any]:
        """What drafting is weighed by at so many tokens of context: `costs`, pairs of a step's tokens
        and its seconds; `model`, what drafts beside lookups; `reason`, why nothing does."""
        found: dict[str, Any] = self._ask("drafts", context=context)["drafts"]
        return found

    def status(self) -> EngineStatus | None:
        """None while no model is loaded."""
        process = self._process
        if process is None or self._info is None:
            return None
        try:
            return EngineStatus(**process.ask("status")["status"])
        except EdgeInferError:  # it died, or is being replaced
            return None

    def _ask(self, what: str, **about: Any) -> dict[str, Any]:
        self.load()
        process = self._process
        if process is None:
            raise WorkerDied("the model's process died; the next request starts it again")
        return process.ask(what, **about)

    def _cancel(self, key: int) -> None:
        with self._lock:
            pending = self._pending.get(key)
            if pending is None:
                return
            if pending.sent_to is not None:
                pending.sent_to.cancel(key)
                return
        self._end(key, "cancelled", None)  # nobody has it yet: it ends here, loading or not

    # -- events, from the worker's reader thread -------------------------------------------------

    def _on_events(self, events: Sequence[tuple[int, Event]]) -> None:
        for key, event in events:
            self._on_event(key, event)
        self.after_events()

    def _on_event(self, key: int, event: Event) -> None:
        with self._lock:
            pending = self._pending.get(key)
            if pending is None:
                return
            if isinstance(event, Ended):
                del self._pending[key]
                if event.outcome == "finished":
                    self._deaths = 0
                info = self._info
                if info is not None:
                    event.stats.timings.load_s = info.load_s
                    event.stats.warnings[:0] = [
                        w for w in info.warnings if w not in event.stats.warnings
                    ]
        pending.on_event(event)

    def _on_refused(self, key: int, error: EdgeInferError) -> None:
        self._end(key, "failed", error)

    def _on_death(self, process: EngineProcess, error: WorkerDied) -> None:
        with self._lock:
            if self._closed:
                return
            self._deaths += 1
            restart = False
            if self._process is process:  # else a request found it dead first and replaced it
                self._process = None
                was_loaded, self._info = self._info is not None, None
                restart = was_loaded and self._deaths <= MAX_DEATHS_IN_A_ROW
            lost = [key for key, p in self._pending.items() if p.sent_to is process]
        after = "; it is being started again" if restart else "; the next message starts it again"
        for key in lost:
            self._end(key, "failed", WorkerDied(str(error) + after))
        if restart:
            threading.Thread(target=self._restart, name="restart", daemon=True).start()

    def _restart(self) -> None:
        with contextlib.suppress(EdgeInferError):  # the next request loads again, and is told
            self.load()

    def _end(self, key: int, outcome: Any, error: EdgeInferError | None) -> None:
        with self._lock:
            pending = self._pending.pop(key, None)
        if pending is None:
            return
        stats = RunStats(
            finish_reason="cancelled" if outcome == "cancelled" else "stop",
            backend=self._plan.command.backend if self._plan else "none",
            model=self._plan.name if self._plan else "none",
        )
        kind, message = (type(error).__name__, str(error)) if error else ("", "")
        pending.on_event(Ended(outcome, stats, kind, message))
        self.after_events()

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._load_cancelled = True
            process, self._process = self._process, None
            keys = list(self._pending)
        for key in keys:
            self._end(key, "cancelled", None)
        if process is not None:
            process.close()
        self._renderers.shutdown(wait=False, cancel_futures=True)
        self._close_renderer()

    def _close_renderer(self) -> None:
        renderer, self._renderer = self._renderer, None
        if renderer is not None:
            renderer.close()


def _is_there(plan: OpenPlan) -> bool:
    return all(path.exists() for path in plan.command.files.paths)


def _start_renderer(plan: OpenPlan) -> TemplateRenderer:
    from edgeinfer_models.chat_template import TemplateRenderer

    source = plan.template
    renderer = TemplateRenderer(source.text, source.bos, source.eos)
    renderer.start()
    return renderer


def system_length(request: Request, prompt: str) -> int:
    """Characters of a rendered prompt before what its first user said, if a system prompt is among them:
    the request's, or one that the template has of its own; else 0."""
    messages = request.messages or ()
    systems = [m.content.strip() for m in messages if m.role in ("system", "developer")]
    first = next((m.content.strip() for m in messages if m.role not in ("system", "developer")), "")
    after = 0
    if systems and systems[0]:
        after = max(prompt.find(systems[0]), 0) + len(systems[0])
    begin = prompt.find(first[:FOUND_BY], after) if first else -1
    if begin < 0:
        return 0
    return begin if systems or begin > LONGEST_TURN_HEADER else 0


def _model_info(plan: OpenPlan, facts: Mapping[str, Any], more: tuple[str, ...]) -> ModelInfo:
    return ModelInfo(
        name=plan.name,
        backend=facts["backend"],
        device=facts["device"],
        context=facts["context"],
        vocab_size=facts["vocab_size"],
        kv_type_k=facts["kv_type_k"],
        kv_type_v=facts["kv_type_v"],
        kv_bytes_per_token=facts["kv_bytes_per_token"],
        load_s=facts["load_s"],
        threads=facts["threads"],
        threads_batch=facts["threads_batch"],
        memory=tuple(MemoryUse(**use) for use in facts["memory"]),
        predicted_bytes=facts["predicted_bytes"],
        resident_bytes=facts["resident_bytes"],
        cache_bytes=facts["cache_bytes"],
        has_template=plan.template.origin == "model",
        warnings=(*plan.warnings, *facts["warnings"], *more),
    )
