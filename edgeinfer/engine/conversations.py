"""What is known of conversations, and how a request gets a sequence that holds as much as may be of its
own: from one that runs or rests in the KV cache, or from snapshots in host memory and on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeinfer.backend import Runtime
from edgeinfer.engine.disk_cache import DiskCache
from edgeinfer.engine.eviction import Evictor
from edgeinfer.engine.history import ROOT, Gap, gap_of_cut, gaps_within
from edgeinfer.engine.prefix_cache import Match, PrefixCache, common_length
from edgeinfer.engine.sequence import LiveSequence, RunningRequest
from edgeinfer.engine.window import Window, turn_starts
from edgeinfer.errors import EdgeInferError, OutOfCells, SnapshotRejected

log = logging.getLogger("edgeinfer.engine")

MIN_FORK_TOKENS = 32  # a shorter common prefix with a running sequence is not worth sharing
RESTORED_PER_S = 3e8  # bytes of blocks read from disk, checked and put into the cache, at the least
PIN_S = 60.0  # longest that writing what is to be pinned may take
WORTH_UNMEASURED = 128  # tokens that are worth a file where nobody knows how long they take to read
WORTH_S = 0.1  # of prefill that a conversation on disk must save
MIN_SAVED_TAIL = 32  # a shorter tail that the next turn contradicts is not worth keeping


@dataclass(frozen=True)
class _View:
    """A prompt as cells are to hold it: whole, or without what a gap says."""

    tokens: list[int]
    gap: Gap | None = None
    is_cut: bool = False  # here and now: no sequence has read what it leaves out
    read_again: int = 1  # tokens at its end that are run even if all of it is known: for their logits

    @property
    def root(self) -> bytes:
        return ROOT if self.gap is None else self.gap.root

    @property
    def limit(self) -> int:
        return len(self.tokens) - 1

    def usable(self, known: int) -> int:
        """Of a beginning that is known, without the logits at its end."""
        return known if known < self.limit else min(known, len(self.tokens) - self.read_again)

    def is_ended_by(self, idle: LiveSequence, common: int) -> bool:
        """Whether the logits after it are known: it was the prompt of a sequence that begins as it does
        for `common` tokens."""
        end = idle.prompt_end
        return end is not None and end.num_tokens == len(self.tokens) == common

    def is_continued_by(self, num_cells: int) -> bool:
        """Whether a sequence that holds the first `num_cells` tokens is past the gap."""
        return self.gap is None or num_cells + self.gap.count >= self.gap.length


@dataclass(frozen=True)
class _Known:
    """The longest beginnings of a view that are known, and where."""

    idle: LiveSequence | None
    idle_length: int
    twin: RunningRequest | None
    twin_length: int
    stored_length: int

    @property
    def length(self) -> int:
        twin = self.twin_length if self.twin_length >= MIN_FORK_TOKENS else 0
        return max(self.idle_length, twin, self.stored_length)


class Conversations:
    def __init__(
        self,
        runtime: Runtime,
        window: Window,
        cache_bytes: int,
        disk: DiskCache | None = None,
        prefill_s_per_token: Callable[[], float | None] = lambda: None,
    ) -> None:
        """prefill_s_per_token(): None where nothing was measured."""
        self._runtime = runtime
        self._prefill_s_per_token = prefill_s_per_token
        self._facts = runtime.facts
        self._window = window
        can = self._facts.can.snapshot
        self.prefixes = PrefixCache(cache_bytes if can else 0, disk if can else None)
        self.idle: list[LiveSequence] = []  # least recently used first
        self._evictor = Evictor(runtime, window)

    # -- a request's beginning -------------------------------------------------------------------

    def place(self, running: RunningRequest, others: Sequence[RunningRequest]) -> None:
        """Give a request a sequence that holds as much of its prompt as is known anywhere, `others` are
        those that run. Raises OutOfCells, StepFailed.

        Idle conversations leave the KV cache for host memory: masked cells cost every step.
        """
        if running.request.embedding:  # needs the hidden states of all its tokens
            self._release_all()
            running.handle = self._runtime.open()
            return
        self.prefixes.refresh()
        view = self._choose(running, others)
        self._fill(running, view, others)
        if not view.is_cut and not view.is_continued_by(running.num_computed):
            assert running.handle is not None  # a snapshot was refused on the way
            self._runtime.free(running.handle)
            running.handle = running.gap = None
            view = self._cut(running)
            self._fill(running, view, others)
        running.num_cached = running.num_computed + (0 if view.is_cut else running.evicted)
        if len(running.tokens) > self._window.size:
            self.make_room(running)
        running.num_prefilled = running.prompt_left
        if not running.num_cached:
            running.cache_tier = "none"

    def will_be_shared(self, waiting: RunningRequest, others: Sequence[RunningRequest]) -> bool:
        """Whether somebody is just reading what this prompt begins with: then it waits for that and
        forks it, and it is read once. (Several answers to one prompt come at once, as do several
        chats with one system prompt.)"""
        facts, prompt = self._facts, waiting.prompt
        if waiting.request.embedding or not facts.can.fork or len(prompt) >= self._window.size:
            return False
        view = _View(list(prompt), read_again=self._num_read_again(waiting, len(prompt)))
        for running in others:
            if running.request.embedding or not running.prompt_left or _root(running) != ROOT:
                continue
            shared = min(common_length(running.tokens, view.tokens), len(prompt) - view.read_again)
            shared -= shared % facts.stable_chunk_tokens
            if shared - running.num_computed < MIN_FORK_TOKENS:
                continue
            _, idle_length = self._best_idle(view)
            if max(idle_length, self._match(view).num_tokens) < shared:
                return True
        return False

    def _choose(self, running: RunningRequest, others: Sequence[RunningRequest]) -> _View:
        """How the cells are to hold a prompt: whole if it fits, else as the known sequence that has the
        most of it, if the rest fits behind that one's head; else its head and its end."""
        prompt = list(running.prompt)
        read_again = self._num_read_again(running, len(prompt))
        whole = _View(prompt, read_again=read_again)
        if len(prompt) < self._window.size:
            return whole
        gaps = {gap.key: gap for gap in self.prefixes.gaps}
        for gap in (*(idle.gap for idle in self.idle), *(running.gap for running in others)):
            if gap is not None:
                gaps[gap.key] = gap
        best, most = None, 0
        for gap in (None, *reversed(gaps_within(prompt, gaps.values()))):
            head = self._evictor.head(running) if gap is None else gap.head
            count = 0 if gap is None else gap.count
            if head + len(prompt) - count - self._facts.context > self._window.size:
                continue  # too much is left even if all cells there are were full of it
            view = whole if gap is None else _View(gap.cells(prompt), gap)
            known = self._find(view, others).length
            left = len(view.tokens) - known
            is_usable = (
                known >= head
                and head + left <= self._window.size
                and view.is_continued_by(known)
                and (len(view.tokens) <= self._window.size or self._facts.can.evict)
            )
            if is_usable and known + count > most:
                best, most = view, known + count
        return best or self._cut(running)

    def _cut(self, running: RunningRequest) -> _View:
        prompt, head = list(running.prompt), self._evictor.head(running)
        turns = turn_starts(prompt, self._runtime.tokenizer)
        cut = self._window.cut(len(prompt), head, running.request.max_tokens, turns)
        if cut <= head:
            return _View(prompt, read_again=self._num_read_again(running, len(prompt)))
        gap = gap_of_cut(prompt, head, cut)
        running.newly_evicted = gap.count
        return _View(gap.cells(prompt), gap, is_cut=True)

    def _fill(self, running: RunningRequest, view: _View, others: Sequence[RunningRequest]) -> None:
        runtime = self._runtime
        running.begin(list(view.tokens), view.gap)
        known = self._find(view, others)
        live = known.idle
        if live is not None:
            self.idle.remove(live)
        self._release_all()
        stored_length = self._match(view).num_tokens  # those just released included
        if live is not None and known.idle_length >= max(stored_length, known.twin_length):
            if len(live.tokens) - known.idle_length >= MIN_SAVED_TAIL:
                self._try_to_save(live)
            if known.idle_length < len(live.tokens):
                runtime.rewind(live.handle, known.idle_length)
            running.handle, running.num_computed = live.handle, known.idle_length
            running.prompt_end = live.prompt_end if running.is_all_computed else None
            running.cache_tier = "live"
            return
        if live is not None:
            self.release(live)
        twin, twin_length = known.twin, known.twin_length
        if twin is not None and twin_length >= max(stored_length, MIN_FORK_TOKENS):
            assert twin.handle is not None
            running.handle = runtime.fork(twin.handle, twin_length)
            running.num_computed, running.cache_tier = twin_length, "live"
            return
        running.handle = runtime.open()
        if stored_length:
            self._restore(running, view, self._match(view))

    def _find(self, view: _View, others: Sequence[RunningRequest]) -> _Known:
        idle, idle_length = self._best_idle(view)
        twin, twin_length = self._best_running(view, others)
        return _Known(idle, idle_length, twin, twin_length, self._match(view).num_tokens)

    def _match(self, view: _View) -> Match:
        limit = min(view.limit, self._facts.context)  # it may have been kept where that was larger
        match = self.prefixes.match(view.tokens[:limit], view.root)
        usable = view.usable(match.num_tokens)
        if usable == match.num_tokens:
            return match
        return self.prefixes.match(view.tokens[:usable], view.root)

    def _num_read_again(self, running: RunningRequest, length: int) -> int:
        """A whole chunk's worth where the answer is to be the same each time: alone, the last token is
        computed by another kernel than in a prompt that is read (see RuntimeFacts)."""
        sampling, stable = running.request.sampling, self._facts.stable_chunk_tokens
        is_repeatable = sampling.seed is not None or sampling.temperature == 0
        return stable if is_repeatable and length >= stable else 1

    def _best_idle(self, view: _View) -> tuple[LiveSequence | None, int]:
        best, length = None, 0
        for idle in self.idle:
            if idle.root != view.root:
                continue
            shared = common_length(idle.tokens, view.tokens)
            if len(view.tokens) > self._window.size or not view.is_ended_by(idle, shared):
                shared = view.usable(min(shared, view.limit))
            if shared < len(idle.tokens) and not self._facts.can.rewind:
                continue  # its tail cannot be taken off again
            if shared > length:
                best, length = idle, shared
        return best, length

    def _best_running(
        self, view: _View, others: Sequence[RunningRequest]
    ) -> tuple[RunningRequest | None, int]:
        best, length = None, 0
        if not self._facts.can.fork:
            return best, length
        for running in others:
            if running.request.embedding or _root(running) != view.root:
                continue
            computed = running.tokens[: running.num_computed]
            shared = min(common_length(computed, view.tokens), len(view.tokens) - view.read_again)
            shared -= shared % self._facts.stable_chunk_tokens  # see RuntimeFacts
            if shared > length:
                best, length = running, shared
        return best, length

    def _restore(self, running: RunningRequest, view: _View, match: Match) -> None:
        """Blocks from memory and disk into the request's new sequence; one that is refused ends it."""
        runtime, handle = self._runtime, running.handle
        assert handle is not None
        running.cache_tier = "memory"
        # The payloads first: their generator is run to its end.
        for found, block in zip(self.prefixes.payloads(match.blocks), match.blocks, strict=False):
            if found is None:
                break
            payload, is_from_disk = found
            try:
                runtime.restore(handle, payload, len(block.tokens))
            except (SnapshotRejected, OutOfCells) as error:
                running.warnings.append(f"a cached part of the conversation was not used: {error}")
                if isinstance(error, SnapshotRejected):
                    self.prefixes.forget(block)
                break
            if is_from_disk:
                running.cache_tier = "disk"
        have = runtime.length(handle)
        # The last block may hold more than the tokens that were looked for.
        common = min(match.num_tokens, have)
        if have > common:
            if not self._facts.can.rewind:
                runtime.free(handle)
                running.handle = runtime.open()
                return
            runtime.rewind(handle, common)
        running.num_computed = common

    # -- a full context --------------------------------------------------------------------------

    def make_room(self, running: RunningRequest) -> None:
        """Let the oldest tokens of a conversation go that is larger than the window. Raises OutOfCells,
        StepFailed."""
        running.read(self._runtime.tokenizer)
        self._evictor.make_room(running, self.release_oldest)

    # -- conversations that rest -----------------------------------------------------------------

    def keep(self, running: RunningRequest) -> None:
        """An ended request's sequence rests in the KV cache."""
        assert running.handle is not None
        tokens = running.tokens[: running.num_computed]
        self.idle.append(LiveSequence(running.handle, tokens, running.gap, running.prompt_end))
        running.handle = None

    def pin(self, running: RunningRequest) -> int:
        """Keep an ended request's prompt on disk for good. Waits until it is there; how many of its
        tokens are."""
        disk, idle = self.prefixes.disk, self.idle[-1]
        if disk is None or running.gap is not None:
            return 0
        length = min(len(running.prompt), len(idle.tokens))
        self.prefixes.store(
            idle.tokens[:length],
            lambda start, stop: self._runtime.snapshot(idle.handle, start, stop),
            self._facts.kv_bytes_per_token,
            to_disk=True,
        )
        disk.wait(PIN_S)
        blocks = self.prefixes.path(idle.tokens[:length])
        here = disk.pin([block.key for block in blocks])
        return min(sum(len(block.tokens) for block in blocks[:here]), length)

    def release_oldest(self) -> bool:
        """Free the cells of the conversation that rests longest; False if none rests."""
        if not self.idle:
            return False
        self.release(self.idle[0])
        return True

    def release(self, idle: LiveSequence) -> None:
        """Move an idle conversation out of the KV cache, into host memory if there is room."""
        self._try_to_save(idle)
        if idle in self.idle:
            self.idle.remove(idle)
        self._runtime.free(idle.handle)

    def _release_all(self) -> None:
        for idle in list(self.idle):
            self.release(idle)

    def _try_to_save(self, idle: LiveSequence) -> None:
        """Who needs its cells shall have them: what cannot be copied will be read again."""
        try:
            self._save(idle)
        except (EdgeInferError, MemoryError) as error:
            log.warning("a conversation was not kept in the prompt cache: %r", error)

    def _is_worth_a_file(self, num_tokens: int) -> bool:
        """Whether reading so many tokens took clearly longer than restoring them will."""
        rate = self._prefill_s_per_token()
        if rate is None:  # in a chat of short messages it may never be
            return num_tokens >= WORTH_UNMEASURED
        restoring = self._facts.kv_bytes_per_token / RESTORED_PER_S
        return num_tokens * (rate - 2 * restoring) >= WORTH_S

    def _save(self, idle: LiveSequence, most_blocks: int | None = None) -> None:
        added = self.prefixes.store(
            idle.tokens,
            lambda start, stop: self._runtime.snapshot(idle.handle, start, stop),
            self._facts.kv_bytes_per_token,
            most_blocks,
            idle.gap,
            to_disk=self._is_worth_a_file(len(idle.tokens)),
            with_tail=most_blocks is None,  # of a conversation that may go on, it will soon be longer
        )
        idle.is_saved = most_blocks is None or not added

    def use_idle(self) -> bool:
        """Copy a block of a conversation that rests to host memory, while nobody waits: the next request
        may need its cells, and then would wait for that. False if there is nothing to copy."""
        idle = next((idle for idle in self.idle if not idle.is_saved), None)
        if idle is not None:
            self.prefixes.refresh()
            try:
                self._save(idle, most_blocks=1)
            except (EdgeInferError, MemoryError):  # whoever needs its cells will be told
                idle.is_saved = True
        return idle is not None

    def close(self, seconds: float) -> None:
        """Put on disk what is worth it, as far as that is done in time."""
        disk = self.prefixes.disk
        if disk is None:
            return
        for idle in reversed(self.idle):
            self._try_to_save(idle)
        disk.close(seconds)

    def take_problems(self) -> list[str]:
        """With the cache on disk, to be told with an answer."""
        disk = self.prefixes.disk
        return [] if disk is None else disk.take_problems()


def _root(running: RunningRequest) -> bytes:
    return ROOT if running.gap is None else running.gap.root
