"""One running request: what was asked, what is in the KV cache, what was answered."""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeinfer.backend import Sampler, SequenceStep, Step
from edgeinfer.engine.detokenizer import Detokenizer
from edgeinfer.engine.grammar import Matcher
from edgeinfer.engine.history import ROOT, Gap
from edgeinfer.engine.request import (
    CacheTier,
    Event,
    FinishReason,
    Prefilled,
    Request,
    Text,
    TokenLogprob,
)

if TYPE_CHECKING:
    from edgeinfer.backend import Logits
    from edgeinfer_models.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class PromptEnd:
    """The logits after a prompt, and what is in the cells where they hold: its `num_tokens` tokens."""

    num_tokens: int
    logits: Logits


@dataclass(slots=True, eq=False)
class RunningRequest:
    """`tokens` is prompt and answer, but for what a `gap` says was evicted; the first `num_computed` of
    them are in the cache, and the first `num_prompt` are read before the next one is drawn."""

    key: int
    request: Request
    prompt: Tokens[int]  # as it was asked, whole
    seed: int
    detokenizer: Detokenizer
    submitted: float = field(default_factory=time.perf_counter)
    kept: int = 0  # tokens of the prompt that are its system prompt
    tokens: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    num_prefilled: int = 0
    gap: Gap | None = None
    newly_evicted: int = 0
    prompt_end: PromptEnd | None = None
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
    draft: Tokens[int] = ()  # what the next step checks
    num_drafted: int = 0  # of its answer, what was guessed and right
    hidden_sum: list[float] = field(default_factory=list)  # of an embedding's tokens so far
    warnings: list[str] = field(default_factory=list)
    has_own_end: bool = False  # that no end token says: stop strings, or a grammar's
    _decode_token: list[int] = field(default_factory=lambda: [0])
    _decode_step: Step | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.num_prompt = self.num_read = len(self.prompt)
        self.has_own_end = bool(self.request.stop) or self.request.constraint is not None

    @property
    def num_answered(self) -> int:
        return len(self.answered)

    @property
    def prompt_left(self) -> int:
        """Tokens to be read that are not yet in the cache: of the prompt, or of the whole conversation
        where it is read again in the middle of an answer."""
        return max(0, self.num_prompt - self.num_computed)

    @property
    def is_all_computed(self) -> bool:
        """Whether its next token is drawn from what `prompt_end` has, and nothing need be run for it."""
        return self.num_computed == len(self.tokens)

    @property
    def is_decoding(self) -> bool:
        return bool(self.answered)

    @property
    def streams(self) -> bool:
        """Whether old tokens leave where the context is full."""
        return self.request.overflow == "stream" and not self.request.embedding

    @property
    def evicted(self) -> int:
        return self.gap.count if self.gap is not None else 0

    @property
    def history(self) -> list[int]:
        """All that was said, evicted or not."""
        return [*self.prompt, *self.answered]

    @property
    def computed_history(self) -> list[int]:
        """Of it, what the cells depend on."""
        return self.history[: self.num_computed + self.evicted]

    def append(self, token: int) -> None:
        """A token was drawn."""
        self.tokens.append(token)
        self.answered.append(token)

    def begin(self, tokens: list[int], gap: Gap | None) -> None:
        """The cells are to hold `tokens`, of which none is in them yet."""
        self.tokens, self.gap = tokens, gap
        self.num_computed = 0
        self.prompt_end = None
        self._decode_step = None  # which names the sequence, and that may be another one now
        self.num_prompt = self.num_read = len(tokens)

    def drop(self, gap: Gap, count: int) -> None:
        """`count` tokens at the gap left the cells."""
        assert self.num_read == len(self.tokens), "their text was not worked out"
        del self.tokens[gap.head : gap.head + count]
        self.gap = gap
        self.prompt_end = None
        self.num_computed -= count
        self.num_prompt = max(0, self.num_prompt - count)
        self.num_read = len(self.tokens)
        self.newly_evicted += count

    def prefilled(self) -> Prefilled:
        """How far its prompt is read; what was evicted need not be."""
        return Prefilled(len(self.prompt) - self.prompt_left, len(self.prompt))

    def next_tokens(self, count: int) -> list[int]:
        found = self.tokens[self.num_computed : self.num_computed + count]
        return found if len(found) == count else [*found, *self.draft]

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
        told = Text(self.untold, self.num_answered, tuple(self.untold_logprobs), self.num_drafted)
        self.text.append(self.untold)
        self.untold = ""
        self.untold_logprobs.clear()
        return [(self.key, told)]

    def tokens_left(self, context: int) -> int:
        """That the answer may still get, see `length_reason`."""
        limit = self.request.max_tokens
        if self.streams:
            return (context if limit is None else limit) - self.num_answered
        left = context + 1 - len(self.tokens)
        return left if limit is None else min(left, limit - self.num_answered)

    def length_reason(self, context: int) -> FinishReason | None:
        """ "length" once the answer may not grow: asked-for size reached, or the context is full (the
        newest token is not in the cache yet and needs a cell to go on). Where old tokens leave, an
        answer of no asked-for size grows to that of the context: a model may go on forever."""
        limit = self.request.max_tokens
        if self.streams:
            limit = context if limit is None else limit
        elif len(self.tokens) > context:
            return "length"
        return "length" if limit is not None and self.num_answered >= limit else None


@dataclass
class LiveSequence:
    """A finished request's cells, kept for its next turn. `tokens` are exactly those in the cache."""

    handle: int
    tokens: list[int]
    gap: Gap | None = None
    prompt_end: PromptEnd | None = None
    is_saved: bool = False  # as much of it as may be is in host memory too

    @property
    def root(self) -> bytes:
        return ROOT if self.gap is None else self.gap.root
