"""What is asked of the engine, and what it tells back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeinfer.constraint import Constraint
from edgeinfer.errors import UsageError
from edgeinfer.sampling import SamplingParams

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
Outcome = Literal["finished", "failed", "cancelled"]
Overflow = Literal["stream", "stop", "error"]
CacheTier = Literal["none", "live", "memory", "disk"]

NO_STOP_STRINGS = "stop strings do not end an answer that is JSON or a call: they may be in its text"
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, in the Hugging Face template convention."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # tool_calls, tool_call_id, name …

    def as_template_value(self) -> dict[str, Any]:
        return {**self.extra, "role": self.role, "content": self.content}


@dataclass(frozen=True)
class DraftOptions:
    """How one answer is drafted for, of what its model was loaded with; for measuring, so no surface
    offers it. who: "auto", "off", "lookup", "exit" or "draft". length: exactly so many tokens of every
    draft are checked, whatever that costs; 0: as many as are worth it. says: an answer (of another
    model, say) that takes the place of what this one says, token by token, at the cost of its steps."""

    who: str = "auto"
    length: int = 0
    says: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One answer to make. Exactly one of `messages`, `prompt` and `tokens` is given.

    messages: rendered by the model's chat template. prompt: taken as text, no template.
    constraint: what the answer has to be. An answer that ends with `stop` is that, whole; `length` may
    cut it off. JSON and calls have no stop strings: they may be in its text, so they do not end it, and
    a warning says so. stop_before: texts after which that is so: before them the answer is free text.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None  # None: to the end of the context
    stop: tuple[str, ...] = ()
    stop_before: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; n: the chosen token's and the n likeliest others'
    # Where the context is full: "stream" lets the oldest tokens go, "stop" ends the answer with
    # `length`, "error" fails it. (A prompt that does not fit is refused by the latter two.)
    overflow: Overflow = "stop"
    kept_characters: int = 0  # of `prompt`, those of the system prompt, which stays
    constraint: Constraint | None = None
    may_think: bool = False  # before the constrained answer, in the tags of the model's template
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    pinned: bool = False  # what it reads stays on disk for good
    embedding: bool = False  # no answer: the text's embedding, as an `Embedded` event
    visible_tokens: tuple[int, ...] = ()  # control tokens whose text belongs to the answer
    asked_by: str = ""  # who asks: of several who wait, those who have least running come first
    drafts: DraftOptions = DraftOptions()

    @property
    def takes_stops(self) -> bool:
        """Whether a stop string may end the answer, at least in its beginning."""
        held = self.constraint is not None and self.constraint.kind != "regex"
        return not held or bool(self.stop_before)

    def __post_init__(self) -> None:
        given = [x is not None for x in (self.messages, self.prompt, self.tokens)]
        if sum(given) != 1:
            raise UsageError("a request needs exactly one of messages, prompt and tokens")
        if self.max_tokens is not None and not 1 <= self.max_tokens <= 2**31 - 1:
            raise UsageError(f"--max-tokens {self.max_tokens} must be at least 1")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise UsageError(f"--stop: {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are taken")
        if any(not s or len(s) > MAX_STOP_CHARACTERS for s in self.stop):
            raise UsageError(f"--stop: a string must have 1 to {MAX_STOP_CHARACTERS} characters")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise UsageError(f"logprobs {self.logprobs} is outside [0, 20]")
        if self.constraint is not None and self.ignore_eos:
            raise UsageError("an answer with a constraint ends where that ends: leave out ignore_eos")


@dataclass(frozen=True)
class TokenLogprob:
    token: str
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[tuple[str, float], ...] = ()


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Timings:
    load_s: float = 0.0
    ttft_s: float = 0.0  # from submission to the first token; loading excluded
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0  # tokens after the first


@dataclass
class SpeculationStats:
    """mode: who guessed tokens: "lookup", "exit", "draft", several of them ("lookup+exit"), or "none".
    steps: those that checked a draft. reason: why none did, or "none". speedup: how many times faster
    the answer was decoded than it would have been without drafts, by what steps without them cost.
    by_position: of a draft's first token, its second and so on, how many were checked after only right
    ones, and how many of those were accepted."""

    mode: str = "none"
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    reason: str = "none"
    speedup: float = 1.0
    by_position: list[list[int]] = field(default_factory=list)


@dataclass
class KvStats:
    type_k: str = "none"
    type_v: str = "none"
    bytes: int = 0
    bytes_per_token: int = 0
    evicted_tokens: int = 0  # of the conversation, those that the model no longer saw at the end
    newly_evicted: int = 0  # of them, those that left for this request


@dataclass
class CacheStats:
    hit: bool = False
    tier: CacheTier = "none"
    tokens: int = 0
    pinned_tokens: int = 0  # of the prompt, on disk for good


@dataclass
class RunStats:
    """The `edgeinfer` object of DESIGN: what `run --json` prints and the finish chunk carries."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    kv: KvStats = field(default_factory=KvStats)
    cache: CacheStats = field(default_factory=CacheStats)
    backend: str = "none"
    model: str = "none"
    seed: int = 0
    context: int = 0
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """As `dataclasses.asdict`, which takes a third of a millisecond."""
        found = dict(vars(self))
        for name in ("usage", "timings", "speculation", "kv", "cache"):
            found[name] = dict(vars(found[name]))
        found["warnings"] = list(self.warnings)
        return found


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing, for whoever watches it. Counts since the model was loaded."""

    running: int
    waiting: int
    cells: int  # of the KV cache
    used_cells: int  # live conversations, idle ones included
    cache_bytes: int  # of the prompt cache in host memory
    cache_capacity_bytes: int


@dataclass(frozen=True)
class Queued:
    """The request can be answered: its prompt was read and fits. It waits for its turn, if it must."""

    prompt_tokens: int
    prompt_end: str = ""  # its last characters: a template may begin the answer, with a tag for example


@dataclass(frozen=True)
class Started:
    """The request has its turn: the prompt's tokens, and how many of them need no prefill."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Prefilled:
    """Progress through the prompt: `done` of `total` tokens are in the KV cache."""

    done: int
    total: int


@dataclass(frozen=True)
class Text:
    """More of the answer, of one or more tokens. `num_tokens` decoded so far, whether or not their text
    is out yet; `logprobs` of each token since the last of these events; `num_drafted` of the tokens that
    were guessed and right."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    num_drafted: int = 0


@dataclass(frozen=True)
class Embedded:
    """What an embedding request asked for: shape (embedding_size,), mean-pooled, L2-normalized."""

    vector: tuple[float, ...]


@dataclass(frozen=True)
class Ended:
    """The last event of every request, exactly once."""

    outcome: Outcome
    stats: RunStats
    error_type: str = ""  # class name of the error when outcome is "failed"
    error: str = ""


Event = Queued | Started | Prefilled | Text | Embedded | Ended
