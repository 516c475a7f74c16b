"""Positions of a sequence as bytes and back: a checked frame around each layer's keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from edgeinfer_backends.snapshot_frame import SnapshotFrame
from edgeinfer_backends.torch.kv_cache import Rows, SequenceCache
from edgeinfer_backends.torch.kv_types import is_plain, item_type
from edgeinfer_models.families.shape import DecoderShape


class SnapshotFormat:
    """kinds: of keys and of values, names of kv_types.py. weighs: how much attention each position got
    is kept with it."""

    def __init__(
        self,
        identity: Mapping[str, str],
        shape: DecoderShape,
        kinds: tuple[str, str],
        device: torch.device,
        *,
        weighs: bool,
    ) -> None:
        self._frame = SnapshotFrame(b"eiTO", 1, identity)
        self._shape = shape
        self._kinds = kinds
        self._device = device
        self._weighs = weighs

    def pack(self, cache: SequenceCache, start: int, stop: int) -> bytes:
        parts = []
        for layer in range(self._shape.num_layers):
            for rows in cache.rows(layer, start, stop):
                parts += [_to_bytes(tensor) for tensor in rows.tensors()]
        weight = cache.weight(start, stop)
        if weight is not None:
            parts.append(_to_bytes(weight))
        return self._frame.wrap(start, stop, b"".join(parts))

    def unpack(
        self, payload: bytes, start: int, count: int
    ) -> tuple[list[tuple[Rows, Rows]], Tensor | None]:
        """Each layer's rows and their attention, as `SequenceCache.extend` takes them. Raises
        SnapshotRejected."""
        expected = list(self._parts(count))
        sizes = [_num_bytes(size, dtype) for size, dtype in expected]
        body = self._frame.unwrap(payload, start, count, sum(sizes))
        offset = 0
        tensors = []
        for (size, dtype), num_bytes in zip(expected, sizes, strict=True):
            tensors.append(self._from_bytes(body[offset : offset + num_bytes], size, dtype))
            offset += num_bytes
        found = iter(tensors)
        layers = [
            (_rows(found, self._kinds[0]), _rows(found, self._kinds[1]))
            for _ in range(self._shape.num_layers)
        ]
        return layers, next(found) if self._weighs else None

    def _parts(self, count: int) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of so many positions, in their order."""
        shape = self._shape
        for _ in range(shape.num_layers):
            for kind in self._kinds:
                yield (shape.num_kv_heads, count, shape.head_dim), item_type(kind)
                if not is_plain(kind):
                    yield (shape.num_kv_heads, count, 1), torch.float32
        if self._weighs:
            yield (shape.num_layers, shape.num_kv_heads, count), torch.float32

    def _from_bytes(self, data: memoryview, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        words = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return words.view(dtype).view(size).to(self._device)


def _rows(tensors: Iterator[Tensor], kind: str) -> Rows:
    numbers = next(tensors)
    return Rows(numbers, None if is_plain(kind) else next(tensors))


def _num_bytes(size: tuple[int, ...], dtype: torch.dtype) -> int:
    found = dtype.itemsize
    for each in size:
        found *= each
    return found


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
