"""The figures of the status line, kept from the events of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeinfer.client import Ended, Event, ModelInfo, Prefilled, Started, Text

Outcome = Literal["finished", "failed", "cancelled"]
State = Literal["loading", "no model", "ready", "reading", "answering", "stopping", "stopped", "failed"]


@dataclass
class Figures:
    """What is known now; None is not known yet. Live while an answer runs, then the engine's own."""

    state: State = "loading"
    load_percent: int = 0
    model: str = ""
    backend: str = ""
    context: int = 0
    prompt_percent: int = 0
    tok_s: float | None = None
    ttft_s: float | None = None
    used_tokens: int | None = None
    cached_tokens: int = 0
    evicted_tokens: int = 0
    drafts: str = ""  # what they bring, or brought the last answer
    no_drafts: str = ""  # why there were none

    _started_at: float = 0.0
    _prompt_tokens: int = 0
    _first: tuple[float, int] | None = None  # when the first text came, and the tokens it stood for

    def loaded(self, info: ModelInfo) -> None:
        self.state = "ready"
        self.model, self.backend, self.context = info.name, info.backend, info.context

    def asked(self, at: float) -> None:
        """A request goes out; the last one's rates are not this one's."""
        self.state, self.prompt_percent = "reading", 0
        self.tok_s = self.ttft_s = None
        self.drafts = self.no_drafts = ""
        self._started_at, self._first = at, None

    def forget(self) -> None:
        """A new chat: nothing of the old one is in the context."""
        self.state = "ready"
        self.tok_s = self.ttft_s = self.used_tokens = None
        self.cached_tokens = self.evicted_tokens = 0
        self.drafts = self.no_drafts = ""

    def observe(self, event: Event, at: float) -> None:
        """Take in an event that arrived at time `at`, in seconds of the clock `asked` was told."""
        match event:
            case Started():
                self._prompt_tokens = event.prompt_tokens
                self.cached_tokens, self.used_tokens = event.cached_tokens, event.prompt_tokens
                self.prompt_percent = _percent(event.cached_tokens, event.prompt_tokens)
            case Prefilled():
                self.prompt_percent = _percent(event.done, event.total)
            case Text():
                self._observe_text(event, at)
            case Ended():
                self._observe_end(event)

    def _observe_text(self, event: Text, at: float) -> None:
        if self.state == "reading":
            self.state = "answering"
        if self._first is None:
            self._first = at, event.num_tokens
            self.ttft_s = at - self._started_at
        first_at, first_tokens = self._first
        if at > first_at and event.num_tokens > first_tokens:
            self.tok_s = (event.num_tokens - first_tokens) / (at - first_at)
        if event.num_drafted:
            self.drafts = f"{event.num_drafted} of {event.num_tokens} drafted"
        self.used_tokens = self._prompt_tokens + event.num_tokens
        if self.context:  # beyond it the engine evicts; how much, it says at the end
            self.used_tokens = min(self.used_tokens, self.context)

    def _observe_end(self, event: Ended) -> None:
        outcomes: dict[Outcome, State] = {
            "finished": "ready",
            "cancelled": "stopped",
            "failed": "failed",
        }
        self.state = outcomes[event.outcome]
        stats = event.stats
        self.evicted_tokens = stats.kv.evicted_tokens
        self.context = stats.context or self.context
        if stats.timings.decode_tok_s > 0:
            self.tok_s = stats.timings.decode_tok_s
        if stats.timings.ttft_s > 0:
            self.ttft_s = stats.timings.ttft_s
        if stats.speculation.steps:
            self.drafts = f"{stats.speculation.speedup:.1f}x by {stats.speculation.mode}"
        elif stats.speculation.reason != "none":
            self.no_drafts = f"no drafts: {stats.speculation.reason}"
        if stats.usage.prompt_tokens:
            self.cached_tokens = stats.usage.cached_tokens
            total = stats.usage.prompt_tokens + stats.usage.completion_tokens
            self.used_tokens = max(0, total - stats.kv.evicted_tokens)


def _percent(part: int, whole: int) -> int:
    return min(100, 100 * part // whole) if whole > 0 else 0
