"""KV snapshots as files: one for each block, written whole or not at all, read only if every byte holds.

    magic | identity | key | parent | first? | tokens | payload's size and digest | token ids | digest
    payload

`identity` is a digest of all that decides whether a snapshot may be used, `key` one of the block's
tokens and of all before them, so a file can be checked against its own name. The payload's digest is
SHA-256, which processors compute at more than a gigabyte a second (OpenSSL's BLAKE2b: at half of that,
and a restored conversation waits for it); that of what stands before it is BLAKE2b, like the keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeinfer.backend import BLOCK_TOKENS
from edgeinfer.engine.history import Gap, new_hash, token_bytes

MAGIC = b"EDGEKV\x00\x02"
BLOCK_SUFFIX, GAP_SUFFIX, PART_SUFFIX, PIN_SUFFIX = ".kv", ".gap", ".part", ".pin"
PART_PREFIX = "edgeinfer-"
KEY_BYTES = 16
MOST_BLOCK_BYTES = 2**29  # of a payload, where nothing better is known of what it can be
_PAYLOAD_DIGEST = 32  # SHA-256
_HEAD = struct.Struct(f"<8s{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}sBBHQ{_PAYLOAD_DIGEST}s")
_MAX_GAP_BYTES = 4096
_MAX_TOKEN = 2**31
_PIECE = 2**20
# Beside those of a plain file: no link is followed, and a pipe is not waited for.
_OPEN_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


class BlockInvalid(Exception):
    """A file that is not the block it should be. `str(error)` says how."""


@dataclass(frozen=True)
class BlockHeader:
    key: bytes
    parent: bytes
    is_first: bool
    tokens: tuple[int, ...]
    num_bytes: int  # of the payload
    digest: bytes  # of the payload
    offset: int  # of the payload in the file


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    return new_hash(parent + token_bytes(tokens)).digest()


def identity_digest(identity: Mapping[str, str]) -> bytes:
    return new_hash(json.dumps(dict(sorted(identity.items()))).encode()).digest()


def block_name(key: bytes) -> str:
    return key.hex() + BLOCK_SUFFIX


def write_block(
    folder: Path,
    identity: bytes,
    key: bytes,
    parent: bytes,
    is_first: bool,
    tokens: Sequence[int],
    payload: bytes,
) -> int:
    """Bytes written. Raises OSError; then nothing is left of it."""
    digest = hashlib.sha256(payload).digest()
    parent = parent.ljust(KEY_BYTES, b"\0")  # the root of what was read afresh has none
    head = _HEAD.pack(MAGIC, identity, key, parent, is_first, 0, len(tokens), len(payload), digest)
    head += struct.pack(f"<{len(tokens)}i", *tokens)
    head += new_hash(head).digest()
    _write_whole(folder, block_name(key), (head, payload))
    return len(head) + len(payload)


def write_gap(folder: Path, gap: Gap) -> None:
    """Raises OSError."""
    values = {name: v.hex() if isinstance(v, bytes) else v for name, v in asdict(gap).items()}
    _write_whole(folder, gap.key.hex() + GAP_SUFFIX, (json.dumps(values).encode(),))


def _write_whole(folder: Path, name: str, parts: Sequence[bytes]) -> None:
    descriptor, name_of_part = tempfile.mkstemp(PART_SUFFIX, PART_PREFIX, folder)
    part = Path(name_of_part)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for data in parts:
                view = memoryview(data)
                while view:  # a raw file may take less than it is given
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        part.replace(folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def read_header(path: Path, identity: bytes) -> BlockHeader:
    """Raises BlockInvalid, OSError."""
    with _opened(path) as file:
        return _read_header(file, path, identity)


def read_block(
    path: Path, identity: bytes, most_bytes: int = MOST_BLOCK_BYTES
) -> tuple[BlockHeader, bytes]:
    """The header and its payload, all of it checked. most_bytes: of a payload that can be one. Raises
    BlockInvalid, OSError."""
    with _opened(path) as file:
        header = _read_header(file, path, identity)
        if header.num_bytes > most_bytes:
            raise BlockInvalid(f"its {header.num_bytes} bytes are more than a block can have")
        payload = _read(file, header.num_bytes)
    if hashlib.sha256(payload).digest() != header.digest:
        raise BlockInvalid("its contents are damaged")
    return header, payload


def check_block(path: Path, identity: bytes) -> BlockHeader:
    """As `read_block`, whatever its size: a piece at a time. Raises BlockInvalid, OSError."""
    with _opened(path) as file:
        header = _read_header(file, path, identity)
        digest, left = hashlib.sha256(), header.num_bytes
        while left:
            piece = _read(file, min(left, _PIECE))
            digest.update(piece)
            left -= len(piece)
    if digest.digest() != header.digest:
        raise BlockInvalid("its contents are damaged")
    return header


def read_small(path: Path, most: int) -> bytes:
    """Of a plain file, its first `most` bytes. Raises BlockInvalid, OSError."""
    with _opened(path) as file:
        return file.read(most)


def read_gap(path: Path) -> Gap:
    """Raises BlockInvalid, OSError."""
    data = read_small(path, _MAX_GAP_BYTES)
    try:
        found = json.loads(data)
        numbers = [found[name] for name in ("length", "head", "count")]
        if any(type(number) is not int or not 0 <= number < _MAX_TOKEN for number in numbers):
            raise BlockInvalid("its numbers cannot be")
        gap = Gap(bytes.fromhex(found["root"]), bytes.fromhex(found["history"]), *numbers)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BlockInvalid("it is no record of what was evicted") from error
    if gap.key.hex() + GAP_SUFFIX != path.name or gap.head + gap.count > gap.length:
        raise BlockInvalid("it is damaged, or has another one's name")
    return gap


class _File:
    """A plain file that is read to certain lengths."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.size = os.fstat(descriptor).st_size

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, most: int) -> bytes:
        """Up to `most` bytes; fewer at the end only."""
        parts = []
        while most > 0:
            data = self._file.read(most)
            if not data:
                break
            parts.append(data)
            most -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _opened(path: Path) -> _File:
    descriptor = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BlockInvalid("it is not a file")
    return _File(descriptor)


def _read(file: _File, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise BlockInvalid("it is truncated")
    return data


def _read_header(file: _File, path: Path, identity: bytes) -> BlockHeader:
    head = _read(file, _HEAD.size)
    magic, made_for, key, parent, first, zero, count, num_bytes, digest = _HEAD.unpack(head)
    if magic != MAGIC:
        raise BlockInvalid("it is not a block of this version")
    if made_for != identity:
        raise BlockInvalid("it was made for another model, KV type or build")
    if not 0 < count <= BLOCK_TOKENS or first not in (0, 1) or zero:
        raise BlockInvalid("its header is damaged")
    ids = _read(file, 4 * count)
    check = _read(file, KEY_BYTES)
    offset = len(head) + len(ids) + len(check)
    if check != new_hash(head + ids).digest():
        raise BlockInvalid("its header is damaged")
    if file.size != offset + num_bytes:
        raise BlockInvalid(f"it has {file.size} bytes, not {offset + num_bytes}; it is truncated")
    tokens = struct.unpack(f"<{count}i", ids)
    if first and not any(parent):
        parent = b""
    if key != block_key(parent, tokens) or path.name != block_name(key):
        raise BlockInvalid("it has another one's name")
    return BlockHeader(key, parent, bool(first), tokens, num_bytes, digest, offset)
