"""A context that is full: what leaves it, what stays, and what is known of it afterwards.

Answers are compared with those of a plain model of the policy, which keeps a list of what its cells hold
and evicts on a runtime of its own: the scripted backend's logits depend on every cell, and on what that
cell had seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import pytest

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.eviction import READ_AGAIN
from edgeinfer.engine.history import Gap, gap_of_cut, gap_of_shift
from edgeinfer.engine.request import Request
from edgeinfer.engine.sequence import RunningRequest
from edgeinfer.engine.window import Window, turn_starts
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend
from edgeinfer_backends.scripted_tokenizer import TURN_END, TURN_START, ByteTokenizer
from edgeinfer_models.tokenizer import Tokenizer
from tests.engine.test_engine import Driver, asked, tokens_of

SIZE, SINKS = 96, 4
NEWLINE = 10


def make_engine(
    *,
    size: int = SIZE,
    sinks: int = SINKS,
    context: int = 128,
    sequences: int = 1,
    cache_bytes: int = 2**26,
    script: Script | None = None,
) -> Engine:
    settings = RuntimeSettings(context=context, sequences=sequences, step_tokens=64)
    runtime = ScriptedBackend(script or Script()).load(SCRIPTED_FILES, settings, lambda _: True)
    window = Window(size, sinks)
    return Engine(
        runtime, model="scripted", max_running=sequences, cache_bytes=cache_bytes, window=window
    )


def streamed(tokens: Sequence[int], max_tokens: int = 12, **options: object) -> Request:
    return asked(tokens, max_tokens, overflow="stream", **options)


class Talk(Driver):
    """Also knows what every request's whole history came to be."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.running: dict[int, RunningRequest] = {}

    def submit(self, key: int, request: Request, kept: int = 0) -> None:
        assert request.tokens is not None
        self.events.setdefault(key, [])
        self._keep(self.engine.submit(key, request, request.tokens, kept=kept))
        if self.engine._waiting and self.engine._waiting[-1].key == key:
            self.running[key] = self.engine._waiting[-1]

    def ask(self, key: int, tokens: Sequence[int], max_tokens: int = 12, kept: int = 0) -> list[int]:
        """The answer's tokens."""
        self.submit(key, streamed(tokens, max_tokens), kept)
        self.run()
        self.stats(key)
        return self.running[key].answered

    def num_prefilled(self, key: int) -> int:
        usage = self.stats(key).usage
        return usage.prompt_tokens - usage.cached_tokens


@dataclass
class PlainCells:
    """The policy, said plainly: once `size` cells are full, a quarter of those after the head leaves, or
    what goes with a turn that begins near there."""

    size: int = SIZE
    head: int = SINKS
    history: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)  # indexes into the history
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)

    def read(self) -> tuple[range, int]:
        """Let the rest of the history into the cells: what is new, and how many leave for it."""
        new = range(self.cells[-1] + 1 if self.cells else 0, len(self.history))
        over = len(self.cells) + len(new) - self.size
        leaving = self._num_leaving(over) if over > 0 else 0
        del self.cells[self.head : self.head + leaving]
        self.cells += new
        return new, leaving

    def _num_leaving(self, over: int) -> int:
        quarter = (self.size - self.head) // 4
        leaving = max(over, quarter)
        near = range(over, min(leaving + quarter, len(self.cells) - self.head) + 1)
        starts = [count for count in near if self._begins_turn(self.head + count)]
        return min(starts, key=lambda count: (abs(count - leaving), -count), default=leaving)

    def _begins_turn(self, position: int) -> bool:
        """After a turn's end and blanks: models draw such tokens too, now and then."""
        held, is_end = self.held, self.tokenizer.is_end
        if position >= len(held) or self._is_blank(held[position]) or is_end(held[position]):
            return False
        while position and self._is_blank(held[position - 1]):
            position -= 1
        return position > 0 and is_end(held[position - 1])

    def _is_blank(self, token: int) -> bool:
        is_text = not self.tokenizer.is_end(token) and not self.tokenizer.is_control(token)
        return is_text and not self.tokenizer.piece(token).strip()

    @property
    def held(self) -> list[int]:
        return [self.history[index] for index in self.cells]


class PlainModel(PlainCells):
    """With a runtime of its own, on which it evicts what leaves."""

    def __init__(self) -> None:
        super().__init__()
        settings = RuntimeSettings(context=self.size + 8, sequences=1, step_tokens=64)
        self._runtime = ScriptedBackend().load(SCRIPTED_FILES, settings, lambda _: True)
        self._sequence = self._runtime.open()

    def ask(self, tokens: Sequence[int], max_tokens: int = 12) -> list[int]:
        """tokens: what is new."""
        self.history += tokens
        answer = []
        for _ in range(max_tokens):
            new, leaving = self.read()
            if leaving:
                self._runtime.evict(self._sequence, self.head, self.head + leaving)
            unread = [self.history[index] for index in new]
            for start in range(0, len(unread), 64):
                part = SequenceStep(self._sequence, unread[start : start + 64])
                result = self._runtime.forward(Step([part]))
            answer.append(int(self._runtime.logits(result.starts[0]).argmax()))
            self.history.append(answer[-1])
        return answer


