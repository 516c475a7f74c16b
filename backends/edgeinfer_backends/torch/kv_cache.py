"""One sequence's keys and values, as floats or as 8-bit numbers with a scale for each token and head.

A step writes behind the positions that count, and `commit` makes them count when all of it has been
computed; so a step that fails or is interrupted has changed nothing. What attention reads within the
step is what it will read later: rounded to the cache's type.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeinfer_backends.torch.kv_types import is_plain, item_type, largest
from edgeinfer_models.families.shape import DecoderShape

GROWTH = 256  # positions by which buffers grow
_SPARE = 2 * GROWTH  # unused positions above which a rewind gives memory back

# turn(layer, keys, by): keys of shape (kv_heads, n, head_dim) as they are `by` positions earlier, by of
# shape (n,) or (kv_heads, n).
Turn = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Rows:
    """numbers: (kv_heads, n, head_dim); scales: (kv_heads, n, 1) float32, or None for plain floats."""

    numbers: Tensor
    scales: Tensor | None = None

    def part(self, start: int, stop: int) -> Rows:
        scales = None if self.scales is None else self.scales[:, start:stop]
        return Rows(self.numbers[:, start:stop], scales)

    def chosen(self, places: Tensor) -> Rows:
        """places: (kv_heads, n), for each head its own."""
        wide = places.unsqueeze(-1)
        stored = self.numbers.dtype
        plain = self.numbers.view(torch.int8) if stored.itemsize == 1 else self.numbers  # no fp8 there
        numbers = plain.gather(1, wide.expand(-1, -1, plain.shape[-1])).view(stored)
        return Rows(numbers, None if self.scales is None else self.scales.gather(1, wide))

    def put(self, at: int, new: Rows) -> None:
        count = len(new)
        self.numbers[:, at : at + count] = new.numbers
        if self.scales is not None and new.scales is not None:
            self.scales[:, at : at + count] = new.scales

    def tensors(self) -> Iterator[Tensor]:
        yield self.numbers
        if self.scales is not None:
            yield self.scales

    def __len__(self) -> int:
        return int(self.numbers.shape[1])


def rounded(values: Tensor, kind: str) -> Rows:
    """values: (kv_heads, n, head_dim). With 8 bits the largest number of a token's head becomes the
    largest there is: no token can spoil another's resolution."""
    if is_plain(kind):
        return Rows(values.to(item_type(kind)))
    wide = values.float()
    scales = wide.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / largest(kind)
    scaled = wide / scales
    numbers = scaled.round() if kind == "int8" else scaled
    return Rows(numbers.to(item_type(kind)), scales)


def read(rows: Rows, dtype: torch.dtype) -> Tensor:
    if rows.scales is None:
        return rows.numbers.to(dtype)
    return (rows.numbers.float() * rows.scales).to(dtype)


