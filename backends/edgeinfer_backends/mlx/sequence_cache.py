"""One sequence's keys and values, and the cache objects that mlx-lm's attention is given in a step.

A step only reads what is kept and stages what it computes; `commit` writes it when the whole step has
been computed. So a step that fails anywhere, or is interrupted, has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    Layers = list[tuple[mx.array, mx.array] | None]

GROWTH = 256  # positions by which the buffers grow
_SPARE = 2 * GROWTH  # unused positions above which a rewind gives memory back


class SequenceCache:
    """Buffers of shape (1, KV heads, capacity, head size) for each layer; the first `length` count."""

    def __init__(self, num_layers: int, type_k: Any, type_v: Any) -> None:
        self.length = 0
        self.type_k, self.type_v = type_k, type_v
        self.layers: Layers = [None] * num_layers

    def step(self, interrupt: Callable[[], None] | None = None) -> list[StepLayer]:
        """Cache objects for one step, one for each layer. interrupt: called whenever a layer's keys have
        been computed; what it raises ends the step."""
        return [StepLayer(self, layer, interrupt) for layer in range(len(self.layers))]

    def commit(self, staged: Sequence[tuple[mx.array, mx.array]]) -> None:
        """Append what a step staged: (keys, values) of each layer, shape (1, KV heads, n, head size)."""
        import mlx.core as mx

        count = staged[0][0].shape[2]
        for layer, (keys, values) in enumerate(staged):
            kept = self.layers[layer]
            if kept is None or self.length + count > kept[0].shape[2]:
                self.layers[layer] = (
                    _grown(kept and kept[0], self.length, keys),
                    _grown(kept and kept[1], self.length, values),
                )
            else:
                # In place, if nobody else (a fork) has the buffer: MLX copies it then.
                for buffer, rows in zip(kept, (keys, values), strict=True):
                    buffer[..., self.length : self.length + count, :] = rows
        mx.eval(self.layers)
        self.length += count

    def fork(self, length: int) -> SequenceCache:
        """A cache that begins with the first `length` positions. Memory is copied at the first write."""
        import mlx.core as mx

        new = SequenceCache(len(self.layers), self.type_k, self.type_v)
        new.length = length
        if length:
            # A slice is another array over the same memory. The object itself must not be shared: an
            # assignment into it would be seen by both.
            new.layers = [_both(kept, lambda x: x[..., :length, :]) for kept in self.layers]
            mx.eval(new.layers)
        return new

    def rewind(self, length: int) -> None:
        import mlx.core as mx

        capacity = self.capacity
        wanted = -(-length // GROWTH) * GROWTH
        if length == 0:
            self.layers = [None] * len(self.layers)
        elif capacity - wanted > _SPARE:
            shorter: Layers = [
                _both(kept, lambda x: mx.contiguous(x[..., :wanted, :])) for kept in self.layers
            ]
            mx.eval(shorter)
            self.layers = shorter
        self.length = length

    def evict(
        self, start: int, stop: int, rotations: Sequence[Callable[[mx.array, int], mx.array]]
    ) -> None:
        """Drop [start, stop) and rotate the keys behind down by as much. rotations: of each layer."""
        import mlx.core as mx

        new: Layers = []
        for kept, rotate in zip(self.layers, rotations, strict=True):
            assert kept is not None
            keys, values = kept
            moved = rotate(keys[..., stop : self.length, :], start - stop)
            behind = values[..., stop : self.length, :]
            new.append(
                (
                    _grown(None, 0, mx.concatenate([keys[..., :start, :], moved], axis=2)),
                    _grown(None, 0, mx.concatenate([values[..., :start, :], behind], axis=2)),
                )
            )
        mx.eval(new)
        self.layers = new
        self.length -= stop - start

    def rows(self, layer: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
        kept = self.layers[layer]
        assert kept is not None
        return kept[0][..., start:stop, :], kept[1][..., start:stop, :]

    @property
    def capacity(self) -> int:
        kept = self.layers[0] if self.layers else None
        return 0 if kept is None else int(kept[0].shape[2])

    def check_integrity(self) -> None:
        assert self.length <= self.capacity or self.length == 0
        for kept in self.layers:
            assert (kept is None) == (self.layers[0] is None), "some layers hold keys and some do not"
            if kept is not None:
                assert kept[0].shape[2] == kept[1].shape[2] == self.capacity
                assert (kept[0].dtype, kept[1].dtype) == (self.type_k, self.type_v)


class StepLayer:
    """What mlx-lm asks of a cache, for one layer in one step. Deliberately without `bits`: mlx-lm takes
    an object with them for its own quantized cache."""

    def __init__(self, cache: SequenceCache, layer: int, interrupt: Callable[[], None] | None) -> None:
        self._cache = cache
        self._layer = layer
        self._interrupt = interrupt
        self.offset = cache.length  # the position of the step's first token
        self.staged: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values so far, those of this step as they will be read from the cache later:
        rounded to its types, or a prompt's chunks would change results."""
        import mlx.core as mx

        new_k, new_v = keys.astype(self._cache.type_k), values.astype(self._cache.type_v)
        self.staged = (new_k, new_v)
        if self._interrupt is not None:
            mx.eval(new_k, new_v)
            self._interrupt()
        if self.offset == 0:
            return new_k.astype(keys.dtype), new_v.astype(values.dtype)
        old_k, old_v = self._cache.rows(self._layer, 0, self.offset)
        return (
            mx.concatenate([old_k, new_k], axis=2).astype(keys.dtype),
            mx.concatenate([old_v, new_v], axis=2).astype(values.dtype),
        )

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        from mlx_lm.models.cache import create_attention_mask

        return create_attention_mask(
            count, offset=self.offset, return_array=return_array, window_size=window_size
        )


def _grown(kept: mx.array | None, length: int, rows: mx.array) -> mx.array:
    """The first `length` positions of `kept`, then `rows`, then room to the next multiple of GROWTH."""
    import mlx.core as mx

    total = length + rows.shape[2]
    room = -total % GROWTH
    parts = [] if kept is None or not length else [kept[..., :length, :]]
    parts.append(rows)
    if room:
        parts.append(mx.zeros((*rows.shape[:2], room, rows.shape[3]), rows.dtype))
    return mx.concatenate(parts, axis=2)


def _both(
    kept: tuple[mx.array, mx.array] | None, change: Callable[[mx.array], mx.array]
) -> tuple[mx.array, mx.array]:
    assert kept is not None
    return change(kept[0]), change(kept[1])
