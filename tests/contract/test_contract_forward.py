"""The contract of `forward` and `logits`: rows where they belong, the same bits however it is cut."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from edgeinfer.backend import LogitRows, SequenceStep, Step
from edgeinfer.errors import OutOfCells, StepAborted
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
    require_one_pool,
    some_tokens,
    unchanged,
)

Load = Callable[..., CheckedRuntime]


def test_rows_are_finite_float32_over_the_vocabulary(runtime: CheckedRuntime) -> None:
    logits = feed(runtime, runtime.open(), some_tokens(runtime, 10))
    assert logits.shape == (runtime.facts.vocab_size,)
    assert logits.dtype == np.float32
    assert np.all(np.isfinite(logits))
    assert logits.std() > 0


def test_a_step_places_the_rows_of_each_part_in_order(runtime: CheckedRuntime) -> None:
    rows: list[LogitRows] = ["all", "none", "last", "all"]
    sizes = [3, 4, 5, 1]
    sequences = [runtime.open() for _ in rows]
    parts = [
        SequenceStep(sequence, some_tokens(runtime, size, seed=sequence), kind)
        for sequence, size, kind in zip(sequences, sizes, rows, strict=True)
    ]
    result = runtime.forward(Step(parts))
    assert list(result.counts) == [3, 0, 1, 1]
    taken = [r for s, n in zip(result.starts, result.counts, strict=True) for r in range(s, s + n)]
    assert len(set(taken)) == 5, "rows overlap"
    assert [runtime.length(sequence) for sequence in sequences] == sizes
    logits = [runtime.logits(row).copy() for row in taken]
    for one in range(5):
        for other in range(one):
            assert not is_same(logits[one], logits[other]), "two rows of different texts are equal"


def test_all_rows_of_a_part_are_those_of_its_tokens_in_order(runtime: CheckedRuntime) -> None:
    prompt, more = some_tokens(runtime, CHUNK), some_tokens(runtime, 4, seed=1)
    alone = decode(runtime, opened(runtime, prompt), more)
    together = opened(runtime, prompt)
    result = runtime.forward(Step([SequenceStep(together, more, "all")]))
    for offset, expected in enumerate(alone):
        assert is_alike(runtime.logits(result.starts[0] + offset), expected)


def test_the_last_row_is_the_last_of_all_rows(runtime: CheckedRuntime) -> None:
    tokens = some_tokens(runtime, 40)
    last = feed(runtime, runtime.open(), tokens)
    result = runtime.forward(Step([SequenceStep(runtime.open(), tokens, "all")]))
    assert is_alike(runtime.logits(result.starts[0] + 39), last)


def test_as_many_rows_as_declared_are_computed(runtime: CheckedRuntime) -> None:
    most = min(runtime.facts.max_logit_rows, runtime.facts.max_step_tokens)
    tokens = some_tokens(runtime, most)
    result = runtime.forward(Step([SequenceStep(runtime.open(), tokens, "all")]))
    assert list(result.counts) == [most]
    assert np.all(np.isfinite(runtime.logits(result.starts[0] + most - 1)))


def test_sequences_prefilled_in_one_step_predict_as_alone(load: Load) -> None:
    together, alone = load(), load()
    if together.facts.kv_layout == "private" and together.facts.stable_chunk_tokens > 1:
        pytest.skip("large steps of several sequences are not promised to be exact")
    prompts = [some_tokens(together, size, seed=size) for size in (70, 128, 101)]
    sequences = [together.open() for _ in prompts]
    parts = [SequenceStep(s, prompt) for s, prompt in zip(sequences, prompts, strict=True)]
    result = together.forward(Step(parts))
    for row, prompt in zip(result.starts, prompts, strict=True):
        sequence = alone.open()
        assert is_alike(feed(alone, sequence, prompt), together.logits(row))
        alone.free(sequence)


def test_short_prompts_in_one_step_predict_as_alone(load: Load) -> None:
    together, alone = load(), load()
    stable = together.facts.stable_chunk_tokens
    if together.facts.kv_layout != "private" and stable > 1:
        pytest.skip("the tokens of all parts are what counts as a small step here")
    size = max(stable - 1, 1)
    pieces = [some_tokens(together, n, seed=n) for n in (size, 1, min(size, 41))]
    before = [some_tokens(together, 70), *[[]] * (len(pieces) - 1)]  # the first has a conversation
    sequences = [opened(together, tokens) for tokens in before]
    parts = [SequenceStep(s, piece) for s, piece in zip(sequences, pieces, strict=True)]
    result = together.forward(Step(parts))
    for row, tokens, piece in zip(result.starts, before, pieces, strict=True):
        sequence = opened(alone, tokens)
        assert is_alike(feed(alone, sequence, piece), together.logits(row))
        alone.free(sequence)


def test_sequences_decoded_together_predict_as_alone(load: Load) -> None:
    together, alone = load(), load()
    prompts = [some_tokens(together, size, seed=size) for size in (70, 128, 201)]
    sequences = [opened(together, prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    seen: list[list[Logits]] = [[] for _ in prompts]
    following = {sequence: prompt[0] for sequence, prompt in zip(sequences, prompts, strict=True)}
    for _ in range(16):
        for index, (sequence, logits) in enumerate(decode_together(together, following).items()):
            answers[index].append(following[sequence])
            seen[index].append(logits)
            following[sequence] = int(logits.argmax())
        assert all(together.is_in_order(sequence) for sequence in sequences)
    for prompt, answer, rows in zip(prompts, answers, seen, strict=True):
        sequence = opened(alone, prompt)
        for expected, found in zip(decode(alone, sequence, answer), rows, strict=True):
            assert is_alike(expected, found)
        alone.free(sequence)


@pytest.mark.parametrize("chunks", [(128, 272), (200, 200), (100, 100, 100, 100), (64, 336)])
def test_a_prompt_fed_in_chunks_predicts_as_fed_at_once(
    runtime: CheckedRuntime, chunks: tuple[int, ...]
) -> None:
    if min(chunks) < runtime.facts.stable_chunk_tokens:
        pytest.skip(f"chunks of {min(chunks)} are below the declared stable_chunk_tokens")
    prompt = some_tokens(runtime, sum(chunks))
    at_once = runtime.open()
    expected = feed(runtime, at_once, prompt, chunk=len(prompt))
    in_chunks = runtime.open()
    done = 0
    for size in chunks:
        found = feed(runtime, in_chunks, prompt[done : done + size], chunk=size)
        done += size
    assert is_alike(found, expected)
    assert is_alike(probe(runtime, in_chunks), probe(runtime, at_once))


@pytest.mark.parametrize("padding", [1, 2, 3, 7])
def test_padding_rows_change_nothing(load: Load, padding: int) -> None:
    padded, plain = load(), load()
    prompt, more = some_tokens(padded, CHUNK), some_tokens(padded, 6, seed=1)
    one, other = opened(padded, prompt), opened(plain, prompt)
    free = padded.free_cells()
    for token in more:
        found = decode_together(padded, {one: token}, padding)[one]
        assert is_same(found, decode_together(plain, {other: token})[other])
    assert padded.length(one) == plain.length(other)
    assert padded.free_cells() == free - len(more)
    assert padded.is_in_order(one)


def test_empty_sequences_cost_no_cells(runtime: CheckedRuntime) -> None:
    free = runtime.free_cells()
    assert free == runtime.facts.cells
    sequences = [runtime.open() for _ in range(3)]
    assert len(set(sequences)) == 3
    assert [runtime.length(sequence) for sequence in sequences] == [0, 0, 0]
    assert runtime.free_cells() == free


def test_running_out_of_cells_changes_nothing_and_freeing_helps(load: Load) -> None:
    tight, roomy = load(context=256, sequences=2), load()
    require_one_pool(tight)
    prompt = some_tokens(tight, CHUNK)
    one, big = opened(tight, prompt), opened(tight, some_tokens(tight, 256, seed=1))
    while tight.free_cells() > 128:  # backends may have cells beyond the contexts
        opened(tight, some_tokens(tight, min(tight.free_cells() - 128, 200), seed=4))
    other = opened(tight, some_tokens(tight, 127, seed=2))
    assert tight.free_cells() == 1
    token = some_tokens(tight, 1, seed=3)[0]
    # The first part alone would fit: neither may be kept.
    for parts in ([(one, 1), (other, 1)], [(one, 2)], [(other, 2)]):
        step = Step([SequenceStep(sequence, [token] * count) for sequence, count in parts])
        with pytest.raises(OutOfCells):
            tight.forward(step)
        assert [tight.length(s) for s in (one, big, other)] == [128, 256, 127]
        assert tight.free_cells() == 1
    tight.free(big)
    assert tight.free_cells() == 257
    found = decode_together(tight, {one: token, other: token})
    assert tight.is_in_order(one)
    expected = decode(roomy, opened(roomy, prompt), [token])[0]
    assert is_alike(found[one], expected)


def test_the_last_cell_can_be_filled(load: Load) -> None:
    runtime = load(context=256, sequences=1)
    sequence = opened(runtime, some_tokens(runtime, 255))
    feed(runtime, sequence, some_tokens(runtime, 1))
    assert runtime.length(sequence) == 256
    assert runtime.free_cells() == runtime.facts.cells - 256
    with pytest.raises(OutOfCells):
        feed(runtime, sequence, some_tokens(runtime, runtime.free_cells() + 1))
    assert runtime.length(sequence) == 256


def test_wrong_steps_are_refused_and_change_nothing(runtime: CheckedRuntime) -> None:
    facts = runtime.facts
    one, other = (opened(runtime, some_tokens(runtime, CHUNK, seed=seed)) for seed in (1, 2))
    gone = runtime.open()
    runtime.free(gone)
    good = SequenceStep(one, [1, 2])
    long = some_tokens(runtime, facts.max_step_tokens)
    wrong = {
        "an unknown sequence": Step([good, SequenceStep(10**6, [1])]),
        "a negative sequence": Step([good, SequenceStep(-1, [1])]),
        "a freed sequence": Step([good, SequenceStep(gone, [1])]),
        "a token past the vocabulary": Step([good, SequenceStep(other, [1, facts.vocab_size])]),
        "a negative token": Step([good, SequenceStep(other, [-1])]),
        "a part with no tokens": Step([good, SequenceStep(other, [])]),
        "no parts": Step([]),
        "the same sequence twice": Step([good, SequenceStep(one, [3])]),
        "too many tokens": Step([SequenceStep(other, [*long, 1], "none")]),
        "too many rows": Step([SequenceStep(other, [1] * (facts.max_logit_rows + 1), "all")]),
        "negative padding": Step([good], padding=-1),
    }
    with unchanged(runtime, one, other):
        for what, step in wrong.items():
            with pytest.raises(ValueError):
                runtime.forward(step)
                pytest.fail(f"{what} was taken")


def test_rows_that_were_not_computed_are_refused(runtime: CheckedRuntime) -> None:
    with pytest.raises(ValueError):
        runtime.logits(0)
    result = runtime.forward(Step([SequenceStep(runtime.open(), some_tokens(runtime, 5))]))
    assert list(result.counts) == [1]
    for row in (-1, result.starts[0] + 1, 10**6):
        with pytest.raises(ValueError):
            runtime.logits(row)


def test_threads_can_be_set_and_results_stay(runtime: CheckedRuntime) -> None:
    sequence = opened(runtime, some_tokens(runtime, CHUNK))
    before = probe(runtime, sequence)
    loaded = (runtime.facts.threads, runtime.facts.threads_batch)
    runtime.set_threads(2, 1)
    expected = (2, 1) if runtime.facts.can.threads else loaded
    assert (runtime.facts.threads, runtime.facts.threads_batch) == expected
    assert is_alike(probe(runtime, sequence), before)
    runtime.set_threads(0, 0)
    assert runtime.facts.threads >= 1
    assert runtime.facts.threads_batch >= 1
    with pytest.raises(ValueError):
        runtime.set_threads(-1, 1)


def test_an_aborted_step_keeps_nothing(runtime: CheckedRuntime) -> None:
    require(runtime, "abort")
    sequence = opened(runtime, some_tokens(runtime, CHUNK))
    expected = probe(runtime, sequence)
    stop = threading.Event()

    def abort_often() -> None:
        while not stop.wait(0.0005):
            runtime.abort()

    thread = threading.Thread(target=abort_often)
    thread.start()
    try:
        for _ in range(20):
            length = runtime.length(sequence)
            try:
                feed(runtime, sequence, some_tokens(runtime, 200), chunk=200)
            except StepAborted:
                assert runtime.length(sequence) == length
            else:
                assert runtime.length(sequence) == length + 200
            runtime.rewind(sequence, CHUNK)
    finally:
        stop.set()
        thread.join()
    assert is_same(probe(runtime, sequence), expected)
