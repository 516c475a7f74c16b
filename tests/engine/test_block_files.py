"""A block on disk is read whole and right, or not at all."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from edgeinfer.engine.block_files import (
    BlockInvalid,
    block_key,
    block_name,
    identity_digest,
    read_block,
    read_gap,
    read_header,
    write_block,
    write_gap,
)
from edgeinfer.engine.history import gap_of_cut, gap_of_shift

IDENTITY = identity_digest({"weights": "a", "kv_types": "f16/f16"})
TOKENS = tuple(range(1, 41))
PAYLOAD = bytes(range(256)) * 3


def written(folder: Path, parent: bytes = b"", payload: bytes = PAYLOAD) -> Path:
    key = block_key(parent, TOKENS)
    size = write_block(folder, IDENTITY, key, parent, not parent, TOKENS, payload)
    path = folder / block_name(key)
    assert path.stat().st_size == size
    return path


@pytest.mark.parametrize("parent", [b"", b"p" * 16])
def test_what_was_written_is_read(tmp_path: Path, parent: bytes) -> None:
    path = written(tmp_path, parent)
    header, payload = read_block(path, IDENTITY)
    assert payload == PAYLOAD
    assert header == read_header(path, IDENTITY)
    assert (header.key, header.parent, header.tokens) == (block_key(parent, TOKENS), parent, TOKENS)
    assert header.is_first == (not parent)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no part is left


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path) -> None:
    """10,000 of them: of the header every one, several times."""
    path = written(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for trial in range(10_000):
        damaged = bytearray(whole)
        at = trial % 400 if trial < 5000 else rng.randrange(len(whole))
        damaged[at] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(BlockInvalid):
            read_block(path, IDENTITY)


def test_no_truncated_or_longer_file_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(BlockInvalid):
            read_header(path, IDENTITY)
    path.write_bytes(whole + b"x")
    with pytest.raises(BlockInvalid, match="truncated"):
        read_block(path, IDENTITY)


def test_a_foreign_file_says_so(tmp_path: Path) -> None:
    path = written(tmp_path)
    other = identity_digest({"weights": "a", "kv_types": "q8_0/q8_0"})
    with pytest.raises(BlockInvalid, match="another model, KV type or build"):
        read_block(path, other)
    moved = path.rename(tmp_path / block_name(b"k" * 16))
    with pytest.raises(BlockInvalid, match="another one's name"):
        read_block(moved, IDENTITY)


def test_links_folders_and_pipes_are_not_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    target = path.rename(tmp_path / "elsewhere")
    path.symlink_to(target)
    with pytest.raises((BlockInvalid, OSError)):
        read_block(path, IDENTITY)
    path.unlink()
    path.mkdir()
    with pytest.raises((BlockInvalid, OSError)):
        read_block(path, IDENTITY)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_gap_is_read_as_it_was_written(tmp_path: Path) -> None:
    history = list(range(900))
    first = gap_of_shift(None, history[:512], 4, 127)
    gaps = [first, gap_of_shift(first, history, 4, 127), gap_of_cut(history, 20, 700)]
    for gap in gaps:
        write_gap(tmp_path, gap)
        assert read_gap(tmp_path / f"{gap.key.hex()}.gap") == gap


def test_a_damaged_gap_is_none(tmp_path: Path) -> None:
    gap = gap_of_cut(list(range(900)), 20, 700)
    write_gap(tmp_path, gap)
    path = tmp_path / f"{gap.key.hex()}.gap"
    whole = path.read_bytes()
    rng = random.Random(1)
    for trial in range(2000):
        damaged = bytearray(whole)
        damaged[trial % len(whole)] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            found = read_gap(path)
        except BlockInvalid:
            continue
        assert found == gap  # a capital letter of a hexadecimal number is the same number
    for data in (b"", b"[]", b"{}", b"[" * 3000, b'{"length": 1e999}', whole.replace(b"700", b"-70")):
        path.write_bytes(data)
        with pytest.raises(BlockInvalid):
            read_gap(path)
