"""A matrix onto a form's own grid, so that what it computes changes least.

    blocks = Feedback(hessian).quantize(weight, form)

Rounding each number by itself is best for the numbers, not for their products with what the layer is
really given. With inputs x the error of a row w rounded to q is (q - w) H (q - w)' where H is the mean
of x x' over calibration text. Three steps lower it:

1. GPTQ (Frantar et al., 2022, arXiv:2210.17323): column by column, what rounding one changed is made
   up for in those to its right. The groups' scales are found when their first column's turn comes, by
   the form's own search, weighted with H's diagonal: so they fit the numbers as they have become.
2. Coordinate descent (as in QuantEase, Behdin et al., 2023, arXiv:2309.01885): every number goes once
   more to the level that is best given all others, in a few sweeps.
3. Between sweeps each group's scale (and offset) goes to what is best given the codes, as far as the
   form can hold it.

The result is a plain tensor of that form, which any program reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer_models.conversion.grids import Grid, Parts

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.quantize.forms import Form

    Floats = npt.NDArray[np.float32]
    Blocks = npt.NDArray[np.uint8]
    Codes = npt.NDArray[np.uint8]

# Columns that are updated one by one before the rest is, in one product; as many as a block has, if that
# is no more than the second.
_SPAN, _LONGEST_SPAN = 128, 256
_LEAST = 1e-30


@dataclass(frozen=True)
class FeedbackSettings:
    """shrinkage: by what share H's entries off its diagonal are lowered (as covariances are: Ledoit and
    Wolf, 2004). How columns go together on calibration text is not quite how they do on other text,
    and a matrix fitted to it whole predicts worse there, however much text it was (SmolLM2 in Q4_0, KL
    on unseen text: 0.116 without, 0.089 with 0.1, 0.084 with 0.3).
    damping: a share of H's mean diagonal that is added to it: what the text leaves open should cost
    something too. sweeps: of coordinate descent."""

    shrinkage: float = 0.3
    damping: float = 0.02
    sweeps: int = 2


def output_error(weight: Floats, numbers: Floats, second_moment: Floats) -> float:
    """Of the outputs, relative to them: ||(numbers - weight) x||² / ||weight x||²."""
    lost = numbers - weight
    wanted = float(np.einsum("ij,ij->", weight @ second_moment, weight))
    return float(np.einsum("ij,ij->", lost @ second_moment, lost)) / max(wanted, _LEAST)


class Feedback:
    """For all matrices that are given the same inputs."""

    def __init__(self, hessian: Floats, settings: FeedbackSettings | None = None) -> None:
        """hessian: the mean of x x' over inputs x: shape (in, in). Columns that calibration never used
        (zeros) count as little as can be."""
        self._settings = settings or FeedbackSettings()
        self._importance = np.ascontiguousarray(np.diag(hessian)).clip(min=0).astype(np.float32)
        mean = float(self._importance.mean())
        damped = hessian.astype(np.float64)
        damped *= 1 - self._settings.shrinkage
        damped[np.diag_indices_from(damped)] += self._settings.shrinkage * np.diag(hessian)
        damped[np.diag_indices_from(damped)] += max(self._settings.damping * mean, _LEAST)
        self._inverse_root = _inverse_root(damped).astype(np.float32)
        self._hessian = damped.astype(np.float32)

    @property
    def importance(self) -> Floats:
        """Of each column: shape (in,)."""
        return self._importance

    def quantize(self, weight: Floats, form: Form) -> Blocks:
        """weight: shape (out, in). form: one with a grid. Returns its blocks: (out, bytes of a row)."""
        grid = form.grid
        assert grid is not None  # noqa: S101 (the caller looks)
        parts = self._with_feedback(weight, grid, form)
        parts = self._descended(weight, grid, form, parts)
        return form.pack(parts)

    # -- parts -----------------------------------------------------------------------------------

    def _with_feedback(self, weight: Floats, grid: Grid, form: Form) -> Parts:
        left = weight.copy()  # what each column should be, given what was rounded before it
        root = self._inverse_root
        width = weight.shape[1]
        span = min(max(_SPAN, grid.block), _LONGEST_SPAN)
        found: list[Parts] = []
        for start in range(0, width, span):
            stop = min(start + span, width)
            lost = np.empty((len(weight), stop - start), np.float32)
            for column in range(start, stop):
                within = column % grid.block
                if within == 0:
                    end = column + grid.block
                    importance = np.maximum(self._importance[column:end], _LEAST)
                    parts = form.search(left[:, column:end], importance)
                    found.append(replace(parts, codes=parts.codes.copy()))
                    rounding = _Rounding(grid, parts)
                own = left[:, column]
                found[-1].codes[:, within], number = rounding.nearest(own, within)
                lost[:, column - start] = (own - number) / root[column, column]
                left[:, column + 1 : stop] -= np.outer(
                    lost[:, column - start], root[column, column + 1 : stop]
                )
            left[:, stop:] -= lost @ root[start:stop, stop:]
        return _joined(found)

    def _descended(self, weight: Floats, grid: Grid, form: Form, parts: Parts) -> Parts:
        numbers = parts.numbers(grid)
        lost: Floats = numbers - weight
        slope = np.matmul(lost, self._hessian, dtype=np.float32)  # half of the error's gradient
        for _ in range(self._settings.sweeps):
            parts = self._rescaled(grid, form, parts, slope)
            parts = self._recoded(grid, parts, slope)
        return parts

    def _recoded(self, grid: Grid, parts: Parts, slope: Floats) -> Parts:
        """Every number to its best level, one column after the other."""
        hessian = self._hessian
        codes = parts.codes.copy()
        rounding = _Rounding(grid, parts)
        width = codes.shape[1]
        for start in range(0, width, _SPAN):
            stop = min(start + _SPAN, width)
            moved = np.empty((len(codes), stop - start), np.float32)
            own = slope[:, start:stop].copy()
            for column in range(start, stop):
                before = rounding.number(codes[:, column], column)
                best = before - own[:, column - start] / hessian[column, column]
                codes[:, column], number = rounding.nearest(best, column)
                change = number - before
                moved[:, column - start] = change
                own[:, column - start :] += np.outer(change, hessian[column, column:stop])
            slope += moved @ hessian[start:stop]
        return replace(parts, codes=codes)

    def _rescaled(self, grid: Grid, form: Form, parts: Parts, slope: Floats) -> Parts:
        """Every group's scale, then its offset, to what is best given the codes."""
        levels = np.asarray(grid.levels, np.float32)[parts.codes]
        per_unit = grid.block // grid.group
        unit, step = parts.unit.copy(), parts.step.copy()
        offset_unit, offset_step = parts.offset_unit.copy(), parts.offset_step.copy()
        for group in range(levels.shape[1] // grid.group):
            columns = slice(group * grid.group, (group + 1) * grid.group)
            own = self._hessian[columns, columns]
            across = self._hessian[columns]
            shape = levels[:, columns]
            at = group // per_unit
            if grid.steps is None:
                moved = _move_unit(form, unit[:, at], shape, slope[:, columns], own)
            else:
                moved = _move_step(
                    unit[:, at], step[:, group], grid.steps, shape, slope[:, columns], own
                )
            slope += (moved[:, None] * shape) @ across
            if not grid.has_offset:
                continue
            ones = np.full_like(shape, -1.0)
            if grid.offset_steps is None:
                moved = _move_unit(form, offset_unit[:, at], ones, slope[:, columns], own)
            else:
                moved = _move_step(
                    offset_unit[:, at],
                    offset_step[:, group],
                    grid.offset_steps,
                    ones,
                    slope[:, columns],
                    own,
                )
            slope -= np.outer(moved, across.sum(axis=0))
        return Parts(unit, step, offset_unit, offset_step, parts.codes)


class _Rounding:
    """To a grid of known scales, a column of all rows at a time."""

    def __init__(self, grid: Grid, parts: Parts) -> None:
        self._group = grid.group
        self._levels = np.asarray(grid.levels, np.float32)
        self._is_even = bool((np.diff(self._levels) == 1).all())
        self._middles = (self._levels[1:] + self._levels[:-1]) / 2
        self._scale, self._offset = parts.scale, parts.offset
        with np.errstate(divide="ignore"):
            # A scale of zero: all levels mean the same.
            self._inverse = np.where(self._scale == 0, 0, 1 / self._scale).astype(np.float32)

    def nearest(self, values: Floats, column: int) -> tuple[Codes, Floats]:
        group = column // self._group
        wanted = (values - self._offset[:, group]) * self._inverse[:, group]
        if self._is_even:
            first = self._levels[0]
            codes = np.clip(np.rint(wanted) - first, 0, len(self._levels) - 1).astype(np.uint8)
        else:
            codes = np.searchsorted(self._middles, wanted).astype(np.uint8)
        return codes, self.number(codes, column)

    def number(self, codes: Codes, column: int) -> Floats:
        group = column // self._group
        found: Floats = self._scale[:, group] * self._levels[codes] + self._offset[:, group]
        return found


def _inverse_root(hessian: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The upper triangular U with U' U = the inverse of H, as GPTQ takes it."""
    # H reversed in both directions is L L'; so H = R R' with R upper triangular, its inverse R^-T R^-1.
    reversed_root = np.linalg.cholesky(hessian[::-1, ::-1])
    upper = np.ascontiguousarray(reversed_root[::-1, ::-1])
    found = _inverted_triangle(upper)
    return np.ascontiguousarray(found)


def _inverted_triangle(upper: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """By halves: numpy has no solver for triangles."""
    size = len(upper)
    if size <= 64:
        return np.linalg.inv(upper).astype(np.float64)
    half = size // 2
    first, last = _inverted_triangle(upper[:half, :half]), _inverted_triangle(upper[half:, half:])
    found = np.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = -first @ upper[:half, half:] @ last
    return found


def _best(shape: Floats, slope: Floats, own: Floats) -> Floats:
    """How far each row's factor of `shape` should move: shape (n,)."""
    bend = np.einsum("ij,ij->i", shape @ own, shape)
    found: Floats = -np.einsum("ij,ij->i", slope, shape) / np.maximum(bend, _LEAST)
    return np.where(bend > _LEAST, found, 0).astype(np.float32)


def _move_unit(form: Form, unit: Floats, shape: Floats, slope: Floats, own: Floats) -> Floats:
    """In place; returns by how much."""
    before = unit.copy()
    moved = form.as_stored(before + _best(shape, slope, own))
    unit[:] = np.where(np.isfinite(moved), moved, before)
    return unit - before


def _move_step(
    unit: Floats, step: Floats, steps: tuple[int, int], shape: Floats, slope: Floats, own: Floats
) -> Floats:
    """In place; returns by how much the scale has changed."""
    before = step.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.rint(before + _best(shape, slope, own) / unit)
    wanted = np.where(np.isfinite(wanted), wanted, before)
    step[:] = np.clip(wanted, *steps)
    found: Floats = unit * (step - before)
    return found


def _joined(parts: list[Parts]) -> Parts:
    """Side by side."""
    return Parts(
        np.concatenate([each.unit for each in parts], axis=1),
        np.concatenate([each.step for each in parts], axis=1),
        np.concatenate([each.offset_unit for each in parts], axis=1),
        np.concatenate([each.offset_step for each in parts], axis=1),
        np.concatenate([each.codes for each in parts], axis=1),
    )
