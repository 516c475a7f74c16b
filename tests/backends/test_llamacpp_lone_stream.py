"""The layout `private` for one sequence: copied a block at a time, to the same bits as the other way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from edgeinfer.backend import BLOCK_TOKENS, Runtime, RuntimeSettings
from edgeinfer.errors import SnapshotRejected, StepFailed
from edgeinfer.registry import get_backend
from edgeinfer_backends.llamacpp.lone_stream import LoneStream
from edgeinfer_backends.llamacpp.streams import PrivateStreams
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import resolve_model
from tests.contract.driving import decode, feed, is_same, opened, probe, some_tokens
from tests.fixtures_gguf import write_tiny_gguf

SETTINGS = RuntimeSettings(context=1024, threads=1, threads_batch=1, gpu_layers=0, kv_layout="private")
LENGTH = 700


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    path = tmp_path_factory.mktemp("lone") / "tiny.gguf"
    return resolve_model(str(write_tiny_gguf(path, head_dim=64, weight_type="Q4_0"))).files


@contextmanager
def loaded(files: ModelFiles, sequences: int = 1, kv_type: str = "f16") -> Iterator[PrivateStreams]:
    settings = replace(SETTINGS, sequences=sequences, kv_type_k=kv_type, kv_type_v=kv_type)
    found = get_backend("llamacpp").load(files, settings, lambda done: True)
    assert isinstance(found, PrivateStreams)
    assert isinstance(found, LoneStream) == (sequences == 1)
    try:
        yield found
    finally:
        found.close()


def blocks_of(runtime: Runtime, sequence: int) -> list[tuple[bytes, int]]:
    length = runtime.length(sequence)
    return [
        (runtime.snapshot(sequence, start, stop), stop - start)
        for start, stop in ((a, min(a + BLOCK_TOKENS, length)) for a in range(0, length, BLOCK_TOKENS))
    ]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_snapshots_are_those_of_several_streams_and_are_taken_by_them(
    files: ModelFiles, kv_type: str
) -> None:
    with loaded(files, 1, kv_type) as lone, loaded(files, 2, kv_type) as several:
        tokens = some_tokens(lone, LENGTH)
        kept = [blocks_of(each, opened(each, tokens)) for each in (lone, several)]
        assert kept[0] == kept[1]
        lone.free(0)
        found = []
        for runtime in (lone, several):
            sequence = runtime.open()
            for payload, count in kept[0]:
                runtime.restore(sequence, payload, count)
            assert blocks_of(runtime, sequence) == kept[0]
            found.append(probe(runtime, sequence))
            runtime.check_integrity()
        assert is_same(*found)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_what_is_left_after_many_evictions_is_the_same(files: ModelFiles, kv_type: str) -> None:
    rng = random.Random(7)
    with loaded(files, 1, kv_type) as lone, loaded(files, 2, kv_type) as several:
        pair = (lone, several)
        sequences = [opened(each, some_tokens(each, LENGTH)) for each in pair]
        for number in range(30):
            length = lone.length(sequences[0])
            start = rng.randrange(length - 1)
            stop = rng.randint(start + 1, min(length, start + rng.choice((1, 40, 300))))
            new = some_tokens(lone, min(stop - start + 10, 1000 - length), seed=number)
            logits = []
            for runtime, sequence in zip(pair, sequences, strict=True):
                runtime.evict(sequence, start, stop)
                runtime.check_integrity()
                logits.append(feed(runtime, sequence, new))
            assert is_same(*logits), number
        assert blocks_of(lone, sequences[0]) == blocks_of(several, sequences[1])


def test_never_more_than_a_block_is_copied(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(files) as lone:
        sequence = opened(lone, some_tokens(lone, LENGTH))
        monkeypatch.setattr(PrivateStreams, "_state", None)  # which is all of a sequence
        blocks = blocks_of(lone, sequence)
        lone.evict(sequence, 10, 200)
        lone.free(sequence)
        sequence = lone.open()
        for payload, count in blocks:
            lone.restore(sequence, payload, count)
        assert decode(lone, sequence, [5, 6])


def test_a_rewound_sequence_goes_on_from_a_restored_block(files: ModelFiles) -> None:
    with loaded(files) as lone:
        sequence = opened(lone, some_tokens(lone, LENGTH))
        blocks = blocks_of(lone, sequence)
        expected = probe(lone, sequence)
        lone.rewind(sequence, BLOCK_TOKENS)
        feed(lone, sequence, [3] * 80)
        lone.rewind(sequence, BLOCK_TOKENS)
        for payload, count in blocks[1:]:
            lone.restore(sequence, payload, count)
        lone.check_integrity()
        assert is_same(probe(lone, sequence), expected)


def test_what_llama_cpp_refuses_leaves_what_was_there(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(files) as lone:
        sequence = opened(lone, some_tokens(lone, LENGTH))
        (first, second, _), expected = blocks_of(lone, sequence), probe(lone, sequence)
        lone.free(sequence)
        sequence = lone.open()
        lone.restore(sequence, *first)
        before = probe(lone, sequence)
        with monkeypatch.context() as patched:
            patched.setattr(lone, "_set_state", lambda *_: 0)
            with pytest.raises(StepFailed, match="took back no part"):
                lone.restore(sequence, *second)
        damaged = bytearray(second[0])
        damaged[-1] ^= 1
        with pytest.raises(SnapshotRejected):
            lone.restore(sequence, bytes(damaged[:-1]), second[1])
        assert lone.length(sequence) == BLOCK_TOKENS
        lone.check_integrity()
        assert is_same(probe(lone, sequence), before)
        lone.restore(sequence, *second)
        feed(lone, sequence, some_tokens(lone, LENGTH)[2 * BLOCK_TOKENS :])
        assert is_same(probe(lone, sequence), expected)
