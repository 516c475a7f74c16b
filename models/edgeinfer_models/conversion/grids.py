"""Grids that weights are rounded to, of whatever format: levels, and scales and offsets of groups.

numbers = parts.scale * levels[codes] + parts.offset
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """block: numbers that are stored together; group: those that share a scale. levels: by code. steps,
    offset_steps: the least and the greatest whole number that a group's scale and offset are made with;
    None: they are numbers of their own (a step of 1)."""

    name: str
    block: int
    group: int
    levels: tuple[float, ...]
    has_offset: bool = False
    steps: tuple[int, int] | None = None
    offset_steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class Parts:
    """n rows of `width` numbers. unit, offset_unit: shape (n, width / block), as what they are stored in
    can be. step, offset_step: shape (n, width / group), whole numbers. codes: shape (n, width)."""

    unit: Floats
    step: Floats
    offset_unit: Floats
    offset_step: Floats
    codes: Codes

    @property
    def scale(self) -> Floats:
        """Shape (n, width / group)."""
        return _spread(self.unit, self.step)

    @property
    def offset(self) -> Floats:
        """Shape (n, width / group)."""
        return -_spread(self.offset_unit, self.offset_step)

    def numbers(self, grid: Grid) -> Floats:
        """Shape (n, width)."""
        levels = np.asarray(grid.levels, np.float32)[self.codes]
        scale, offset = (np.repeat(each, grid.group, axis=1) for each in (self.scale, self.offset))
        found: Floats = scale * levels + offset
        return found

    def rows(self, first: int, last: int) -> Parts:
        of = slice(first, last)
        return Parts(
            self.unit[of], self.step[of], self.offset_unit[of], self.offset_step[of], self.codes[of]
        )


def _spread(unit: Floats, step: Floats) -> Floats:
    found: Floats = np.repeat(unit, step.shape[1] // unit.shape[1], axis=1) * step
    return found
