"""/v1/completions: text in, more text out, no template."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgeinfer.client import Ended, Event, Request, RunStats, Text, TokenLogprob
from edgeinfer.server.chat import format_of
from edgeinfer.server.errors import invalid
from edgeinfer.server.openai_replies import Completion, finish_reason, legacy_logprobs
from edgeinfer.server.openai_requests import CompletionRequest
from edgeinfer.server.service import Service
from edgeinfer.server.warnings import ignored_fields

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of this route


class CompletionJob:
    """As ChatJob. Choices are numbered prompt by prompt, `n` each."""

    def __init__(self, service: Service, body: CompletionRequest, asked_by: str) -> None:
        """Raises ApiError, EdgeInferError."""
        self.shapes = Completion(service.name)
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._warnings = ignored_fields(body)
        self._prompts = body.prompts
        n = body.n or 1
        if not self._prompts:
            raise invalid("prompt is an empty list; there is nothing to complete", "prompt")
        if body.suffix:
            raise invalid("suffix is not supported: this model completes at the end only", "suffix")
        if body.best_of is not None and body.best_of != n:
            raise invalid(
                f"best_of {body.best_of} is not supported; ask for n={body.best_of}", "best_of"
            )
        if body.echo and not all(isinstance(prompt, str) for prompt in self._prompts):
            raise invalid("echo needs prompts of text, not of tokens", "echo")
        if body.echo and body.logprobs is not None:
            raise invalid(
                "echo together with logprobs is not supported: a prompt's tokens have no log"
                " probabilities here; leave out one of them",
                "echo",
            )
        common = Request(
            prompt="",
            sampling=body.sampling(service.sampling),
            max_tokens=body.most_tokens(service.max_tokens or DEFAULT_MAX_TOKENS),
            stop=body.stop_strings,
            ignore_eos=body.ignore_eos,
            overflow=service.overflow,
            logprobs=body.logprobs,
            constraint=format_of(body.response_format),
            asked_by=asked_by,
        )
        self.requests = []
        for prompt in self._prompts:
            text = prompt if isinstance(prompt, str) else None
            tokens = None if isinstance(prompt, str) else prompt
            self.requests += [
                replace(common, prompt=text, tokens=tokens, sampling=common.sampling.for_choice(i))
                for i in range(n)
            ]
        echoed = [p if body.echo and isinstance(p, str) else "" for p in self._prompts for _ in range(n)]
        self._choices = [_Choice(i, echo, body.logprobs is not None) for i, echo in enumerate(echoed)]

    def begin(self) -> str:
        return "".join(self.shapes.text(c.index, c.echo) for c in self._choices if c.echo)

    def read(self, index: int, event: Event) -> str:
        choice = self._choices[index]
        if isinstance(event, Text):
            return self.shapes.text(index, event.text, choice.add(event))
        if isinstance(event, Ended):
            event.stats.warnings.extend(self._warnings)
            choice.stats = event.stats
            return self.shapes.finish(index, finish_reason(event.stats), event.stats)
        return ""

    def end(self, stats: Sequence[RunStats]) -> str:
        return self.shapes.usage(stats, len(self._prompts)) if self._wants_usage else ""

    def whole(self) -> dict[str, Any]:
        stats = [choice.stats for choice in self._choices if choice.stats is not None]
        return self.shapes.whole([c.whole() for c in self._choices], stats, len(self._prompts))


class _Choice:
    def __init__(self, index: int, echo: str, wants_logprobs: bool) -> None:
        self.index = index
        self.echo = echo
        self.stats: RunStats | None = None
        self._wants_logprobs = wants_logprobs
        self._text = echo
        self._logprobs: list[TokenLogprob] = []
        self._offsets: list[int] = []
        self._length = len(echo)  # in characters, of the tokens so far
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, event: Text) -> dict[str, Any] | None:
        """Its log probabilities in the route's shape, None if nobody asked."""
        self._text += event.text
        if not self._wants_logprobs:
            return None
        # Told text is no measure: some is held back, and a character may be of several tokens.
        offsets = []
        for one in event.logprobs:
            offsets.append(self._length)
            self._length += len(self._decoder.decode(bytes(one.bytes)))
        self._logprobs += event.logprobs
        self._offsets += offsets
        return legacy_logprobs(event.logprobs, offsets)

    def whole(self) -> dict[str, Any]:
        assert self.stats is not None
        logprobs = legacy_logprobs(self._logprobs, self._offsets) if self._wants_logprobs else None
        return {
            "index": self.index,
            "text": self._text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(self.stats),
        }
