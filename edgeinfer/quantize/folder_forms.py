"""What matrices become in folders: codes of 4 or 8 bits, and floats as scales, for groups of a row.

    form = FolderForm("mlx", bits=4, group=64, dtype="BF16")

MLX's numbers are code * scale + bias with codes from 0 up, compressed-tensors' code * scale with codes
around zero (the layouts: packed_rows.py). A row of blocks is its codes, its scales and its biases, as
they are stored, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeinfer_models.conversion.bit_packing import pack_codes, unpack_codes
from edgeinfer_models.conversion.floats import HELD_AS, from_float32, to_float32
from edgeinfer_models.conversion.grids import Grid, Parts

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Blocks = npt.NDArray[np.uint8]

Layout = Literal["mlx", "compressed"]
# Of the range that a group's numbers span: how much of it the levels span, as it is tried.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
_LEAST = 1e-12
_LEAST_SCALE = {"F32": 1e-30, "BF16": 1e-30, "F16": 2.0**-24}  # other programs divide by them
_AT_ONCE = 2**20  # numbers whose scales are looked for together


class FolderForm:
    def __init__(self, layout: Layout, bits: int, group: int, dtype: str) -> None:
        """bits: 4 or 8. group: numbers of a row that share a scale. dtype: of scales and biases: F32,
        F16 or BF16."""
        self.has_offset = layout == "mlx"
        first = 0 if self.has_offset else -(2 ** (bits - 1))
        levels = tuple(float(first + code) for code in range(2**bits))
        self.name = f"{layout}, {bits} bits in groups of {group}, {dtype}"
        self.grid: Grid | None = Grid(self.name, group, group, levels, self.has_offset)
        self.bits, self.group, self.dtype = bits, group, dtype
        self._first, self._last = np.float32(levels[0]), np.float32(levels[-1])

    def rounded(self, rows: Floats, importance: Floats) -> Blocks:
        step = max(_AT_ONCE // rows.shape[1], 1)
        starts = range(0, len(rows), step)
        return np.concatenate(
            [self.pack(self.search(rows[start : start + step], importance)) for start in starts]
        )

    def numbers(self, blocks: Blocks) -> Floats:
        assert self.grid is not None  # noqa: S101 (set above)
        return self.parts(blocks).numbers(self.grid)

    @np.errstate(all="ignore")  # scales that are not finite lose, and are not taken
    def search(self, rows: Floats, importance: Floats) -> Parts:
        """Several ranges for each group, each then fitted to its codes by least squares; the best."""
        groups = rows.reshape(len(rows), -1, self.group)
        weights = np.maximum(importance, _LEAST).astype(np.float32).reshape(-1, self.group)
        weights = weights / weights.mean(axis=1, keepdims=True)
        best = self._spanning(groups, _SHARES[0])
        codes = self._codes(groups, *best)
        least = self._lost(groups, weights, codes, *best)
        for share in _SHARES:
            coarse = self._codes(groups, *self._spanning(groups, share))
            found = self._fitted(groups, weights, coarse)
            own = self._codes(groups, *found)
            lost = self._lost(groups, weights, own, *found)
            wins = lost < least  # not where something is not finite
            least = np.where(wins, lost, least)
            codes = np.where(wins[:, :, None], own, codes)
            best = (np.where(wins, found[0], best[0]), np.where(wins, found[1], best[1]))
        scale, offset = best
        ones = np.ones_like(scale)
        return Parts(scale, ones, -offset, ones, codes.reshape(rows.shape))

    def as_stored(self, values: Floats) -> Floats:
        found: Floats = to_float32(from_float32(np.ascontiguousarray(values), self.dtype), self.dtype)
        if not self.has_offset:  # a scale: other programs want those above 0
            found = np.maximum(found, np.float32(_LEAST_SCALE[self.dtype]))
        return found

    def pack(self, parts: Parts) -> Blocks:
        columns = [pack_codes(parts.codes, self.bits), self._bytes(parts.unit)]
        if self.has_offset:
            columns.append(self._bytes(parts.offset))
        return np.concatenate(columns, axis=1)

    def parts(self, blocks: Blocks) -> Parts:
        """The inverse of `pack`. `offset` is MLX's bias."""
        item = np.dtype(HELD_AS[self.dtype]).itemsize
        floats = (1 + self.has_offset) * item
        groups = blocks.shape[1] // (self.group * self.bits // 8 + floats)
        first, second = groups * self.group * self.bits // 8, groups * item
        codes = unpack_codes(blocks[:, :first], self.bits)
        scale = self._floats(blocks[:, first : first + second])
        offset = self._floats(blocks[:, first + second :]) if self.has_offset else np.zeros_like(scale)
        ones = np.ones_like(scale)
        return Parts(scale, ones, -offset, ones, codes)

    # -- groups: (n, groups, group); weights: (groups, group); scale, offset: (n, groups) -----------

    def _spanning(self, groups: Floats, share: float) -> tuple[Floats, Floats]:
        """Levels over that share of what each group spans."""
        levels = self._last - self._first
        if self.has_offset:
            low, high = groups.min(axis=2), groups.max(axis=2)
            inset = (high - low) * np.float32((1 - share) / 2)
            scale = (high - low - 2 * inset) / levels
            return self.as_stored(scale), self.as_stored(low + inset)
        # The lowest level has none across from it: half a step more shares the loss.
        scale = np.abs(groups).max(axis=2) * np.float32(2 * share) / levels
        return self.as_stored(scale), np.zeros_like(scale)

    def _fitted(self, groups: Floats, weights: Floats, codes: Blocks) -> tuple[Floats, Floats]:
        """By least squares, given the codes."""
        levels = codes.astype(np.float32) + self._first
        products = np.einsum("ngi,gi->ng", levels * groups, weights)
        squares = np.einsum("ngi,gi->ng", levels * levels, weights)
        if not self.has_offset:
            return self.as_stored(products / squares), np.zeros_like(products)
        total = np.float32(self.group)  # the weights' mean is 1
        of_levels = np.einsum("ngi,gi->ng", levels, weights)
        of_groups = np.einsum("ngi,gi->ng", groups, weights)
        spread = total * squares - of_levels * of_levels
        scale = self.as_stored((total * products - of_levels * of_groups) / spread)
        return scale, self.as_stored((of_groups - scale * of_levels) / total)

    def _codes(self, groups: Floats, scale: Floats, offset: Floats) -> Blocks:
        inverse = np.where(scale == 0, 0, 1 / scale).astype(np.float32)
        found = np.subtract(groups, offset[:, :, None])
        found *= inverse[:, :, None]
        np.rint(found, out=found)
        found -= self._first
        codes: Blocks = np.clip(found, 0, self._last - self._first).astype(np.uint8)
        return codes

    def _lost(
        self, groups: Floats, weights: Floats, codes: Blocks, scale: Floats, offset: Floats
    ) -> Floats:
        off = codes.astype(np.float32)
        off += self._first
        off *= scale[:, :, None]
        off += offset[:, :, None]
        off -= groups
        off *= off
        found: Floats = np.einsum("ngi,gi->ng", off, weights)
        return found

    def _bytes(self, values: Floats) -> Blocks:
        stored: Any = np.ascontiguousarray(from_float32(np.ascontiguousarray(values), self.dtype))
        found: Blocks = stored.view(np.uint8)
        return found

    def _floats(self, stored: Blocks) -> Floats:
        return to_float32(np.ascontiguousarray(stored).view(HELD_AS[self.dtype]), self.dtype)
