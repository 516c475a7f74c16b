"""The engine: requests in, events out, one forward step at a time.

    engine.submit(1, request, prompt_tokens)
    while engine.has_work:
        for key, event in engine.step():
            ...

Single-threaded but for `request_abort`. It owns the runtime: no one else touches its sequences.
"""

from __future__ import annotations

import functools
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeinfer.backend import LogitRows, Runtime, Sampler, SequenceStep, Step
from edgeinfer.engine.conversations import Conversations
from edgeinfer.engine.detokenizer import Detokenizer
from edgeinfer.engine.disk_cache import DiskCache
from edgeinfer.engine.grammar import Grammars, Matcher
from edgeinfer.engine.request import (
    NO_STOP_STRINGS,
    CacheStats,
    Embedded,
    Ended,
    EngineStatus,
    Event,
    FinishReason,
    KvStats,
    Outcome,
    Request,
    RunStats,
    SpeculationStats,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from edgeinfer.engine.scheduler import Demand, Limits, plan
from edgeinfer.engine.sequence import PromptEnd, RunningRequest
from edgeinfer.engine.speculation import Speculation
from edgeinfer.engine.tuner import Choice, Tuner
from edgeinfer.engine.window import Window
from edgeinfer.errors import (
    BackendUnavailable,
    ContextFull,
    EdgeInferError,
    OutOfCells,
    PromptTooLong,
    RequestFailed,
    StepAborted,
    StepFailed,
    UsageError,
)
from edgeinfer.sampling import MAX_SEED

if TYPE_CHECKING:
    from edgeinfer.backend import Logits

log = logging.getLogger("edgeinfer.engine")

Events = list[tuple[int, Event]]

PREFILL_SLICE_S = 0.8  # a prompt beside running streams gets chunks of about this long
FIRST_SLICE = 64  # tokens of such a chunk where nothing tells how long one takes
LEAST_TELLING = 32  # tokens of a step from which on its time tells how long a prompt takes
CLOSED_EARLY = (
    "the answer was brought to its end within its limit of tokens; a larger one lets it say more"
)
HELD_STEPS = 64  # without drafts, where one found no cells
BUSY = "other programs keep the processor busy: fewer threads answered for a while"
MOST_TELL_STRETCH = 3.0  # from six streams on; ten times a second still reads as a stream


def _step_of(chosen: Sequence[tuple[RunningRequest, int]]) -> Step:
    if len(chosen) == 1 and chosen[0][1] == 1 and not chosen[0][0].prompt_left:
        return chosen[0][0].decode_step()
    parts = []
    for running, count in chosen:
        assert running.handle is not None
        end = running.num_computed + count - len(running.tokens)
        rows: LogitRows = "none" if end < 0 else "last" if end == 0 else "all"
        parts.append(SequenceStep(running.handle, running.next_tokens(count), rows))
    return Step(parts)


def _evicted(running: RunningRequest, window: Window) -> list[str]:
    count = running.newly_evicted
    if not count:
        return []
    which = "oldest tokens" if window.eviction == "streaming" else "tokens (those least attended to)"
    return [
        f"{count} of the conversation's {which} left the context of {window.size}:"
        " the model no longer sees them"
    ]


class Engine:
    def __init__(
        self,
        runtime: Runtime,
        *,
        model: str,
        max_running: int = 1,
        cache_bytes: int = 0,
        disk: DiskCache | None = None,
        window: Window | None = None,
        tell_interval_s: float = 0.0,
        tuner: Tuner | None = None,
        speculation: Speculation | None = None,
        no_speculation: str = "none",
    ) -> None:
        """max_running: requests that run at once. cache_bytes: host memory for idle conversations. disk:
        where they survive the process.
        window: what the model sees at once; None: the whole context, with the usual sinks.
        tell_interval_s: while there is nothing but tokens to decode, their text is worked out and told
        so far apart, and up to three times as far where there are many streams. (Between two steps
        everything the engine needs has left the processor's caches for the weights: doing it for five
        tokens at once costs little more than for one.)
        tuner: chooses every step's threads and padding; None leaves them as the runtime was loaded.
        speculation: drafts; None: none, and `no_speculation` says why.
        """
        self.runtime = runtime
        self.model = model
        self.max_running = min(max_running, runtime.facts.max_sequences)
        self.window = window or Window.of(runtime.facts.context)
        self.conversations = Conversations(runtime, self.window, cache_bytes, disk, self._reading_rate)
        self.grammars = Grammars(runtime.tokenizer, runtime.facts.vocab_size)
        self._waiting: list[RunningRequest] = []
        self._running: list[RunningRequest] = []
        self._events: Events = []
        self._prefill_s_per_token = 0.0
        self._last_was_large = False
        self._tell_interval_s = tell_interval_s
        self._told = 0.0  # perf_counter() of when text was last told
        self._tell_now = False
        self._tuner = tuner
        self._choice = Choice(0)
        self._shape = (0, 0, 0)  # of the last step: tokens, rows of logits, longest context
        self._speculation = speculation
        self._no_speculation = SpeculationStats(reason=no_speculation)
        self._is_reading = False  # rows of logits, which last until the cache is touched
        self._overrun: dict[int, int] = {}  # sequences with tokens that were not accepted: true length
        self._unused: list[int] = []  # sequences that nobody has any more
        self._turns: dict[str, int] = {}  # of those who wait, by who asks: when each had one last
        self._num_embedding = 0  # of the running requests, those for an embedding
        self._last_was_embedding = False

    # -- requests --------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(
        self,
        key: int,
        request: Request,
        tokens: Sequence[int],
        submitted: float | None = None,
        matcher: Matcher | None = None,
        kept: int = 0,
    ) -> Events:
        """Take a request whose prompt is `tokens`. Returns its refusal, or nothing yet.

        kept: tokens at its beginning that are its system prompt, which stays when the context is full.
        submitted: perf_counter() of when the user asked, for TTFT. matcher: of the request's constraint,
        from `grammars`; None: made here, which takes milliseconds and the first time half a second.
        """
        seed = request.sampling.seed
        warnings = []
        if request.stop and not request.takes_stops:
            request = replace(request, stop=())
            warnings.append(NO_STOP_STRINGS)
        running = RunningRequest(
            key,
            request,
            tuple(tokens),
            secrets.randbelow(MAX_SEED + 1) if seed is None else seed,
            Detokenizer(request.stop, request.stop_before),
            matcher=matcher,
            warnings=warnings,
            kept=kept,
        )
        if submitted is not None:
            running.submitted = submitted
        refusal = self.refusal(request, tokens)
        if refusal is not None:
            return [(key, self._failure(running, refusal))]
        if request.constraint is not None and matcher is None:
            try:
                running.matcher = self.grammars.matcher(request.constraint)
            except EdgeInferError as error:
                return [(key, self._failure(running, error))]
        self._waiting.append(running)
        return []

    def refusal(self, request: Request, tokens: Sequence[int]) -> EdgeInferError | None:
        """Why a request whose prompt is `tokens` can never be answered. Safe from any thread."""
        facts = self.runtime.facts
        if request.embedding and not facts.can.embeddings:
            return BackendUnavailable(
                f"{facts.backend} makes no embeddings; use a model that another backend runs"
            )
        if request.constraint is not None and not facts.can.token_masks:
            return BackendUnavailable(
                f"{facts.backend} cannot hold answers to a form (it has no token masks)"
            )
        if not tokens:
            return UsageError("the prompt is empty; say something")
        most = facts.context if request.embedding else self.window.size
        if len(tokens) >= most and (request.embedding or request.overflow != "stream"):
            return PromptTooLong(len(tokens), most, option=self._size_option(most))
        biased = [token for token, _ in request.sampling.logit_bias]
        said = request.drafts.says
        for name, ids in (("", tokens), ("logit_bias: ", biased), ("an answer's ", said)):
            bad = next((t for t in ids if not 0 <= t < facts.vocab_size), None)
            if bad is not None:
                return UsageError(f"{name}token {bad} is outside the vocabulary of {facts.vocab_size}")
        return None

    def _size_option(self, most: int) -> str:
        """What makes a limit of so many tokens larger."""
        return "--window" if most < self.runtime.facts.context else "--ctx"

    def cancel(self, key: int) -> Events:
        """End a request. Unknown or finished keys are ignored: the end and the wish may cross."""
        for running in self._waiting + self._running:
            if running.key == key:
                return self._end(running, "cancelled", "cancelled")
        return []

    def status(self) -> EngineStatus:
        """Safe from any thread; of a moment in the middle of a step if it must be."""
        cells = self.runtime.facts.cells
        return EngineStatus(
            running=len(self._running),
            waiting=len(self._waiting),
            cells=cells,
            used_cells=cells - self.runtime.free_cells(),
            cache_bytes=self.conversations.prefixes.num_bytes,
            cache_capacity_bytes=self.conversations.prefixes.capacity,
        )

    @functools.cached_property
    def longest_piece(self) -> int:
        """No token stands for more characters of a text. Reads the vocabulary the first time; safe from
        any thread."""
        tokenizer, longest = self.runtime.tokenizer, 1
        for token in range(tokenizer.vocab_size):
            longest = max(longest, len(tokenizer.piece(token)), len(tokenizer.text(token)))
        return longest

    def is_alone(self, key: int) -> bool:
        """Whether a step now under way serves this request only, so that it may be aborted."""
        return [running.key for running in self._running] == [key]

    def fail_all(self, error: EdgeInferError) -> Events:
        events: Events = []
        for running in self._waiting + self._running:
            events += self._end(running, "failed", "stop", error)
        return events

    # -- one step --------------------------------------------------------------------------------

    def step(self) -> Events:
        """Admit whoever can run and tell; if there was nobody new, run one forward step and tell what
        came of it. (Admissions are told before the step, which may be long.)"""
        self._events = []
        self._admit()
        if not self._events:
            self._make_room()
            if ready := [running for running in self._running if running.is_all_computed]:
                self._begin_answers(ready)
            elif self._num_embedding and (embedding := self._next_embedding()) is not None:
                self._embed(embedding)
            elif chosen := self._plan():
                self._forward(chosen)
                self._tell_texts()
        events, self._events = self._events, []
        return events

    def _begin_answers(self, ready: list[RunningRequest]) -> None:
        """The first tokens of answers to prompts whose logits were kept: no step is needed."""
        for running in ready:
            assert running.prompt_end is not None, "nothing to run, and nothing to draw from"
            self._sample(running, running.prompt_end.logits)
        self._tell_texts()

    def _make_room(self) -> None:
        for running in [r for r in self._running if r.streams and len(r.tokens) > self.window.size]:
            try:
                self.conversations.make_room(running)
            except (StepFailed, OutOfCells) as error:
                self._events += self._end(running, "failed", "stop", error)

    def _plan(self) -> list[tuple[RunningRequest, int]]:
        if self._speculation is not None:
            self._draft(self._speculation)
        if len(self._running) == 1 and not self._running[0].prompt_left:
            self._last_was_large = False
            alone = self._running[0]
            return [
                (alone, 1 + len(alone.draft))
            ]  # nothing to plan: the path of every token of a lone answer
        facts = self.runtime.facts
        # Private cells are computed sequence by sequence: a step of many small pieces is small for all.
        most = facts.max_step_tokens
        small = most if facts.kv_layout == "private" else max(facts.stable_chunk_tokens - 1, 1)
        limits = Limits(most, facts.stable_chunk_tokens, small, self._prefill_slice())
        demands = [
            Demand(r.key, 0 if r.prompt_left else 1 + len(r.draft), r.prompt_left)
            for r in self._running
            if not r.request.embedding
        ]
        planned = plan(demands, limits, self._last_was_large)
        self._last_was_large = planned.is_large
        by_key = {r.key: r for r in self._running}
        if len(planned.parts) < len(demands):
            # Whoever was left out comes first next time.
            served = {key for key, _ in planned.parts}
            self._running.sort(key=lambda r: r.key in served)
        return [(by_key[key], tokens) for key, tokens in planned.parts]

    def _draft(self, speculation: Speculation) -> None:
        """What each request's step checks. Where a prompt is read, or nothing was answered yet, steps
        are as they are."""
        if all(running.is_decoding and not running.prompt_left for running in self._running):
            speculation.choose(self._running)
            return
        for running in self._running:
            running.draft = ()

    def reads_within(self, seconds: float) -> bool:
        """Whether the prompts of those who run are sure to be read in that time."""
        rate = self._reading_rate()
        left = sum(running.prompt_left for running in self._running)
        return rate is not None and left * rate <= seconds

    def _reading_rate(self) -> float | None:
        """Seconds that a prompt token takes; None where nothing was measured."""
        rate: float | None = None
        if self._tuner is not None:
            reading = (r.num_computed for r in self._running if r.prompt_left)
            rate = self._tuner.prefill_s_per_token(max(reading, default=0))
        return rate or self._prefill_s_per_token or None

    def _prefill_slice(self) -> int:
        """Prompt tokens that take about PREFILL_SLICE_S."""
        rate = self._reading_rate()
        return int(PREFILL_SLICE_S / rate) if rate else FIRST_SLICE

    def _forward(self, chosen: list[tuple[RunningRequest, int]]) -> None:
        step = _step_of(chosen)
        tuner, speculation = self._tuner, self._speculation
        # (What a lone token costs is to be known where drafts are weighed against it.)
        if tuner is not None and tuner.leaves_decode_alone and speculation is None:
            tuner = None if self._is_lone_decode(chosen) else tuner
        is_checking = any(running.draft for running, _ in chosen)
        if tuner is not None:
            step = self._tune(tuner, step, chosen)
        begin = time.perf_counter()
        try:
            result = self.runtime.forward(step)
        except StepAborted:
            return  # somebody cancelled: nothing was kept, the next plan is without them
        except OutOfCells:
            if speculation is not None and is_checking:
                speculation.hold(HELD_STEPS)
                return
            if self.conversations.release_oldest():
                return
            victim = max(chosen, key=lambda item: item[0].admitted)[0]
            error = OutOfCells("the KV cache is full; raise --ctx or run fewer requests at once")
            self._events += self._end(victim, "failed", "stop", error)
            return
        except StepFailed as error:
            for running, _ in chosen:
                self._events += self._end(running, "failed", "stop", error)
            return
        seconds = time.perf_counter() - begin
        if tuner is not None and not self._has_passes(step):
            tuner.observe(self._choice, *self._shape, seconds)
        if step.num_tokens >= LEAST_TELLING and not is_checking:
            self._learn_rate(seconds, step.num_tokens)
        before = {running.key: running.num_answered for running, _ in chosen} if is_checking else {}
        self._is_reading = True
        try:
            for index, (running, count) in enumerate(chosen):
                self._read_rows(running, count, result.starts[index], result.counts[index])
        finally:
            self._is_reading = False
            self._tidy()
        if speculation is not None and is_checking:
            brought = {running.key: running.num_answered - before[running.key] for running, _ in chosen}
            speculation.took(brought, seconds)

    def _read_rows(self, running: RunningRequest, count: int, first_row: int, num_rows: int) -> None:
        """What came of a step for one of its requests."""
        if running.draft:
            self._check(running, first_row)
            return
        prefilling = running.prompt_left > 0
        running.num_computed += count
        if num_rows:
            if not running.is_decoding and self._repeats(running, count):
                logits = self.runtime.logits(first_row).copy()
                running.prompt_end = PromptEnd(len(running.tokens), logits)
            self._sample(running, first_row)
        elif prefilling and not running.is_decoding:
            self._events.append((running.key, running.prefilled()))

    def _tidy(self) -> None:
        """What touches the cache, and so the rows of the step, which nobody reads any more."""
        unused, self._unused = self._unused, []
        overrun, self._overrun = self._overrun, {}
        for handle, length in overrun.items():
            self.runtime.rewind(handle, length)
        for handle in unused:
            self.runtime.free(handle)

    def _check(self, running: RunningRequest, first_row: int) -> None:
        """Say what the model says after each token of a draft, as long as that is the draft's next."""
        assert self._speculation is not None and running.handle is not None
        handle, drafted, running.draft = running.handle, running.draft, ()
        self._speculation.checks(running, len(drafted))
        for number in range(1 + len(drafted)):
            running.num_computed += 1
            self._overrun[handle] = running.num_computed
            self._sample(running, first_row + number)
            if running.handle is None:  # it ended, and its cells may be gone
                return
            if number == len(drafted):
                del self._overrun[handle]
            else:
                is_hit = running.tokens[-1] == drafted[number]
                running.num_drafted += is_hit
                self._speculation.checked(running, number, is_hit=is_hit)
                if not is_hit:
                    return

    def _repeats(self, running: RunningRequest, count: int) -> bool:
        """Whether a prompt's logits, of a last piece of `count` tokens, are those it would have again if
        it were read afresh: see RuntimeFacts on large and small steps."""
        stable = self.runtime.facts.stable_chunk_tokens
        return count >= stable or running.num_prompt < stable

    # -- embeddings ------------------------------------------------------------------------------

    def _next_embedding(self) -> RunningRequest | None:
        """Whose turn it is, if it is anybody's: pieces of texts and steps of answers take turns."""
        others = len(self._running) > self._num_embedding
        self._last_was_embedding = not (self._last_was_embedding and others)
        if not self._last_was_embedding:
            return None
        return next(running for running in self._running if running.request.embedding)

    def _embed(self, running: RunningRequest) -> None:
        """One piece of a text, as small as answers beside it need it; the last gives the embedding."""
        facts = self.runtime.facts
        piece = running.next_tokens(min(facts.max_logit_rows, facts.max_step_tokens))
        assert running.handle is not None
        try:
            hidden = self.runtime.embed(running.handle, piece)
        except StepAborted:
            return  # nothing was kept; whoever cancelled is heard before the next step
        except (OutOfCells, StepFailed) as error:
            self._events += self._end(running, "failed", "stop", error)
            return
        total = running.hidden_sum
        running.hidden_sum = [a + b for a, b in zip(total, hidden, strict=True)] if total else hidden
        running.num_computed += len(piece)
        if running.prompt_left:
            self._events.append((running.key, running.prefilled()))
            return
        norm = math.sqrt(math.fsum(x * x for x in running.hidden_sum))
        if not math.isfinite(norm) or norm == 0.0:
            damage = StepFailed("the model produced numbers that are not finite; is the file damaged?")
            self._events += self._end(running, "failed", "stop", damage)
            return
        vector = tuple(x / norm for x in running.hidden_sum)
        self._events.append((running.key, Embedded(vector)))
        self._events += self._end(running, "finished", "stop")

    def _tune(self, tuner: Tuner, step: Step, chosen: list[tuple[RunningRequest, int]]) -> Step:
        """Set the threads the step is to have, and return it with the padding it is to have."""
        facts = self.runtime.facts
        if self._is_lone_decode(chosen):
            self._shape = (1, 1, chosen[0][0].num_computed)
        else:
            rows = sum(part.num_rows for part in step.parts)
            context = max(running.num_computed + count for running, count in chosen)
            self._shape = (step.num_tokens, rows, context)
        most = facts.max_step_tokens
        if facts.stable_chunk_tokens > 1:
            most = min(most, facts.stable_chunk_tokens - 1)
        if facts.kv_layout == "private" and any(running.draft for running, _ in chosen):
            most = step.num_tokens  # streams of several tokens are not padded
        choice = self._choice = tuner.choose(*self._shape, most)
        if choice.threads != facts.threads or choice.threads != facts.threads_batch:
            self.runtime.set_threads(choice.threads, choice.threads)
            if tuner.is_slowed and choice.threads < facts.threads:
                for running, _ in chosen:
                    if BUSY not in running.warnings:
                        running.warnings.append(BUSY)
        return Step(step.parts, choice.padding) if choice.padding else step

    def _has_passes(self, step: Step) -> bool:
        """Whether it went through the weights several times, as no step of one size does."""
        if self.runtime.facts.kv_layout != "private" or self._speculation is None:
            return False
        return len({len(part.tokens) for part in step.parts}) > 1

    @staticmethod
    def _is_lone_decode(chosen: list[tuple[RunningRequest, int]]) -> bool:
        return len(chosen) == 1 and chosen[0][1] == 1

    def _learn_rate(self, seconds: float, tokens: int) -> None:
        rate, known = seconds / tokens, self._prefill_s_per_token
        self._prefill_s_per_token = rate if known == 0.0 else 0.7 * known + 0.3 * rate

    # -- answering -------------------------------------------------------------------------------

    def _sample(self, running: RunningRequest, row: int | Logits) -> None:
        """Draw one token, from a row of the last step or one that was kept; ends the request where it
        ends. Its text may be worked out later."""
        runtime, request = self.runtime, running.request
        assert running.sampler is not None
        try:
            if running.matcher is None:
                token = runtime.sample(row, running.sampler)
            else:
                token = self._sample_within(running, running.matcher, running.sampler, row)
        except (StepFailed, RequestFailed, ValueError) as error:
            failure = error if isinstance(error, EdgeInferError) else StepFailed(str(error))
            self._events += self._end(running, "failed", "stop", failure)
            return
        if running.num_answered < len(request.drafts.says):
            token = request.drafts.says[running.num_answered]
        now = time.perf_counter()
        if not running.is_decoding:
            running.first_token = now
            self._tell_now = True
        running.last_token = now
        if runtime.tokenizer.is_end(token) and not request.ignore_eos:
            running.read(runtime.tokenizer)  # up to here: the end token is no text
            running.append(token)
            running.num_read = len(running.tokens)
            self._events += self._end(running, "finished", "stop")
            return
        if request.logprobs is not None:  # not of an end token, whose text is not in the answer
            logits = runtime.logits(row) if isinstance(row, int) else row
            running.untold_logprobs.append(self._logprob(logits, token, request.logprobs))
        running.append(token)
        size = self.window.size
        reason: FinishReason | None = running.length_reason(size)
        if running.has_own_end and self._is_at_end(running):
            reason = "stop"
        if reason == "length" and request.overflow == "error" and len(running.tokens) > size:
            full = ContextFull(size, option=self._size_option(size))
            self._events += self._end(running, "failed", "length", full)
        elif reason is not None:
            self._events += self._end(running, "finished", reason)

    def _is_at_end(self, running: RunningRequest) -> bool:
        """Whether a stop string was met, or nothing but an end token may come (which costs a step)."""
        if running.request.stop:
            running.read(self.runtime.tokenizer)
            if running.detokenizer.stopped_by is not None:
                return True
        return running.matcher is not None and running.matcher.is_over

    def _sample_within(
        self, running: RunningRequest, matcher: Matcher, sampler: Sampler, row: int | Logits
    ) -> int:
        """Draw one token of a constrained answer. Raises RequestFailed, StepFailed, ValueError."""
        runtime = self.runtime
        token = runtime.sample(row, sampler, matcher.mask())
        if not runtime.tokenizer.is_end(token):
            return matcher.accept(token, running.tokens_left(self.window.size) - 1)
        if not matcher.may_end:
            raise RequestFailed("the answer ended before its form was complete")
        return token

    def _tell_texts(self) -> None:
        """What was answered since text was last told; later, if that was just now and the next step is
        sure to be as short as this one."""
        now = time.perf_counter()
        if not (
            self._tell_now
            or self._events
            or self._waiting
            or now - self._told >= self._tell_interval_s * self._tell_stretch()
            or not all(running.is_decoding for running in self._running)
        ):
            return
        self._told, self._tell_now = now, False
        for running in self._running:
            running.read(self.runtime.tokenizer)
            self._events += running.take_untold()

    def _tell_stretch(self) -> float:
        """How much rarer the texts of several streams are told: each has to wake its reader, on a core
        that decodes (8 streams on two cores: 5 to 8 % of their speed), and each of them is slower."""
        return min(MOST_TELL_STRETCH, max(1.0, len(self._running) / 2))

    def _logprob(self, logits: Logits, token: int, wanted: int) -> TokenLogprob:
        """Of the model's own distribution, before samplers cut or scale it."""
        import numpy as np

        shifted = logits.astype(np.float64) - float(logits.max())
        log_sum = float(np.log(np.exp(shifted).sum()))
        tokenizer = self.runtime.tokenizer
        top: list[tuple[str, float]] = []
        if wanted:
            likeliest = np.argpartition(-shifted, min(wanted, shifted.size - 1))[:wanted]
            for index in sorted(likeliest, key=lambda i: -shifted[i]):
                top.append((tokenizer.text(int(index)), float(shifted[index]) - log_sum))
        return TokenLogprob(
            tokenizer.text(token),
            float(shifted[token]) - log_sum,
            tuple(tokenizer.piece(token)),
            tuple(top),
        )

    # -- the end ---------------------------------------------------------------------------------

    def _failure(self, running: RunningRequest, error: EdgeInferError) -> Ended:
        return Ended("failed", self._stats(running, "stop"), type(error).__name__, str(error))

    def _end(
        self,
        running: RunningRequest,
        outcome: Outcome,
        reason: FinishReason,
        error: EdgeInferError | None = None,
    ) -> Events:
        """Take a request out, keep its prefix, and make its last events: rest of the text, the end."""
        if running in self._waiting:
            self._waiting.remove(running)
        else:
            self._running.remove(running)
            self._num_embedding -= running.request.embedding
        running.read(self.runtime.tokenizer)
        running.untold += running.detokenizer.finish()
        if running.matcher is not None:
            if running.matcher.closed_early:
                running.warnings.append(CLOSED_EARLY)
            running.matcher = None
        events: Events = running.take_untold()
        stats = self._stats(running, reason)
        if running.sampler is not None:
            running.sampler.close()
            running.sampler = None
        if running.handle is not None:
            if running.num_computed and outcome != "failed" and not running.request.embedding:
                self.conversations.keep(running)
                if running.request.pinned:
                    stats.cache.pinned_tokens = self.conversations.pin(running)
                    stats.warnings += self.conversations.take_problems()
            else:
                self._overrun.pop(running.handle, None)
                self._unused.append(running.handle)
                running.handle = None
                if not self._is_reading:
                    self._tidy()
        if error is not None:
            ended = Ended(outcome, stats, type(error).__name__, str(error))
        else:
            ended = Ended(outcome, stats)
        return [*events, (running.key, ended)]

    def _stats(self, running: RunningRequest, reason: FinishReason) -> RunStats:
        facts = self.runtime.facts
        answered = running.num_answered
        timings = Timings()
        if running.first_token:
            timings.ttft_s = running.first_token - running.submitted
            prefill_s = running.first_token - running.admitted
            timings.prefill_tok_s = running.num_prefilled / prefill_s if prefill_s > 0 else 0.0
            decode_s = running.last_token - running.first_token
            timings.decode_tok_s = (answered - 1) / decode_s if decode_s > 0 else 0.0
        return RunStats(
            text="".join(running.text),
            finish_reason=reason,
            usage=Usage(len(running.prompt), answered, running.num_cached),
            timings=timings,
            speculation=self._speculation.end(running) if self._speculation else self._no_speculation,
            kv=KvStats(
                facts.kv_type_k,
                facts.kv_type_v,
                running.num_computed * facts.kv_bytes_per_token,
                facts.kv_bytes_per_token,
                running.evicted,
                running.newly_evicted,
            ),
            cache=CacheStats(running.num_cached > 0, running.cache_tier, running.num_cached),
            backend=facts.backend,
            model=self.model,
            seed=running.seed,
            context=self.window.size,
            warnings=[
                *facts.warnings,
                *running.warnings,
                *_evicted(running, self.window),
                *self.conversations.take_problems(),
            ],
        )

    # -- admission -------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            running = self._next_waiting()
            if running is None:
                return
            self._waiting.remove(running)
            running.admitted = time.perf_counter()
            self._num_embedding += running.request.embedding
            try:
                self.conversations.place(running, self._running)
                if not running.request.embedding:
                    running.sampler = self._make_sampler(running)
            except Exception as error:  # whatever it is: nobody waits for an answer that never comes
                self._running.append(running)
                failure = error if isinstance(error, EdgeInferError) else EdgeInferError(str(error))
                if not isinstance(error, EdgeInferError | ValueError):
                    log.exception("a request was not begun")
                    failure = RequestFailed(f"the engine failed: {error!r}")
                self._events += self._end(running, "failed", "stop", failure)
                continue
            self._running.append(running)
            self._events.append((running.key, Started(len(running.prompt), running.num_cached)))

    def _next_waiting(self) -> RunningRequest | None:
        """Who is admitted next: of those who ask, the one with least running, then the one whose turn
        is longest ago; of its requests, the oldest. None if each had better wait."""
        has_running = Counter(running.request.asked_by for running in self._running)
        askers = {waiting.request.asked_by for waiting in self._waiting}
        turns = self._turns = {asker: self._turns.get(asker, 0) for asker in askers}
        order = sorted(
            self._waiting,
            key=lambda waiting: (
                has_running[waiting.request.asked_by],
                turns[waiting.request.asked_by],
            ),
        )
        will_be_shared = self.conversations.will_be_shared
        chosen = next((waiting for waiting in order if not will_be_shared(waiting, self._running)), None)
        if chosen is not None:
            turns[chosen.request.asked_by] = max(turns.values()) + 1
        return chosen

    def _make_sampler(self, running: RunningRequest) -> Sampler:
        params = running.request.sampling
        sampler = self.runtime.create_sampler(params, running.seed)
        if params.has_penalties:
            window = max(params.penalty_last_n, params.dry_last_n)
            for token in running.prompt[-window:]:
                sampler.accept(token)
        return sampler

    def use_idle(self) -> bool:
        """Do a piece of what can be done while nobody waits; False if there is none."""
        return self.conversations.use_idle()

    # -- invariants ------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """For tests: the engine, the runtime and the prefix cache agree."""
        resting = self.conversations.idle
        handles = [r.handle for r in self._running] + [idle.handle for idle in resting]
        assert len(set(handles)) == len(handles), "two owners of one sequence"
        for running in self._running:
            assert running.handle is not None
            assert self.runtime.length(running.handle) == running.num_computed
            assert len(running.history) == len(running.tokens) + running.evicted
            if running.gap is not None:
                assert running.gap.cells(running.history) == running.tokens
        for idle in resting:
            assert self.runtime.length(idle.handle) == len(idle.tokens)
        self.conversations.prefixes.check_integrity()
        self.runtime.check_integrity()

    def close(self, seconds: float = 0.0) -> None:
        """seconds: how long what is worth keeping may take to be written to disk."""
        self.conversations.close(seconds)
        self.runtime.close()