# -- while an answer is made -----------------------------------------------------------------------


def test_an_answer_goes_on_past_the_window_as_the_policy_says() -> None:
    talk, plain = Talk(make_engine()), PlainModel()
    prompt = tokens_of(1, 60)
    assert talk.ask(1, prompt, 400) == plain.ask(prompt, 400)
    stats = talk.stats(1)
    assert stats.finish_reason == "length"
    assert stats.usage.completion_tokens == 400
    assert stats.kv.evicted_tokens == stats.kv.newly_evicted == 459 - len(plain.cells)
    assert stats.context == SIZE
    assert any("oldest tokens left the context of 96" in warning for warning in stats.warnings)


def test_memory_stays_what_it_was() -> None:
    talk = Talk(make_engine())
    talk.submit(1, streamed(tokens_of(1, 60), 500))
    most = 0
    while talk.engine.has_work:
        talk.step()
        most = max(most, talk.engine.status().used_cells)
    assert most <= SIZE


def test_an_answer_of_no_asked_for_size_ends_all_the_same() -> None:
    talk = Talk(make_engine())
    request = Request(tokens=tuple(tokens_of(1, 60)), ignore_eos=True, overflow="stream")
    talk.submit(1, request)
    talk.run()
    assert talk.stats(1).finish_reason == "length"
    assert talk.stats(1).usage.completion_tokens == SIZE


def test_where_old_tokens_do_not_leave_the_answer_stops_or_fails() -> None:
    driver = Driver(make_engine())
    driver.submit(1, asked(tokens_of(1, 60), 400, overflow="stop"))
    driver.run()
    assert driver.stats(1).finish_reason == "length"
    assert driver.stats(1).usage.completion_tokens == SIZE - 60 + 1
    assert driver.stats(1).kv.evicted_tokens == 0
    driver.submit(2, asked(tokens_of(1, 60), 400, overflow="error"))
    driver.run()
    ended = driver.end(2)
    assert (ended.outcome, ended.error_type) == ("failed", "ContextFull")
    assert "96 tokens" in ended.error and "--window" in ended.error
    assert ended.stats.text == driver.answer(1)


@pytest.mark.parametrize("overflow", ["stop", "error"])
def test_a_prompt_larger_than_the_window_is_refused_unless_it_streams(overflow: str) -> None:
    driver = Driver(make_engine())
    driver.submit(1, asked(tokens_of(1, SIZE), overflow=overflow))
    assert "96 tokens" in driver.end(1).error
    assert "raise --window" in driver.end(1).error


def test_asked_for_text_ends_at_its_size_whatever_left() -> None:
    driver = Driver(make_engine())
    driver.submit(1, streamed(tokens_of(1, 10), 200))
    driver.run()
    assert driver.stats(1).usage.completion_tokens == 200
    assert len(driver.answer(1)) > 0


def test_a_text_to_embed_may_be_larger_than_the_window() -> None:
    driver = Driver(make_engine())
    driver.submit(1, asked(tokens_of(1, SIZE + 20), embedding=True))
    driver.run()
    assert driver.stats(1).kv.evicted_tokens == 0


def test_stop_strings_are_found_across_an_eviction() -> None:
    driver = Driver(make_engine())
    driver.submit(1, streamed(tokens_of(1, 90), 60))
    driver.run()
    text = driver.answer(1)
    driver.submit(2, streamed(tokens_of(1, 90), 60, stop=(text[20:30],)))
    driver.run()
    assert driver.answer(2) == text[:20]


# -- the next turns --------------------------------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new_after_twenty_evictions() -> None:
    talk, plain = Talk(make_engine()), PlainModel()
    history: list[int] = []
    for turn in range(40):
        new = tokens_of(turn, 18)
        answer = talk.ask(turn, [*history, *new], 16)
        assert answer == plain.ask(new, 16), turn
        if turn:
            assert talk.num_prefilled(turn) == len(new) + 1  # the last token was never computed
        history += [*new, *answer]
    assert talk.stats(39).kv.evicted_tokens > 20 * 23
    assert talk.stats(39).cache.tier == "live"


