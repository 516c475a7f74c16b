"""The contract of fork, rewind, free, evict and privatise: only what was asked for changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgeinfer.backend import SequenceStep, Step
from edgeinfer.errors import OutOfCells, SharedCells
from tests.contract.checked_runtime import CheckedRuntime
from tests.contract.driving import (
    CHUNK,
    Logits,
    decode,
    decode_together,
    feed,
    is_alike,
    is_same,
    opened,
    probe,
    require,
    restored,
    snapshots,
    some_tokens,
    unchanged,
)

Load = Callable[..., CheckedRuntime]


# -- opening and freeing ---------------------------------------------------------------------------


def test_freeing_a_sequence_makes_its_cells_available_again(runtime: CheckedRuntime) -> None:
    free = runtime.free_cells()
    one, other = opened(runtime, some_tokens(runtime, 200)), opened(runtime, some_tokens(runtime, 100))
    assert runtime.free_cells() == free - 300
    with unchanged(runtime, other):
        extra = opened(runtime, some_tokens(runtime, 50, seed=3))
        runtime.free(extra)
    runtime.free(one)
    assert runtime.free_cells() == free - 100
    runtime.free(other)
    assert runtime.free_cells() == free


def test_cells_do_not_leak_over_many_conversations(runtime: CheckedRuntime) -> None:
    free = runtime.free_cells()
    for turn in range(40):
        sequence = opened(runtime, some_tokens(runtime, 100, seed=turn))
        fork = runtime.fork(sequence, 50)
        runtime.free(sequence)
        feed(runtime, fork, some_tokens(runtime, 1))
        runtime.free(fork)
    assert runtime.free_cells() == free


def test_as_many_sequences_as_declared_can_be_open(runtime: CheckedRuntime) -> None:
    sequences = [runtime.open() for _ in range(runtime.facts.max_sequences)]
    assert len(set(sequences)) == len(sequences)
    with pytest.raises(OutOfCells):
        runtime.open()
    with pytest.raises(OutOfCells):
        runtime.fork(sequences[0], 0)
    runtime.free(sequences.pop())
    runtime.open()


def test_a_reused_handle_starts_empty(load: Load) -> None:
    used, fresh = load(), load()
    prompt = some_tokens(used, CHUNK)
    expected = feed(fresh, fresh.open(), prompt)
    for seed in range(used.facts.max_sequences + 2):
        used.free(opened(used, some_tokens(used, 30, seed=seed)))
    sequence = used.open()
    assert used.length(sequence) == 0
    assert is_same(feed(used, sequence, prompt), expected)


def test_unknown_sequences_are_refused_everywhere(runtime: CheckedRuntime) -> None:
    gone = opened(runtime, some_tokens(runtime, 5))
    kept = opened(runtime, some_tokens(runtime, CHUNK))
    runtime.free(gone)
    can = runtime.facts.can
    with unchanged(runtime, kept):
        for unknown in (gone, -1, 10**6):
            calls: list[Callable[[], object]] = [
                lambda u=unknown: runtime.free(u),  # type: ignore[misc]
                lambda u=unknown: runtime.length(u),  # type: ignore[misc]
                lambda u=unknown: runtime.fork(u, 0),  # type: ignore[misc]
                lambda u=unknown: runtime.rewind(u, 0),  # type: ignore[misc]
                lambda u=unknown: runtime.is_in_order(u),  # type: ignore[misc]
            ]
            if can.evict:
                calls.append(lambda u=unknown: runtime.evict(u, 0, 1))  # type: ignore[misc]
                calls.append(lambda u=unknown: runtime.privatise(u))  # type: ignore[misc]
            if can.snapshot:
                calls.append(lambda u=unknown: runtime.snapshot(u, 0, 1))  # type: ignore[misc]
                calls.append(lambda u=unknown: runtime.restore(u, b"x", 1))  # type: ignore[misc]
            for call in calls:
                with pytest.raises(ValueError):
                    call()


# -- fork ------------------------------------------------------------------------------------------


def test_a_fork_that_diverges_leaves_its_parent_as_it_was(runtime: CheckedRuntime) -> None:
    require(runtime, "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    with unchanged(runtime, parent):
        child = runtime.fork(parent, CHUNK)
        assert runtime.length(child) == CHUNK
        decode(runtime, child, some_tokens(runtime, 5, seed=1))
        runtime.free(child)


def test_a_fork_predicts_as_its_parent_would(runtime: CheckedRuntime) -> None:
    require(runtime, "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    child = runtime.fork(parent, CHUNK)
    tokens = some_tokens(runtime, 4, seed=1)
    for left, right in zip(decode(runtime, child, tokens), decode(runtime, parent, tokens), strict=True):
        assert is_same(left, right)
    assert runtime.is_in_order(parent)
    assert runtime.is_in_order(child)


def test_a_fork_shares_cells_where_the_layout_says_so(runtime: CheckedRuntime) -> None:
    require(runtime, "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    free = runtime.free_cells()
    child = runtime.fork(parent, 100)
    shared = runtime.facts.kv_layout == "shared"
    assert runtime.free_cells() == (free if shared else free - 100)
    runtime.free(child)
    assert runtime.free_cells() == free


def test_a_fork_of_a_part_predicts_as_if_it_had_never_gone_on(load: Load) -> None:
    forked, plain = load(), load()
    require(forked, "fork")
    prompt, more = some_tokens(forked, CHUNK), some_tokens(forked, 9, seed=1)
    parent = opened(forked, prompt)
    decode(forked, parent, more)
    with unchanged(forked, parent):
        child = forked.fork(parent, CHUNK + 4)
        found = probe(forked, child)
        assert forked.is_in_order(child)
        other = opened(plain, prompt)
        decode(plain, other, more[:4])
        assert is_same(found, probe(plain, other))
        forked.free(child)


def test_a_fork_outlives_its_parent(runtime: CheckedRuntime) -> None:
    require(runtime, "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    child = runtime.fork(parent, 100)
    expected = probe(runtime, child)
    runtime.free(parent)
    assert is_same(probe(runtime, child), expected)
    grandchild = runtime.fork(child, 100)
    runtime.free(child)
    assert is_same(probe(runtime, grandchild), expected)


def test_a_fork_of_nothing_is_an_empty_sequence(runtime: CheckedRuntime) -> None:
    require(runtime, "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    prompt = some_tokens(runtime, CHUNK, seed=1)
    expected = feed(runtime, runtime.open(), prompt)
    child = runtime.fork(parent, 0)
    assert runtime.length(child) == 0
    assert is_same(feed(runtime, child, prompt), expected)


def test_forks_of_lengths_that_are_not_there_are_refused(runtime: CheckedRuntime) -> None:
    require(runtime, "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    with unchanged(runtime, parent):
        for length in (-1, CHUNK + 1, 10**6):
            with pytest.raises(ValueError):
                runtime.fork(parent, length)
    for _ in range(runtime.facts.max_sequences - 1):
        runtime.open()  # a refused fork must not have used up a handle


# -- rewind ----------------------------------------------------------------------------------------


def test_rewinding_and_going_on_is_as_never_having_gone_there(load: Load) -> None:
    wandered, plain = load(), load()
    prompt, wrong, right = (some_tokens(wandered, n, seed=n) for n in (CHUNK, 7, 6))
    one, other = opened(wandered, prompt), opened(plain, prompt)
    decode(wandered, one, wrong)
    wandered.rewind(one, CHUNK)
    assert wandered.length(one) == CHUNK
    assert wandered.is_in_order(one)
    found, expected = decode(wandered, one, right), decode(plain, other, right)
    assert all(is_same(a, b) for a, b in zip(found, expected, strict=True))


def test_rewinding_into_a_prompt_and_feeding_another_end_is_exact(load: Load) -> None:
    wandered, plain = load(), load()
    prompt, end = some_tokens(wandered, 2 * CHUNK), some_tokens(wandered, CHUNK, seed=1)
    one, other = opened(wandered, prompt), opened(plain, prompt[:CHUNK])
    wandered.rewind(one, CHUNK)
    assert is_same(feed(wandered, one, end), feed(plain, other, end))
    assert is_same(probe(wandered, one), probe(plain, other))


def test_rejected_drafts_leave_no_trace(load: Load) -> None:
    drafting, plain = load(), load()
    prompt, answer = some_tokens(drafting, CHUNK), some_tokens(drafting, 12, seed=1)
    one, other = opened(drafting, prompt), opened(plain, prompt)
    found = []
    for index, token in enumerate(answer):
        draft = some_tokens(drafting, 1 + index % 3, seed=100 + index)
        result = drafting.forward(Step([SequenceStep(one, [token, *draft], "all")]))
        found.append(drafting.logits(result.starts[0]).copy())
        drafting.rewind(one, CHUNK + index + 1)
    expected = decode(plain, other, answer)
    assert all(is_alike(a, b) for a, b in zip(found, expected, strict=True))
    assert drafting.is_in_order(one)
    assert drafting.free_cells() == plain.free_cells()


def test_rewinding_to_nothing_and_to_the_same_length(runtime: CheckedRuntime) -> None:
    prompt = some_tokens(runtime, CHUNK)
    sequence = runtime.open()
    expected = feed(runtime, sequence, prompt)
    with unchanged(runtime, sequence):
        runtime.rewind(sequence, CHUNK)
    runtime.rewind(sequence, 0)
    assert runtime.length(sequence) == 0
    assert runtime.free_cells() == runtime.facts.cells
    assert is_same(feed(runtime, sequence, prompt), expected)


def test_rewinding_a_fork_leaves_the_shared_cells_to_the_parent(runtime: CheckedRuntime) -> None:
    require(runtime, "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    with unchanged(runtime, parent):
        child = runtime.fork(parent, CHUNK)
        runtime.rewind(child, 40)
        decode(runtime, child, some_tokens(runtime, 3, seed=5))
        runtime.free(child)


def test_rewinding_past_the_end_is_refused(runtime: CheckedRuntime) -> None:
    sequence = opened(runtime, some_tokens(runtime, CHUNK))
    with unchanged(runtime, sequence):
        for length in (-1, CHUNK + 1):
            with pytest.raises(ValueError):
                runtime.rewind(sequence, length)


# -- evict -----------------------------------------------------------------------------------------


def test_evicting_shortens_a_sequence_and_frees_its_cells(runtime: CheckedRuntime) -> None:
    require(runtime, "evict")
    sequence = opened(runtime, some_tokens(runtime, 200))
    before, free = probe(runtime, sequence), runtime.free_cells()
    runtime.evict(sequence, 4, 54)
    assert runtime.length(sequence) == 150
    assert runtime.free_cells() == free + 50
    assert runtime.is_in_order(sequence)
    after = probe(runtime, sequence)
    assert np.all(np.isfinite(after))
    assert not is_same(before, after)


def test_an_eviction_is_complete_when_it_returns(runtime: CheckedRuntime) -> None:
    require(runtime, "evict", "snapshot")
    sequence = opened(runtime, some_tokens(runtime, 400))
    runtime.evict(sequence, 4, 104)
    blocks = snapshots(runtime, sequence)
    copy = restored(runtime, blocks)
    expected = probe(runtime, sequence)
    assert is_same(probe(runtime, copy), expected)
    again = restored(runtime, snapshots(runtime, sequence))
    assert is_same(probe(runtime, again), expected)


def test_two_evictions_in_a_row_are_complete_too(runtime: CheckedRuntime) -> None:
    require(runtime, "evict", "snapshot")
    sequence = opened(runtime, some_tokens(runtime, 400))
    runtime.evict(sequence, 4, 54)
    runtime.evict(sequence, 10, 60)
    assert runtime.length(sequence) == 300
    copy = restored(runtime, snapshots(runtime, sequence))
    assert is_same(probe(runtime, copy), probe(runtime, sequence))


def test_evicting_the_end_is_rewinding(runtime: CheckedRuntime) -> None:
    require(runtime, "evict")
    prompt = some_tokens(runtime, 200)
    evicted, rewound = opened(runtime, prompt), opened(runtime, prompt)
    runtime.evict(evicted, 120, 200)
    runtime.rewind(rewound, 120)
    assert runtime.length(evicted) == 120
    assert is_same(probe(runtime, evicted), probe(runtime, rewound))


def test_an_evicted_sequence_can_grow_fork_and_rewind(runtime: CheckedRuntime) -> None:
    require(runtime, "evict", "fork")
    sequence = opened(runtime, some_tokens(runtime, 200))
    runtime.evict(sequence, 4, 54)
    expected = probe(runtime, sequence)
    child = runtime.fork(sequence, 150)
    decode(runtime, child, some_tokens(runtime, 5))
    runtime.rewind(child, 150)
    assert is_same(probe(runtime, child), expected)
    decode(runtime, sequence, some_tokens(runtime, 5, seed=1))
    runtime.rewind(sequence, 150)
    assert is_same(probe(runtime, sequence), expected)


def test_letting_the_lightest_go_frees_their_cells_and_leaves_the_others_alone(
    runtime: CheckedRuntime,
) -> None:
    require(runtime, "heavy_hitters")
    tokens = some_tokens(runtime, 200)
    sequence, other = opened(runtime, tokens), opened(runtime, some_tokens(runtime, 70, seed=1))
    free = runtime.free_cells()
    before = probe(runtime, sequence)
    expected = probe(runtime, other)
    runtime.evict_lightest(sequence, 4, 150, 66)
    assert runtime.free_cells() == free + 80
    assert is_same(probe(runtime, other), expected)
    assert runtime.length(sequence) == 120
    assert not is_same(probe(runtime, sequence), before)
    copy = runtime.fork(sequence, 120)
    runtime.evict_lightest(sequence, 4, 100, 40)
    runtime.evict_lightest(copy, 4, 100, 40)
    assert is_same(probe(runtime, copy), probe(runtime, sequence))


def test_keeping_all_or_none_is_no_choice(runtime: CheckedRuntime) -> None:
    require(runtime, "heavy_hitters")
    sequence = opened(runtime, some_tokens(runtime, 90))
    expected = probe(runtime, sequence)
    runtime.evict_lightest(sequence, 4, 60, 56)
    assert runtime.length(sequence) == 90
    assert is_same(probe(runtime, sequence), expected)
    other = runtime.fork(sequence, 90)
    runtime.evict_lightest(sequence, 4, 60, 0)
    runtime.evict(other, 4, 60)
    assert is_same(probe(runtime, sequence), probe(runtime, other))


def test_evicting_in_one_sequence_leaves_the_others_alone(runtime: CheckedRuntime) -> None:
    require(runtime, "evict")
    one, other = (opened(runtime, some_tokens(runtime, 200, seed=seed)) for seed in (1, 2))
    expected = probe(runtime, other)
    runtime.evict(one, 4, 54)
    assert runtime.length(other) == 200
    assert is_same(probe(runtime, other), expected)
    decode_together(runtime, {one: some_tokens(runtime, 1)[0], other: some_tokens(runtime, 1)[0]})


def test_evicting_shared_cells_is_refused_until_they_are_private(runtime: CheckedRuntime) -> None:
    require(runtime, "evict", "fork")
    if runtime.facts.kv_layout != "shared":
        pytest.skip(f"{runtime.facts.backend} here shares no cells")
    parent = opened(runtime, some_tokens(runtime, 200))
    child = runtime.fork(parent, 200)
    decode(runtime, child, some_tokens(runtime, 3))
    with unchanged(runtime, parent, child):
        for sequence in (parent, child):
            with pytest.raises(SharedCells):
                runtime.evict(sequence, 4, 54)
    expected = probe(runtime, parent)
    runtime.privatise(child)
    runtime.evict(child, 4, 54)
    assert runtime.length(child) == 153
    assert runtime.length(parent) == 200
    assert is_same(probe(runtime, parent), expected)
    runtime.evict(parent, 4, 54)  # nobody else owns its cells any more
    assert is_same(probe(runtime, parent), probe(runtime, runtime.fork(parent, 150)))


def test_evicting_behind_the_shared_part_needs_no_copy(runtime: CheckedRuntime) -> None:
    require(runtime, "evict", "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    child = runtime.fork(parent, 100)
    feed(runtime, child, some_tokens(runtime, CHUNK, seed=1))
    expected = probe(runtime, parent)
    runtime.evict(child, 110, 150)
    assert runtime.length(child) == 100 + CHUNK - 40
    assert is_same(probe(runtime, parent), expected)


def test_ranges_that_are_not_there_are_not_evicted(runtime: CheckedRuntime) -> None:
    require(runtime, "evict")
    sequence = opened(runtime, some_tokens(runtime, CHUNK))
    with unchanged(runtime, sequence):
        for start, stop in ((-1, 5), (5, CHUNK + 1), (9, 5), (CHUNK + 1, CHUNK + 2)):
            with pytest.raises(ValueError):
                runtime.evict(sequence, start, stop)


# -- privatise -------------------------------------------------------------------------------------


def test_privatising_changes_no_prediction(runtime: CheckedRuntime) -> None:
    require(runtime, "evict", "fork")
    parent = opened(runtime, some_tokens(runtime, CHUNK))
    child = runtime.fork(parent, 100)
    decode(runtime, child, some_tokens(runtime, 5))
    parent_before, child_before = probe(runtime, parent), probe(runtime, child)
    runtime.privatise(child)
    assert (runtime.length(parent), runtime.length(child)) == (CHUNK, 105)
    assert runtime.is_in_order(child)
    assert is_same(probe(runtime, child), child_before)
    assert is_same(probe(runtime, parent), parent_before)
    runtime.free(parent)
    assert runtime.free_cells() == runtime.facts.cells - 105
    assert is_same(probe(runtime, child), child_before)


def test_privatising_what_is_private_changes_nothing(runtime: CheckedRuntime) -> None:
    require(runtime, "evict")
    sequence, empty = opened(runtime, some_tokens(runtime, CHUNK)), runtime.open()
    with unchanged(runtime, sequence):
        runtime.privatise(sequence)
        runtime.privatise(empty)


def test_privatising_without_room_changes_nothing(load: Load) -> None:
    runtime = load(context=256, sequences=1)
    require(runtime, "evict", "fork")
    if runtime.facts.kv_layout != "shared":
        pytest.skip(f"{runtime.facts.backend} here shares no cells")
    parent = opened(runtime, some_tokens(runtime, 200))
    child = runtime.fork(parent, 200)
    with unchanged(runtime, parent, child), pytest.raises(OutOfCells):
        runtime.privatise(child)


# -- order -----------------------------------------------------------------------------------------


def test_cells_stay_in_order_while_conversations_come_and_go(runtime: CheckedRuntime) -> None:
    def check(*sequences: int) -> None:
        assert all(runtime.is_in_order(sequence) for sequence in sequences)

    def alternate(steps: int, *sequences: int) -> None:
        for seed in range(steps):
            for sequence in sequences:
                feed(runtime, sequence, some_tokens(runtime, 1, seed=seed))
                check(*sequences)

    one, two, three = (opened(runtime, some_tokens(runtime, 100, seed=seed)) for seed in (1, 2, 3))
    alternate(5, one, two, three)
    runtime.free(two)  # in the middle, while the others go on
    alternate(5, one, three)
    new = opened(runtime, some_tokens(runtime, 150, seed=4))  # joins
    alternate(5, one, three, new)
    runtime.free(one)
    child = runtime.fork(new, 120)
    alternate(5, new, child, three)
    runtime.rewind(three, 60)
    alternate(5, three, child)
    runtime.free(new)
    alternate(3, three, child, opened(runtime, some_tokens(runtime, 80, seed=5)))


def test_alternating_conversations_predict_as_alone(load: Load) -> None:
    mixed, alone = load(), load()
    prompts = [some_tokens(mixed, 100, seed=seed) for seed in (1, 2)]
    turns = [some_tokens(mixed, 5, seed=seed) for seed in (11, 12)]
    sequences = [opened(mixed, prompt) for prompt in prompts]
    mixed.free(opened(mixed, some_tokens(mixed, 30)))
    found: list[list[Logits]] = [[], []]
    for step in range(5):
        for which, sequence in enumerate(sequences):
            found[which].append(feed(mixed, sequence, [turns[which][step]]))
    for prompt, turn, rows in zip(prompts, turns, found, strict=True):
        sequence = opened(alone, prompt)
        for expected, row in zip(decode(alone, sequence, turn), rows, strict=True):
            assert is_same(expected, row)
        alone.free(sequence)
