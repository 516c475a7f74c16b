"""Positions of a sequence as bytes and back: a checked frame around each layer's keys and values."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import SnapshotRejected

if TYPE_CHECKING:
    import mlx.core as mx

    from edgeinfer_backends.mlx.sequence_cache import SequenceCache

# magic, version, digest of the identity, start, stop, checksum of everything else
_HEAD = struct.Struct("<4sI16sIII")
_MAGIC = b"eiMX"
_VERSION = 1


class SnapshotFormat:
    """shapes: each layer's (KV heads, size of a key, size of a value)."""

    def __init__(
        self,
        identity: Mapping[str, str],
        shapes: Sequence[tuple[int, int, int]],
        type_k: Any,
        type_v: Any,
    ) -> None:
        text = repr(sorted(identity.items()))
        self._identity = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._shapes = shapes
        self._type_k, self._type_v = type_k, type_v

    @property
    def bytes_per_position(self) -> int:
        size_k, size_v = self._type_k.size, self._type_v.size
        return sum(heads * (k * size_k + v * size_v) for heads, k, v in self._shapes)

    def pack(self, cache: SequenceCache, start: int, stop: int) -> bytes:
        parts: list[bytes] = []
        for layer in range(len(self._shapes)):
            parts.extend(_to_bytes(rows) for rows in cache.rows(layer, start, stop))
        body = b"".join(parts)
        check = _checksum(self._identity, start, stop, body)
        return _HEAD.pack(_MAGIC, _VERSION, self._identity, start, stop, check) + body

    def unpack(self, payload: bytes, start: int, count: int) -> list[tuple[mx.array, mx.array]]:
        """Each layer's rows, as `SequenceCache.commit` takes them. Raises SnapshotRejected."""
        if len(payload) < _HEAD.size:
            raise SnapshotRejected(f"a KV snapshot of {len(payload)} bytes is too short to be one")
        magic, version, identity, begin, end, check = _HEAD.unpack_from(payload)
        body = memoryview(payload)[_HEAD.size :]
        if magic != _MAGIC or version != _VERSION:
            raise SnapshotRejected("these bytes are not a KV snapshot of this version")
        if identity != self._identity:
            raise SnapshotRejected("the KV snapshot belongs to another model, KV type or version of mlx")
        if (begin, end) != (start, start + count):
            raise SnapshotRejected(
                f"the KV snapshot holds positions [{begin}, {end}), not [{start}, {start + count})"
            )
        if len(body) != count * self.bytes_per_position or check != _checksum(
            identity, begin, end, body
        ):
            raise SnapshotRejected("the KV snapshot is damaged")
        layers, offset = [], 0
        for heads, size_k, size_v in self._shapes:
            pair = []
            for size, kind in ((size_k, self._type_k), (size_v, self._type_v)):
                num_bytes = heads * count * size * kind.size
                rows = _from_bytes(body[offset : offset + num_bytes], (1, heads, count, size), kind)
                pair.append(rows)
                offset += num_bytes
            layers.append((pair[0], pair[1]))
        return layers


def _checksum(identity: bytes, start: int, stop: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(identity + struct.pack("<II", start, stop)))


def _to_bytes(rows: mx.array) -> bytes:
    """numpy has no bfloat16, so all go as unsigned integers of their size."""
    import mlx.core as mx
    import numpy as np

    kind = mx.uint32 if rows.dtype.size == 4 else mx.uint16
    return np.array(mx.contiguous(rows).view(kind)).tobytes()


def _from_bytes(data: memoryview, shape: tuple[int, ...], kind: Any) -> mx.array:
    import mlx.core as mx
    import numpy as np

    words = np.frombuffer(data, dtype=np.uint32 if kind.size == 4 else np.uint16).reshape(shape)
    return mx.array(words).view(kind)