def test_conversations_that_alternate_are_found_in_host_memory() -> None:
    engine = make_engine()
    talk = Talk(engine)
    plains = [PlainModel() for _ in range(3)]
    histories: list[list[int]] = [[], [], []]
    for turn in range(30):
        which = turn % 3
        new = tokens_of(1000 + turn, 18)
        answer = talk.ask(turn, [*histories[which], *new], 16)
        assert answer == plains[which].ask(new, 16), turn
        if turn >= 3:
            assert talk.num_prefilled(turn) == len(new) + 1
            assert talk.stats(turn).cache.tier == "memory"
        histories[which] += [*new, *answer]


def test_an_evicted_sequence_is_never_taken_for_its_own_tokens() -> None:
    """The cells hold the same tokens as a short prompt, and other keys and values."""
    talk = Talk(make_engine())
    talk.ask(1, tokens_of(1, 90), 30)
    cells = talk.running[1].tokens
    assert talk.running[1].evicted
    short = cells[: len(cells) - 2]
    fresh = Talk(make_engine())
    assert talk.ask(2, short, 5) == fresh.ask(1, short, 5)
    assert talk.stats(2).usage.cached_tokens <= SINKS


def test_a_beginning_that_fits_is_read_whole_though_its_end_was_evicted() -> None:
    """Regenerating an early answer of a conversation that has gone on since."""
    talk = Talk(make_engine())
    first = tokens_of(1, 50)
    answer = talk.ask(1, first, 8)
    talk.ask(2, [*first, *answer, *tokens_of(2, 20)], 60)
    assert talk.stats(2).kv.evicted_tokens
    assert talk.ask(3, first, 8) == answer


def test_a_turn_that_is_asked_again_before_anything_left_goes_on_from_there() -> None:
    talk = Talk(make_engine())
    history = [*tokens_of(1, 90)]
    history += talk.ask(1, history, 30)
    history += tokens_of(2, 4)
    talk.ask(2, history, 5)
    before = talk.stats(2).kv.evicted_tokens
    talk.ask(3, history, 5)
    assert talk.stats(3).kv.evicted_tokens == before
    assert talk.num_prefilled(3) == 0  # its logits were kept
    assert talk.running[3].answered == talk.running[2].answered