class SequenceCache:
    """kinds: of keys and of values, names of kv_types.py. weighs: count how much attention every
    position got from all rows after it, for `keep_heaviest`."""

    def __init__(
        self, shape: DecoderShape, kinds: tuple[str, str], device: torch.device, *, weighs: bool
    ) -> None:
        self.length = 0
        self.capacity = 0
        self.weighs = weighs
        self._shape = shape
        self._kinds = kinds
        self._device = device
        self.layers = self._empty(0)  # (keys, values) each; the first `length` positions count
        # (layers, kv_heads, capacity): the sum of attention weights; and what the step adds.
        self._weight: Tensor | None = None
        self._added: list[tuple[int, Tensor]] = []

    # -- a step ----------------------------------------------------------------------------------

    def begin(self, count: int) -> None:
        """Make room for `count` positions more."""
        self._added.clear()
        if self.length + count > self.capacity:
            self._resize(self.length + count)

    def append(self, layer: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """k, v: (n, kv_heads, head_dim) of the step's rows. Returns keys and values of all positions up
        to theirs: (kv_heads, length + n, head_dim), of `dtype`."""
        found = []
        stop = self.length + k.shape[0]
        for buffer, values, kind in zip(self.layers[layer], (k, v), self._kinds, strict=True):
            buffer.put(self.length, rounded(values.transpose(0, 1), kind))
            found.append(read(buffer.part(0, stop), dtype))
        return found[0], found[1]

    def add_weights(self, layer: int, weights: Tensor) -> None:
        """weights: (kv_heads, heads of each, n, length + n), as attention used them."""
        self._added.append((layer, weights.sum(dim=(1, 2))))

    def commit(self, count: int) -> None:
        for layer, added in self._added:
            assert self._weight is not None
            self._weight[layer, :, : added.shape[-1]] += added
        self._added.clear()
        self.length += count

    # -- positions -------------------------------------------------------------------------------

    def rows(self, layer: int, start: int, stop: int) -> tuple[Rows, Rows]:
        k, v = self.layers[layer]
        return k.part(start, stop), v.part(start, stop)

    def weight(self, start: int, stop: int) -> Tensor | None:
        """(layers, kv_heads, stop - start), or None where it is not counted."""
        return None if self._weight is None else self._weight[:, :, start:stop]

    def extend(self, layers: list[tuple[Rows, Rows]], weight: Tensor | None) -> None:
        """Append rows as another cache of the same kind had them."""
        count = len(layers[0][0])
        self.begin(count)
        for buffers, pair in zip(self.layers, layers, strict=True):
            for buffer, new in zip(buffers, pair, strict=True):
                buffer.put(self.length, new)
        if self._weight is not None and weight is not None:
            self._weight[:, :, self.length : self.length + count] = weight
        self.length += count

    def fork(self, length: int) -> SequenceCache:
        new = SequenceCache(self._shape, self._kinds, self._device, weighs=self.weighs)
        if length:
            rows = [self.rows(layer, 0, length) for layer in range(self._shape.num_layers)]
            new.extend(rows, self.weight(0, length))
        return new

    def rewind(self, length: int) -> None:
        self.length = length
        if self._weight is not None:
            self._weight[:, :, length:] = 0.0
        if self.capacity - length > _SPARE:
            with contextlib.suppress(RuntimeError):  # no memory to give memory back with
                self._resize(length)

    def evict(self, start: int, stop: int, turn: Turn) -> None:
        """Drop [start, stop) and move what is behind down. A quantized key is rounded again."""
        heads = self._shape.num_kv_heads
        kept = torch.arange(self.length - (stop - start), device=self._device)
        kept = torch.where(kept < start, kept, kept + (stop - start))
        self._keep(start, [kept.expand(heads, -1)] * self._shape.num_layers, turn)

    def keep_heaviest(self, start: int, stop: int, keep: int, turn: Turn) -> bytes:
        """Of [start, stop) keep, in every layer and head, the `keep` positions that got the most
        attention, in their order; what is behind moves down. Returns a digest of what was kept where.

        Source: H2O (Zhang et al. 2023, arXiv:2306.14048); positions are those in the cache, as there.
        """
        assert self._weight is not None
        before = torch.arange(start, device=self._device)
        behind = torch.arange(stop, self.length, device=self._device)
        places = []
        for weight in self._weight[:, :, start:stop]:
            heaviest = weight.topk(keep, dim=-1).indices.sort(dim=-1).values + start
            heads = heaviest.shape[0]
            places.append(torch.cat((before.expand(heads, -1), heaviest, behind.expand(heads, -1)), -1))
        self._keep(start, places, turn)
        return hashlib.blake2b(torch.stack(places).cpu().numpy().tobytes(), digest_size=16).digest()

    def _keep(self, start: int, places: list[Tensor], turn: Turn) -> None:
        """places: (kv_heads, n) for each layer, ascending; the first `start` are where they were. All is
        worked out before anything is changed."""
        count = int(places[0].shape[-1])
        capacity = -(-count // GROWTH) * GROWTH
        layers, weight = self._empty(capacity), self._no_weight(capacity)
        for layer, (new, own) in enumerate(zip(layers, places, strict=True)):
            k, v = self.layers[layer]
            new[0].put(0, k.chosen(own))
            new[1].put(0, v.chosen(own))
            if count > start:
                moved = own[:, start:]
                by = moved - torch.arange(start, count, device=self._device)
                turned = turn(layer, read(k.chosen(moved), torch.float32), by)
                new[0].put(start, rounded(turned, self._kinds[0]))
            if weight is not None and self._weight is not None:
                weight[layer, :, :count] = self._weight[layer].gather(1, own)
        self.layers, self._weight = layers, weight
        self.length, self.capacity = count, capacity

    # -- memory ----------------------------------------------------------------------------------

    def reserve(self, length: int) -> None:
        if length > self.capacity:
            self._resize(length)

    def move_into(self, layers: list[tuple[Rows, Rows]], capacity: int) -> None:
        """Use these buffers, of the same kinds, from now on."""
        for new, old in zip(layers, self.layers, strict=True):
            for buffer, rows in zip(new, old, strict=True):
                buffer.put(0, rows.part(0, self.length))
                # What is masked is multiplied by 0, and 0 times what another left there must be 0.
                buffer.numbers[:, self.length :] = 0
        self.layers, self.capacity = layers, capacity

    def move_out(self) -> None:
        """Into buffers of its own."""
        self._resize(self.length)

    def _resize(self, length: int) -> None:
        capacity = -(-length // GROWTH) * GROWTH
        kept = min(self.length, length)
        layers, weight = self._empty(capacity), self._no_weight(capacity)
        for new, old in zip(layers, self.layers, strict=True):
            for buffer, rows in zip(new, old, strict=True):
                buffer.put(0, rows.part(0, kept))
        if weight is not None and self._weight is not None:
            weight[:, :, :kept] = self._weight[:, :, :kept]
        self.layers, self._weight, self.capacity = layers, weight, capacity

    def _empty(self, capacity: int) -> list[tuple[Rows, Rows]]:
        shape = self._shape

        def buffer(kind: str) -> Rows:
            size = (shape.num_kv_heads, capacity)
            numbers = torch.zeros((*size, shape.head_dim), dtype=item_type(kind), device=self._device)
            return Rows(
                numbers, None if is_plain(kind) else torch.zeros((*size, 1), device=self._device)
            )

        k, v = self._kinds
        return [(buffer(k), buffer(v)) for _ in range(shape.num_layers)]

    def _no_weight(self, capacity: int) -> Tensor | None:
        if not self.weighs:
            return None
        shape = self._shape
        return torch.zeros((shape.num_layers, shape.num_kv_heads, capacity), device=self._device)

    def check_integrity(self) -> None:
        assert self.length <= self.capacity
        for k, v in self.layers:
            assert len(k) == len(v) >= self.capacity
        assert self.weighs == (self._weight is not None) or self.capacity == 0
