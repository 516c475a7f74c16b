"""One running request: what was asked, what is in the KV cache, what was answered."""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeinfer.backend import Sampler, SequenceStep, Step
from edgeinfer.engine.detokenizer import Detokenizer
from edgeinfer.engine.grammar import Matcher
from edgeinfer.engine.request import CacheTier, Event, FinishReason, Request, Text, TokenLogprob

if TYPE_CHECKING:
    from edgeinfer_models.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class RunningRequest:
    """`tokens` is the whole history, prompt and answer; the first `num_computed` are in the cache."""

    key: int
    request: Request
    prompt: Tokens[int]
    seed: int
    detokenizer: Detokenizer
    submitted: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    cache_tier: CacheTier = "none"
    handle: int | None = None  # the runtime's sequence
    sampler: Sampler | None = None
    matcher: Matcher | None = None  # of a constrained answer
    num_read: int = 0  # of `tokens`, those whose text was worked out
    untold: str = ""  # text and log-probabilities that no event has told yet
    untold_logprobs: list[TokenLogprob] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # told
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    evicted: int = 0
    hidden_sum: list[float] = field(default_factory=list)  # of an embedding's tokens so far
    warnings: list[str] = field(default_factory=list)
    has_own_end: bool = False  # that no end token says: stop strings, or a grammar's
    _decode_token: list[int] = field(default_factory=lambda: [0])
    _decode_step: Step | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.num_read = len(self.prompt)
        self.has_own_end = bool(self.request.stop) or self.request.constraint is not None

    @property
    def num_answered(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def prompt_left(self) -> int:
        """Prompt tokens not yet in the cache."""
        return max(0, len(self.prompt) - self.num_computed)

    @property
    def is_decoding(self) -> bool:
        return self.num_answered > 0

    def next_tokens(self, count: int) -> list[int]:
        return self.tokens[self.num_computed : self.num_computed + count]

    def decode_step(self) -> Step:
        """The step of this request's newest token alone. The same object each time, with the token put
        in: it is made for every token of a lone answer."""
        if self._decode_step is None:
            assert self.handle is not None
            self._decode_step = Step((SequenceStep(self.handle, self._decode_token),))
        self._decode_token[0] = self.tokens[-1]
        return self._decode_step

    def read(self, tokenizer: Tokenizer) -> None:
        """Work out the text of the newest tokens."""
        visible = self.request.visible_tokens
        for token in self.tokens[self.num_read :]:
            piece = tokenizer.text(token).encode() if token in visible else tokenizer.piece(token)
            self.untold += self.detokenizer.feed(piece)
        self.num_read = len(self.tokens)

    def take_untold(self) -> list[tuple[int, Event]]:
        """The event that tells the answer's text so far, if there is any to tell."""
        if not self.untold and not self.untold_logprobs:
            return []
        told = Text(self.untold, self.num_answered, tuple(self.untold_logprobs))
        self.text.append(self.untold)
        self.untold = ""
        self.untold_logprobs.clear()
        return [(self.key, told)]

    def tokens_left(self, context: int) -> int:
        """That the answer may still get, see `length_reason`."""
        left = context + 1 - len(self.tokens)
        limit = self.request.max_tokens
        return left if limit is None else min(left, limit - self.num_answered)

    def length_reason(self, context: int) -> FinishReason | None:
        """ "length" once the answer may not grow: asked-for size reached, or the context is full (the
        newest token is not in the cache yet and needs a cell to go on)."""
        limit = self.request.max_tokens
        if limit is not None and self.num_answered >= limit:
            return "length"
        return "length" if len(self.tokens) > context else None


@dataclass
class LiveSequence:
    """A finished request's cells, kept for its next turn. `tokens` are exactly those in the cache."""

    handle: int
    tokens: list[int]
    is_saved: bool = False  # as much of it as may be is in host memory too