def test_what_a_turn_costs_does_not_grow_with_what_was_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hundreds of evictions only those are looked at that a sequence may hold what follows."""
    engine = make_engine()
    talk = Talk(engine)
    history = tokens_of(1, 60)
    for turn in range(60):
        history += talk.ask(turn, history, 30)
        talk.ask(1000 + turn, tokens_of(1000 + turn, 10), 1)  # which sends it to host memory
        history += tokens_of(100 + turn, 10)
    assert len(list(engine.conversations.prefixes.gaps)) > 50
    made: list[Gap] = []
    cells = Gap.cells
    monkeypatch.setattr(Gap, "cells", lambda gap, tokens: (made.append(gap), cells(gap, tokens))[1])
    talk.ask(2000, history, 1)
    assert talk.num_prefilled(2000) == 11
    assert len(made) < 20


def test_a_cut_and_a_shift_are_not_taken_for_one_shift() -> None:
    history = tokens_of(1, 100)
    cut = gap_of_cut(history, 4, 24)
    both = gap_of_shift(cut, history, 4, 10)
    one = gap_of_shift(None, history, 4, 30)
    assert (both.head, both.count, both.length) == (one.head, one.count, one.length)
    assert both.root != one.root and both.key != one.key


# -- prompts larger than the window ----------------------------------------------------------------


def turn(seed: int, count: int) -> list[int]:
    return [TURN_START, *tokens_of(seed, count), TURN_END, NEWLINE]


def test_a_long_prompt_is_cut_at_a_turn_and_keeps_its_system_prompt() -> None:
    talk = Talk(make_engine())
    system = turn(0, 20)
    turns = [turn(seed, 12) for seed in range(1, 9)]
    prompt = [*system, *chain(*turns)]
    talk.ask(1, prompt, 10, kept=len(system) + 2)  # what the template puts before the user's words
    seen = talk.running[1].tokens[: -len(talk.running[1].answered)]
    assert seen == system + list(chain(*turns[-4:]))
    assert talk.stats(1).kv.newly_evicted == 4 * 15
    assert talk.num_prefilled(1) == len(prompt)
    fresh = Talk(make_engine())
    assert fresh.ask(1, seen, 10) == talk.running[1].answered


def test_the_turn_after_a_long_prompt_reads_only_what_is_new() -> None:
    talk = Talk(make_engine())
    history = list(chain(*(turn(seed, 12) for seed in range(12))))
    history += talk.ask(1, history, 10)
    more = turn(50, 10)
    talk.ask(2, history + more, 10)
    assert talk.num_prefilled(2) == len(more) + 1


def test_a_message_larger_than_the_window_is_cut_itself() -> None:
    talk = Talk(make_engine())
    prompt = tokens_of(3, 1000)
    answer = talk.ask(1, prompt, 10)
    seen = talk.running[1].tokens[: -len(answer)]
    tail = SIZE - SINKS - 10
    assert seen == [*prompt[:SINKS], *prompt[-tail:]]


def test_a_new_message_larger_than_what_is_left_begins_anew() -> None:
    talk = Talk(make_engine())
    history = tokens_of(1, 60)
    history += talk.ask(1, history, 20)
    long = tokens_of(2, 95)
    answer = talk.ask(2, [*history, *long], 10)
    seen = talk.running[2].tokens[: -len(answer)]
    assert seen == [*history[:SINKS], *long[-(SIZE - SINKS - 10) :]]


def test_a_system_prompt_larger_than_the_window_leaves_only_the_sinks() -> None:
    talk = Talk(make_engine())
    prompt = [*turn(0, 200), *turn(1, 10)]
    answer = talk.ask(1, prompt, 5, kept=204)
    assert talk.running[1].tokens[:SINKS] == prompt[:SINKS]
    assert len(talk.running[1].tokens) - len(answer) <= SIZE


def test_whole_turns_leave_while_a_chat_goes_on() -> None:
    talk = Talk(make_engine())
    history = turn(0, 14)
    for key in range(1, 12):
        history += turn(key, 12)
        answer = talk.ask(key, history, 8, kept=len(turn(0, 14)))
        history += [*answer, TURN_END, NEWLINE]
        gap = talk.running[key].gap
        if gap is not None:
            assert gap.head == len(turn(0, 14))
            assert gap.head + gap.count in turn_starts(history, ByteTokenizer())
    assert talk.running[11].evicted


# -- shared cells ----------------------------------------------------------------------------------


def test_answers_that_share_a_prompt_do_not_move_each_others_cells() -> None:
    prompt = tokens_of(1, 80)
    engine = make_engine(sequences=3, context=128)
    talk = Talk(engine)
    for key in range(3):
        talk.submit(key, streamed([*prompt, *tokens_of(10 + key, 4)], 60))
    talk.run()
    for key in range(3):
        plain = PlainModel()
        assert talk.running[key].answered == plain.ask([*prompt, *tokens_of(10 + key, 4)], 60), key


# -- what a backend cannot do ----------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [SINKS, 0])
def test_a_cache_that_cannot_be_shifted_is_read_again_and_it_is_said(sinks: int) -> None:
    """Without sinks nothing stays, and it is read into another sequence of the runtime's."""
    talk = Talk(make_engine(script=Script(without=("evict",)), sinks=sinks))
    prompt = list(chain(*(turn(seed, 10) for seed in range(5))))
    answer = talk.ask(1, prompt, 100)
    assert len(answer) == 100
    assert READ_AGAIN in talk.stats(1).warnings
    assert talk.stats(1).kv.evicted_tokens > 0
    # What follows is what a fresh reading of the same cells says.
    cells = talk.running[1].tokens
    fresh = Talk(make_engine())
    assert fresh.ask(1, cells[:-1], 1) == cells[-1:]


@pytest.mark.parametrize("missing", ["snapshot", "fork", "rewind", "evict"])
def test_a_chat_goes_on_without_a_capability(missing: str) -> None:
    talk = Talk(make_engine(script=Script(without=(missing,))))
    history: list[int] = []
    for key in range(12):
        history += turn(key, 15)
        history += talk.ask(key, history, 12)
    assert talk.stats(11).kv.evicted_tokens > 100


# -- at random -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_random_turns_equal_the_plain_model(seed: int) -> None:
    """Conversations grow, branch and come back in any order; all of them are still known somewhere."""
    rng = random.Random(seed)
    talk = Talk(make_engine(sequences=2, cache_bytes=2**30))
    conversations: list[tuple[list[int], list[int]]] = []  # (what is new in each turn, history)
    plains: list[PlainModel] = []
    key = evictions = 0
    for _ in range(60):
        if not conversations or (len(conversations) < 6 and rng.random() < 0.2):
            conversations.append(([], []))
            plains.append(PlainModel())
        batch = rng.sample(range(len(conversations)), min(2, len(conversations)))
        pending = []
        for which in batch:
            new = tokens_of(rng.randrange(10**6), rng.randint(1, 40))
            count = rng.randint(1, 60)
            talk.submit(key, streamed([*conversations[which][1], *new], count))
            pending.append((which, key, new, count))
            key += 1
        talk.run()
        for which, asked_as, new, count in pending:
            before = plains[which].history
            assert talk.running[asked_as].prompt == (*before, *new)
            assert talk.running[asked_as].answered == plains[which].ask(new, count)
            conversations[which][1][:] = plains[which].history
            running = talk.running[asked_as]
            assert running.tokens[: running.num_computed] == plains[which].held
            evictions += running.newly_evicted > 0
    assert evictions > 40
