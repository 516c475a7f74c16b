"""The frame around a KV snapshot's bytes: whose they are, which positions, and a checksum of it all."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping

from edgeinfer.errors import SnapshotRejected

# magic, version, digest of the identity, start, stop, checksum of everything else
_HEAD = struct.Struct("<4sI16sIII")


class SnapshotFrame:
    """magic: four bytes, of a backend. version: of the body's form."""

    def __init__(self, magic: bytes, version: int, identity: Mapping[str, str]) -> None:
        text = repr(sorted(identity.items()))
        self._magic = magic
        self._version = version
        self._identity = hashlib.blake2b(text.encode(), digest_size=16).digest()

    def wrap(self, start: int, stop: int, body: bytes) -> bytes:
        check = self._checksum(start, stop, body)
        return _HEAD.pack(self._magic, self._version, self._identity, start, stop, check) + body

    def unwrap(self, payload: bytes, start: int, count: int, body_bytes: int) -> memoryview:
        """The body of a snapshot of positions [start, start + count). Raises SnapshotRejected."""
        if len(payload) < _HEAD.size:
            raise SnapshotRejected(f"a KV snapshot of {len(payload)} bytes is too short to be one")
        magic, version, identity, begin, end, check = _HEAD.unpack_from(payload)
        body = memoryview(payload)[_HEAD.size :]
        if magic != self._magic or version != self._version:
            raise SnapshotRejected("these bytes are not a KV snapshot of this version")
        if identity != self._identity:
            raise SnapshotRejected(
                "the KV snapshot belongs to another model, KV type or version of the backend"
            )
        if (begin, end) != (start, start + count):
            raise SnapshotRejected(
                f"the KV snapshot holds positions [{begin}, {end}), not [{start}, {start + count})"
            )
        if len(body) != body_bytes or check != self._checksum(begin, end, body):
            raise SnapshotRejected("the KV snapshot is damaged")
        return body

    def _checksum(self, start: int, stop: int, body: bytes | memoryview) -> int:
        return zlib.crc32(body, zlib.crc32(self._identity + struct.pack("<II", start, stop)))
