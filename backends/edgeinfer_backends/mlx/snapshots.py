"""Positions of a sequence as bytes and back: a checked frame around each layer's keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeinfer_backends.snapshot_frame import SnapshotFrame

if TYPE_CHECKING:
    import mlx.core as mx

    from edgeinfer_backends.mlx.sequence_cache import SequenceCache


class SnapshotFormat:
    """shapes: each layer's (KV heads, size of a key, size of a value)."""

    def __init__(
        self,
        identity: Mapping[str, str],
        shapes: Sequence[tuple[int, int, int]],
        type_k: Any,
        type_v: Any,
    ) -> None:
        self._frame = SnapshotFrame(b"eiMX", 1, identity)
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
        return self._frame.wrap(start, stop, b"".join(parts))

    def unpack(self, payload: bytes, start: int, count: int) -> list[tuple[mx.array, mx.array]]:
        """Each layer's rows, as `SequenceCache.commit` takes them. Raises SnapshotRejected."""
        body = self._frame.unwrap(payload, start, count, count * self.bytes_per_position)
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
