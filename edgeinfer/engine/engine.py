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

from edgeinfer.backend import Runtime, Sampler, SequenceStep, Step
from edgeinfer.engine.detokenizer import Detokenizer
from edgeinfer.engine.grammar import Grammars, Matcher
from edgeinfer.engine.prefix_cache import PrefixCache, common_length
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
    Prefilled,
    Request,
    RunStats,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from edgeinfer.engine.scheduler import Demand, Limits, plan
from edgeinfer.engine.sequence import LiveSequence, RunningRequest
from edgeinfer.engine.tuner import Choice, Tuner
from edgeinfer.errors import (
    BackendUnavailable,
    EdgeInferError,
    OutOfCells,
    PromptTooLong,
    RequestFailed,
    SnapshotRejected,
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
BUSY = "other programs keep the processor busy: fewer threads answered for a while"
MOST_TELL_STRETCH = 3.0  # from six streams on; ten times a second still reads as a stream
MIN_FORK_TOKENS = 32  # a shorter common prefix with a running sequence is not worth sharing
MIN_SAVED_TAIL = 32  # a shorter tail that the next turn contradicts is not worth keeping


def _step_of(chosen: Sequence[tuple[RunningRequest, int]]) -> Step:
    if len(chosen) == 1 and chosen[0][1] == 1 and chosen[0][0].is_decoding:
        return chosen[0][0].decode_step()
    parts = []
    for running, count in chosen:
        assert running.handle is not None
        last = running.num_computed + count == len(running.tokens)
        parts.append(
            SequenceStep(running.handle, running.next_tokens(count), "last" if last else "none")
        )
    return Step(parts)


class Engine:
    def __init__(
        self,
        runtime: Runtime,
        *,
        model: str,
        max_running: int = 1,
        cache_bytes: int = 0,
        tell_interval_s: float = 0.0,
        tuner: Tuner | None = None,
    ) -> None:
        """max_running: requests that run at once. cache_bytes: host memory for idle conversations.
        tell_interval_s: while there is nothing but tokens to decode, their text is worked out and told
        so far apart, and up to three times as far where there are many streams. (Between two steps
        everything the engine needs has left the processor's caches for the weights: doing it for five
        tokens at once costs little more than for one.)
        tuner: chooses every step's threads and padding; None leaves them as the runtime was loaded.
        """
        self.runtime = runtime
        self.model = model
        self.max_running = min(max_running, runtime.facts.max_sequences)
        self.prefixes = PrefixCache(cache_bytes if runtime.facts.can.snapshot else 0)
        self.grammars = Grammars(runtime.tokenizer, runtime.facts.vocab_size)
        self._waiting: list[RunningRequest] = []
        self._running: list[RunningRequest] = []
        self._idle: list[LiveSequence] = []  # least recently used first
        self._events: Events = []
        self._prefill_s_per_token = 0.0
        self._last_was_large = False
        self._tell_interval_s = tell_interval_s
        self._told = 0.0  # perf_counter() of when text was last told
        self._tell_now = False
        self._tuner = tuner
        self._choice = Choice(0)
        self._shape = (0, 0, 0)  # of the last step: tokens, rows of logits, longest context
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
    ) -> Events:
        """Take a request whose prompt is `tokens`. Returns its refusal, or nothing yet.

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
        if len(tokens) >= facts.context:
            return PromptTooLong(len(tokens), facts.context)
        biased = [token for token, _ in request.sampling.logit_bias]
        for name, ids in (("", tokens), ("logit_bias: ", biased)):
            bad = next((t for t in ids if not 0 <= t < facts.vocab_size), None)
            if bad is not None:
                return UsageError(f"{name}token {bad} is outside the vocabulary of {facts.vocab_size}")
        return None

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
            cache_bytes=self.prefixes.num_bytes,
            cache_capacity_bytes=self.prefixes.capacity,
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
            if self._num_embedding and (embedding := self._next_embedding()) is not None:
                self._embed(embedding)
            elif chosen := self._plan():
                self._forward(chosen)
                self._tell_texts()
        events, self._events = self._events, []
        return events

    def _plan(self) -> list[tuple[RunningRequest, int]]:
        if len(self._running) == 1 and not self._running[0].prompt_left:
            self._last_was_large = False
            return [(self._running[0], 1)]  # nothing to plan: the path of every token of a lone answer
        facts = self.runtime.facts
        # Private cells are computed sequence by sequence: a step of many small pieces is small for all.
        most = facts.max_step_tokens
        small = most if facts.kv_layout == "private" else max(facts.stable_chunk_tokens - 1, 1)
        limits = Limits(most, facts.stable_chunk_tokens, small, self._prefill_slice())
        demands = [
            Demand(r.key, 0 if r.prompt_left else 1, r.prompt_left)
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
        tuner = self._tuner
        if tuner is not None and tuner.leaves_decode_alone and self._is_lone_decode(chosen):
            tuner = None
        if tuner is not None:
            step = self._tune(tuner, step, chosen)
        begin = time.perf_counter()
        try:
            result = self.runtime.forward(step)
        except StepAborted:
            return  # somebody cancelled: nothing was kept, the next plan is without them
        except OutOfCells:
            if self._idle:
                self._release(self._idle[0])
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
        if tuner is not None:
            tuner.observe(self._choice, *self._shape, seconds)
        if step.num_tokens >= LEAST_TELLING:
            self._learn_rate(seconds, step.num_tokens)
        for index, (running, count) in enumerate(chosen):
            prefilling = running.prompt_left > 0
            running.num_computed += count
            if result.counts[index]:
                self._sample(running, result.starts[index])
            elif prefilling:
                done = running.num_computed
                self._events.append((running.key, Prefilled(done, len(running.prompt))))

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
            self._events.append((running.key, Prefilled(running.num_computed, len(running.prompt))))
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
            rows = sum(part.logits != "none" for part in step.parts)
            context = max(running.num_computed + count for running, count in chosen)
            self._shape = (step.num_tokens, rows, context)
        most = facts.max_step_tokens
        if facts.stable_chunk_tokens > 1:
            most = min(most, facts.stable_chunk_tokens - 1)
        choice = self._choice = tuner.choose(*self._shape, most)
        if choice.threads != facts.threads or choice.threads != facts.threads_batch:
            self.runtime.set_threads(choice.threads, choice.threads)
            if tuner.is_slowed and choice.threads < facts.threads:
                for running, _ in chosen:
                    if BUSY not in running.warnings:
                        running.warnings.append(BUSY)
        return Step(step.parts, choice.padding) if choice.padding else step

    @staticmethod
    def _is_lone_decode(chosen: list[tuple[RunningRequest, int]]) -> bool:
        return len(chosen) == 1 and chosen[0][1] == 1

    def _learn_rate(self, seconds: float, tokens: int) -> None:
        rate, known = seconds / tokens, self._prefill_s_per_token
        self._prefill_s_per_token = rate if known == 0.0 else 0.7 * known + 0.3 * rate

    # -- answering -------------------------------------------------------------------------------

    def _sample(self, running: RunningRequest, row: int) -> None:
        """Draw one token; ends the request where it ends. Its text may be worked out later."""
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
        now = time.perf_counter()
        if not running.is_decoding:
            running.first_token = now
            self._tell_now = True
        running.last_token = now
        if runtime.tokenizer.is_end(token) and not request.ignore_eos:
            running.read(runtime.tokenizer)  # up to here: the end token is no text
            running.tokens.append(token)
            running.num_read = len(running.tokens)
            self._events += self._end(running, "finished", "stop")
            return
        if request.logprobs is not None:  # not of an end token, whose text is not in the answer
            running.untold_logprobs.append(self._logprob(runtime.logits(row), token, request.logprobs))
        running.tokens.append(token)
        reason: FinishReason | None = running.length_reason(runtime.facts.context)
        if running.has_own_end and self._is_at_end(running):
            reason = "stop"
        if reason is not None:
            self._events += self._end(running, "finished", reason)

    def _is_at_end(self, running: RunningRequest) -> bool:
        """Whether a stop string was met, or nothing but an end token may come (which costs a step)."""
        if running.request.stop:
            running.read(self.runtime.tokenizer)
            if running.detokenizer.stopped_by is not None:
                return True
        return running.matcher is not None and running.matcher.is_over

    def _sample_within(
        self, running: RunningRequest, matcher: Matcher, sampler: Sampler, row: int
    ) -> int:
        """Draw one token of a constrained answer. Raises RequestFailed, StepFailed, ValueError."""
        runtime = self.runtime
        token = runtime.sample(row, sampler, matcher.mask())
        if not runtime.tokenizer.is_end(token):
            return matcher.accept(token, running.tokens_left(runtime.facts.context) - 1)
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
            handle, running.handle = running.handle, None
            keep = running.num_computed and outcome != "failed" and not running.request.embedding
            if keep:
                self._idle.append(LiveSequence(handle, running.tokens[: running.num_computed]))
            else:
                self.runtime.free(handle)
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
            prefilled = len(running.prompt) - running.num_cached
            prefill_s = running.first_token - running.admitted
            timings.prefill_tok_s = prefilled / prefill_s if prefill_s > 0 else 0.0
            decode_s = running.last_token - running.first_token
            timings.decode_tok_s = (answered - 1) / decode_s if decode_s > 0 else 0.0
        return RunStats(
            text="".join(running.text),
            finish_reason=reason,
            usage=Usage(len(running.prompt), answered, running.num_cached),
            timings=timings,
            kv=KvStats(
                facts.kv_type_k,
                facts.kv_type_v,
                running.num_computed * facts.kv_bytes_per_token,
                running.evicted,
            ),
            cache=CacheStats(running.num_cached > 0, running.cache_tier, running.num_cached),
            backend=facts.backend,
            model=self.model,
            seed=running.seed,
            context=facts.context,
            warnings=[*facts.warnings, *running.warnings],
        )

    # -- admission and the prefix cache ----------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            running = self._next_waiting()
            if running is None:
                return
            self._waiting.remove(running)
            running.admitted = time.perf_counter()
            self._num_embedding += running.request.embedding
            try:
                self._place(running)
                if not running.request.embedding:
                    running.sampler = self._make_sampler(running)
            except (EdgeInferError, ValueError) as error:
                failure = error if isinstance(error, EdgeInferError) else EdgeInferError(str(error))
                self._running.append(running)
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
        chosen = next((waiting for waiting in order if not self._will_be_shared(waiting)), None)
        if chosen is not None:
            turns[chosen.request.asked_by] = max(turns.values()) + 1
        return chosen

    def _will_be_shared(self, waiting: RunningRequest) -> bool:
        """Whether somebody is just reading what this prompt begins with: then it waits for that and
        forks it, and it is read once. (Several answers to one prompt come at once, as do several
        chats with one system prompt.)"""
        facts = self.runtime.facts
        if waiting.request.embedding or not facts.can.fork:
            return False
        limit = len(waiting.prompt) - 1
        for running in self._running:
            if running.request.embedding or not running.prompt_left:
                continue
            shared = min(common_length(running.tokens, list(waiting.prompt)), limit)
            shared -= shared % facts.stable_chunk_tokens
            if shared - running.num_computed < MIN_FORK_TOKENS:
                continue
            _, idle_length = self._best_idle(waiting.prompt, limit)
            if max(idle_length, self.prefixes.match(waiting.prompt[:limit]).num_tokens) < shared:
                return True
        return False

    def _make_sampler(self, running: RunningRequest) -> Sampler:
        params = running.request.sampling
        sampler = self.runtime.create_sampler(params, running.seed)
        if params.has_penalties:
            window = max(params.penalty_last_n, params.dry_last_n)
            for token in running.prompt[-window:]:
                sampler.accept(token)
        return sampler

    def _place(self, running: RunningRequest) -> None:
        """Give a request a sequence that holds as much of its prompt as is known anywhere.

        Idle conversations leave the KV cache for host memory: masked cells cost every step.
        """
        if running.request.embedding:  # needs the hidden states of all its tokens
            for idle in list(self._idle):
                self._release(idle)
            running.handle = self.runtime.open()
            return
        limit = len(running.prompt) - 1  # the last token is run again for its logits
        live, live_length = self._best_idle(running.prompt, limit)
        twin, twin_length = self._best_running(running.prompt, limit)
        if live is not None:
            self._idle.remove(live)
        for idle in list(self._idle):
            self._release(idle)
        stored = self.prefixes.match(running.prompt[:limit]) if limit else None
        stored_length = stored.num_tokens if stored else 0
        if live is not None and live_length >= max(stored_length, twin_length):
            if len(live.tokens) - live_length >= MIN_SAVED_TAIL:
                self._try_to_save(live)
            self.runtime.rewind(live.handle, live_length)
            running.handle, running.num_computed = live.handle, live_length
            running.cache_tier = "live"
        else:
            if live is not None:
                self._release(live)
            if twin is not None and twin_length >= max(stored_length, MIN_FORK_TOKENS):
                assert twin.handle is not None
                running.handle = self.runtime.fork(twin.handle, twin_length)
                running.num_computed, running.cache_tier = twin_length, "live"
            else:
                running.handle = self.runtime.open()
                if stored is not None and stored_length:
                    self._restore(running, stored_length)
        running.num_cached = running.num_computed
        if not running.num_cached:
            running.cache_tier = "none"

    def _best_idle(self, prompt: Sequence[int], limit: int) -> tuple[LiveSequence | None, int]:
        best, length = None, 0
        for idle in self._idle:
            shared = min(common_length(idle.tokens, list(prompt)), limit)
            if shared < len(idle.tokens) and not self.runtime.facts.can.rewind:
                continue  # its tail cannot be taken off again
            if shared > length:
                best, length = idle, shared
        return best, length

    def _best_running(self, prompt: Sequence[int], limit: int) -> tuple[RunningRequest | None, int]:
        best, length = None, 0
        if not self.runtime.facts.can.fork:
            return best, length
        for running in self._running:
            if running.request.embedding:
                continue
            computed = running.tokens[: running.num_computed]
            shared = min(common_length(computed, list(prompt)), limit)
            shared -= shared % self.runtime.facts.stable_chunk_tokens  # see RuntimeFacts
            if shared > length:
                best, length = running, shared
        return best, length

    def _restore(self, running: RunningRequest, limit: int) -> None:
        """Blocks from host memory into the request's new sequence; a refused block ends it there."""
        runtime, handle = self.runtime, running.handle
        assert handle is not None
        for block in self.prefixes.match(running.prompt[:limit]).blocks:
            try:
                runtime.restore(handle, block.payload, len(block.tokens))
            except (SnapshotRejected, OutOfCells) as error:
                running.warnings.append(f"a cached part of the conversation was not used: {error}")
                break
        have = runtime.length(handle)
        if have > limit:
            if not runtime.facts.can.rewind:
                runtime.free(handle)
                running.handle = runtime.open()
                return
            runtime.rewind(handle, limit)
        running.num_computed = min(have, limit)
        running.cache_tier = "memory"

    def _release(self, idle: LiveSequence) -> None:
        """Move an idle conversation out of the KV cache, into host memory if there is room."""
        self._try_to_save(idle)
        if idle in self._idle:
            self._idle.remove(idle)
        self.runtime.free(idle.handle)

    def _try_to_save(self, idle: LiveSequence) -> None:
        """Who needs its cells shall have them: what cannot be copied will be read again."""
        try:
            self._save(idle)
        except EdgeInferError as error:
            log.warning("a conversation was not kept in the prompt cache: %s", error)

    def _save(self, idle: LiveSequence, most_blocks: int | None = None) -> None:
        added = self.prefixes.store(
            idle.tokens,
            lambda start, stop: self.runtime.snapshot(idle.handle, start, stop),
            self.runtime.facts.kv_bytes_per_token,
            most_blocks,
        )
        idle.is_saved = most_blocks is None or not added

    def use_idle(self) -> bool:
        """Copy a block of a conversation that rests to host memory, while nobody waits: the next request
        may need its cells, and then would wait for that. False if there is nothing to copy."""
        idle = next((idle for idle in self._idle if not idle.is_saved), None)
        if idle is not None:
            try:
                self._save(idle, most_blocks=1)
            except EdgeInferError:  # whoever needs its cells will be told
                idle.is_saved = True
        return idle is not None

    # -- invariants ------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """For tests: the engine, the runtime and the prefix cache agree."""
        handles = [r.handle for r in self._running] + [idle.handle for idle in self._idle]
        assert len(set(handles)) == len(handles), "two owners of one sequence"
        for running in self._running:
            assert running.handle is not None
            assert self.runtime.length(running.handle) == running.num_computed
        for idle in self._idle:
            assert self.runtime.length(idle.handle) == len(idle.tokens)
        self.prefixes.check_integrity()
        self.runtime.check_integrity()

    def close(self) -> None:
        self.runtime.close()
