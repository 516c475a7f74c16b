"""The layout `private` of the llama.cpp backend, beside what the contract suite asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.errors import OutOfCells, StepAborted
from edgeinfer.registry import get_backend
from edgeinfer_backends.llamacpp.sequence_state import StateForm, UnknownState
from edgeinfer_backends.llamacpp.streams import PrivateStreams
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import resolve_model
from tests.contract.driving import decode, decode_together, is_same, opened, probe, some_tokens
from tests.fixtures_gguf import write_tiny_gguf

SETTINGS = RuntimeSettings(context=512, sequences=5, threads=1, threads_batch=1, gpu_layers=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    path = tmp_path_factory.mktemp("streams") / "tiny.gguf"
    return resolve_model(str(write_tiny_gguf(path, weight_type="Q4_0"))).files


def loaded(files: ModelFiles, settings: RuntimeSettings = SETTINGS) -> Runtime:
    return get_backend("llamacpp").load(files, settings, lambda done: True)


@pytest.fixture
def runtime(files: ModelFiles) -> Iterator[PrivateStreams]:
    found = loaded(files)
    assert isinstance(found, PrivateStreams)
    yield found
    found.close()


def test_every_sequence_gets_a_stream_where_that_can_be(files: ModelFiles) -> None:
    for settings, layout in (
        (SETTINGS, "private"),
        (replace(SETTINGS, sequences=1), "private"),
        (replace(SETTINGS, flash_attention=False), "shared"),
        (replace(SETTINGS, kv_layout="shared"), "shared"),
    ):
        found = loaded(files, settings)
        assert found.facts.kv_layout == layout
        found.close()


def test_a_model_with_a_sliding_window_shares_cells(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "g.gguf", arch="gemma3", tokenizer="spm", layers=7)
    found = loaded(resolve_model(str(path)).files)
    assert found.facts.kv_layout == "shared"
    found.close()


def test_sequences_that_lie_apart_for_a_while_change_places(runtime: PrivateStreams) -> None:
    prompts = [some_tokens(runtime, 30 + 10 * n, seed=n) for n in range(5)]
    sequences = [opened(runtime, prompt) for prompt in prompts]
    for sequence in (sequences[1], sequences[3]):
        runtime.free(sequence)
    running = {sequences[n]: prompts[n] for n in (0, 2, 4)}
    following = {sequence: some_tokens(runtime, 8, seed=9) for sequence in running}
    found = {sequence: [] for sequence in running}  # type: ignore[var-annotated]
    for step in range(8):
        tokens = {sequence: following[sequence][step] for sequence in reversed(running)}
        for sequence, logits in decode_together(runtime, tokens).items():
            found[sequence].append(logits)
        runtime.check_integrity()
    places = sorted(runtime._ids[sequence] for sequence in running)
    assert places[-1] - places[0] == 2
    for sequence, prompt in running.items():
        alone = opened(runtime, prompt)
        for expected, logits in zip(
            decode(runtime, alone, following[sequence]), found[sequence], strict=True
        ):
            assert is_same(expected, logits)
        runtime.free(alone)


def test_places_are_changed_with_a_sequence_that_is_not_in_the_step(runtime: PrivateStreams) -> None:
    prompts = [some_tokens(runtime, 20 + 30 * n, seed=n) for n in range(5)]
    sequences = [opened(runtime, prompt) for prompt in prompts]
    expected = [probe(runtime, sequence) for sequence in sequences]
    for _ in range(6):  # the second and the fourth are reading long prompts, in steps of their own
        decode_together(runtime, {sequences[n]: 5 for n in (0, 2, 4)})
    for n in (0, 2, 4):
        runtime.rewind(sequences[n], len(prompts[n]))
    runtime.check_integrity()
    assert runtime._ids != sorted(runtime._ids)
    for sequence, logits in zip(sequences, expected, strict=True):
        assert is_same(probe(runtime, sequence), logits)


def test_dummy_rows_are_put_into_streams_that_nobody_has(runtime: PrivateStreams) -> None:
    prompts = [some_tokens(runtime, 40, seed=n) for n in range(3)]
    sequences = [opened(runtime, prompt) for prompt in prompts]
    plain = decode_together(runtime, dict.fromkeys(sequences, 7))
    for sequence in sequences:
        runtime.rewind(sequence, 40)
    for padding in (1, 2, 5, 61):
        padded = decode_together(runtime, dict.fromkeys(sequences, 7), padding)
        runtime.check_integrity()
        for sequence in sequences:
            assert is_same(padded[sequence], plain[sequence])
            runtime.rewind(sequence, 40)


def test_a_full_stream_stops_its_own_sequence_only(runtime: PrivateStreams) -> None:
    full, other = opened(runtime, some_tokens(runtime, 512)), opened(runtime, some_tokens(runtime, 10))
    before = probe(runtime, other)
    with pytest.raises(OutOfCells):
        decode_together(runtime, {full: 5, other: 5})
    assert (runtime.length(full), runtime.length(other)) == (512, 10)
    assert is_same(probe(runtime, other), before)
    assert runtime.free_cells() == 5 * 512 - 522
    runtime.check_integrity()


def test_a_step_of_several_passes_that_fails_leaves_nothing(
    runtime: PrivateStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = opened(runtime, some_tokens(runtime, 20)), opened(runtime, some_tokens(runtime, 30))
    before = probe(runtime, one), probe(runtime, two)
    run = runtime._decode

    def interrupted(num_tokens: int) -> int:
        run(num_tokens)  # as if the last of several passes had been interrupted
        return 2

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "_decode", interrupted)
        with pytest.raises(StepAborted):
            runtime.forward(Step([SequenceStep(one, [5] * 9), SequenceStep(two, [6])]))
        with pytest.raises(StepAborted):
            runtime.forward(Step([SequenceStep(one, [5])]))
    assert (runtime.length(one), runtime.length(two)) == (20, 30)
    runtime.check_integrity()
    assert is_same(probe(runtime, one), before[0])
    assert is_same(probe(runtime, two), before[1])


def test_what_is_restored_is_there_whatever_comes_next(runtime: PrivateStreams) -> None:
    source = opened(runtime, some_tokens(runtime, 400))
    blocks = [(runtime.snapshot(source, a, b), b - a) for a, b in ((0, 256), (256, 400))]
    expected = probe(runtime, source)

    def restored() -> int:
        sequence = runtime.open()
        for payload, count in blocks:
            runtime.restore(sequence, payload, count)
        return sequence

    assert is_same(probe(runtime, restored()), expected)
    again = restored()
    assert [(runtime.snapshot(again, a, b), b - a) for a, b in ((0, 256), (256, 400))] == blocks
    runtime.free(again)
    forked = runtime.fork(restored(), 400)
    assert is_same(probe(runtime, forked), expected)
    runtime.check_integrity()


def test_a_state_of_another_form_is_not_guessed_at(
    runtime: PrivateStreams, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = opened(runtime, [5, 6])
    state = runtime._state(sequence)
    assert StateForm.read_from(state, 5) == runtime._form
    for at in (8, 12, 16, 20, 24, 40, 44, 52):
        wrong = bytearray(state)
        wrong[at] ^= 1
        with pytest.raises(UnknownState):
            StateForm.read_from(bytes(wrong), 5)
    for other in (state[:-1], state + b"\0", state[:30], b""):
        with pytest.raises(UnknownState):
            StateForm.read_from(other, 5)
    with pytest.raises(UnknownState):
        StateForm.read_from(state, 4)

    def unknown(state: bytes, streams: int) -> StateForm:
        raise UnknownState("another version")

    monkeypatch.setattr(StateForm, "read_from", unknown)
    found = loaded(files)
    assert found.facts.kv_layout == "shared"
    found.close()
