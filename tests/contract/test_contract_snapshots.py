"""The contract of snapshot and restore: bit-identical, or refused with nothing changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgeinfer.backend import BLOCK_TOKENS
from edgeinfer.errors import OutOfCells, SnapshotRejected
from tests.contract.checked_runtime import CheckedRuntime
from tests.contract.driving import (
    decode,
    is_same,
    opened,
    probe,
    require,
    require_one_pool,
    restored,
    snapshots,
    some_tokens,
    unchanged,
)

Load = Callable[..., CheckedRuntime]


@pytest.mark.parametrize("length", [1, 100, BLOCK_TOKENS, BLOCK_TOKENS + 1, 700])
def test_a_restored_sequence_predicts_as_the_original(runtime: CheckedRuntime, length: int) -> None:
    require(runtime, "snapshot")
    sequence = opened(runtime, some_tokens(runtime, length))
    with unchanged(runtime, sequence):
        blocks = snapshots(runtime, sequence)
    copy = restored(runtime, blocks)
    assert runtime.length(copy) == length
    assert runtime.is_in_order(copy)
    assert is_same(probe(runtime, copy), probe(runtime, sequence))
    tokens = some_tokens(runtime, 3, seed=1)
    for left, right in zip(
        decode(runtime, copy, tokens), decode(runtime, sequence, tokens), strict=True
    ):
        assert is_same(left, right)


def test_a_snapshot_restores_in_another_runtime_of_equal_identity(load: Load) -> None:
    saver, loader = load(), load()
    require(saver, "snapshot")
    assert dict(saver.identity()) == dict(loader.identity())
    sequence = opened(saver, some_tokens(saver, 400))
    expected = probe(saver, sequence)
    blocks = snapshots(saver, sequence)
    saver.close()
    other = opened(loader, some_tokens(loader, 90, seed=7))
    with unchanged(loader, other):
        copy = restored(loader, blocks)
        assert is_same(probe(loader, copy), expected)
        loader.free(copy)


def test_the_same_positions_give_the_same_bytes(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot")
    sequence = opened(runtime, some_tokens(runtime, 300))
    assert runtime.snapshot(sequence, 0, 256) == runtime.snapshot(sequence, 0, 256)
    blocks = snapshots(runtime, sequence)
    copy = restored(runtime, blocks)
    assert snapshots(runtime, copy) == blocks


def test_a_snapshot_of_a_part_continues_a_shorter_sequence(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot", "fork")
    sequence = opened(runtime, some_tokens(runtime, 300))
    expected = probe(runtime, sequence)
    tail = runtime.snapshot(sequence, 100, 300)
    short = runtime.fork(sequence, 100)
    runtime.restore(short, tail, 200)
    assert runtime.length(short) == 300
    assert is_same(probe(runtime, short), expected)
    runtime.rewind(sequence, 100)
    runtime.restore(sequence, tail, 200)
    assert is_same(probe(runtime, sequence), expected)


def test_a_fork_can_be_saved_while_it_shares_cells(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot", "fork")
    parent = opened(runtime, some_tokens(runtime, 200))
    child = runtime.fork(parent, 150)
    decode(runtime, child, some_tokens(runtime, 3))
    with unchanged(runtime, parent, child):
        blocks = snapshots(runtime, child)
    copy = restored(runtime, blocks)
    assert is_same(probe(runtime, copy), probe(runtime, child))


def test_restored_cells_can_be_shared_evicted_and_rewound(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot", "evict", "fork")
    sequence = opened(runtime, some_tokens(runtime, 300))
    copy = restored(runtime, snapshots(runtime, sequence))
    for each in (sequence, copy):
        runtime.evict(each, 4, 104)
        runtime.rewind(each, 180)
    assert is_same(probe(runtime, copy), probe(runtime, sequence))
    child = runtime.fork(copy, 180)
    assert is_same(probe(runtime, child), probe(runtime, sequence))


def test_damaged_snapshots_are_refused_and_change_nothing(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot")
    sequence, other = (opened(runtime, some_tokens(runtime, 200, seed=seed)) for seed in (1, 2))
    payload = runtime.snapshot(sequence, 0, 200)
    target = runtime.open()
    damaged = {
        "empty": b"",
        "one byte": payload[:1],
        "only the beginning": payload[:40],
        "half": payload[: len(payload) // 2],
        "the last byte lost": payload[:-1],
        "a byte too many": payload + b"\0",
        "doubled": payload + payload,
        "zeros": bytes(len(payload)),
        "ones": b"\xff" * len(payload),
        "a foreign text": b"not a snapshot" * 20,
        **{f"byte {at} flipped": _flipped(payload, at) for at in range(8)},
    }
    with unchanged(runtime, sequence, other):
        for what, data in damaged.items():
            with pytest.raises(SnapshotRejected):
                runtime.restore(target, data, 200)
                pytest.fail(f"{what} was taken")
            assert runtime.length(target) == 0
    runtime.restore(target, payload, 200)
    assert is_same(probe(runtime, target), probe(runtime, sequence))


def _flipped(payload: bytes, at: int) -> bytes:
    return payload[:at] + bytes([payload[at] ^ 0xFF]) + payload[at + 1 :]


def test_another_number_of_positions_is_refused(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot")
    sequence, target = opened(runtime, some_tokens(runtime, 200)), runtime.open()
    payload = runtime.snapshot(sequence, 0, 200)
    for wrong in (199, 201, 1, BLOCK_TOKENS):
        with unchanged(runtime, sequence), pytest.raises(SnapshotRejected):
            runtime.restore(target, payload, wrong)
        assert runtime.length(target) == 0


def test_a_snapshot_of_another_position_is_refused(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot", "fork")
    sequence = opened(runtime, some_tokens(runtime, 300))
    first, tail = runtime.snapshot(sequence, 0, 100), runtime.snapshot(sequence, 100, 200)
    empty, short = runtime.open(), runtime.fork(sequence, 99)
    for target, payload in ((empty, tail), (short, tail), (short, first), (sequence, tail)):
        length = runtime.length(target)
        with unchanged(runtime, sequence, short), pytest.raises(SnapshotRejected):
            runtime.restore(target, payload, 100)
        assert runtime.length(target) == length


def test_a_snapshot_made_with_other_kv_types_has_another_identity(load: Load) -> None:
    plain = load()
    require(plain, "snapshot")
    others = [load(kv_type_k=kind) for kind in ("q8_0", "f32")]
    differing = [other for other in others if other.facts.kv_type_k != plain.facts.kv_type_k]
    if not differing:
        pytest.skip(f"{plain.facts.backend} has one KV type")
    payload = plain.snapshot(opened(plain, some_tokens(plain, 100)), 0, 100)
    for other in differing:
        assert dict(plain.identity()) != dict(other.identity())
        target = other.open()
        with pytest.raises(SnapshotRejected):
            other.restore(target, payload, 100)
        assert other.length(target) == 0


def test_a_kv_type_that_is_not_there_is_said_and_another_taken(load: Load) -> None:
    """What was asked for is either had, or a warning names it."""
    for kind in ("q8_0", "f32", "f16"):
        facts = load(kv_type_k=kind, kv_type_v=kind).facts
        if (facts.kv_type_k, facts.kv_type_v) != (kind, kind):
            assert any(kind in warning for warning in facts.warnings), kind


def test_restoring_without_room_changes_nothing(load: Load) -> None:
    runtime = load(context=256, sequences=1)
    require(runtime, "snapshot")
    require_one_pool(runtime)
    sequence = opened(runtime, some_tokens(runtime, 150))
    payload = runtime.snapshot(sequence, 0, 150)
    target = runtime.open()
    with unchanged(runtime, sequence), pytest.raises(OutOfCells):
        runtime.restore(target, payload, 150)
    assert runtime.length(target) == 0
    runtime.free(sequence)
    runtime.restore(target, payload, 150)
    assert runtime.length(target) == 150


def test_ranges_that_are_not_there_are_not_saved(runtime: CheckedRuntime) -> None:
    require(runtime, "snapshot")
    sequence = opened(runtime, some_tokens(runtime, 400))
    with unchanged(runtime, sequence):
        for start, stop in ((-1, 5), (300, 401), (9, 5), (5, 5), (0, BLOCK_TOKENS + 1)):
            with pytest.raises(ValueError):
                runtime.snapshot(sequence, start, stop)
