"""Calibration text through a model, layer by layer: what each matrix is given, in numbers that are kept.

    walk = LayerWalk(layers, texts)
    for layer in range(layers.num_layers):
        groups = walk.observe(layer)     # matrices that are given the same, and the mean of x x'
        ...layers.replace(layer, name, weight)...
        walk.go_on(layer)                # on through the layer as it now is

Errors of earlier layers are in what later ones are given, as they will be when the model is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.backend import Layers

    Floats = npt.NDArray[np.float32]

ROWS = 4096  # of states that a layer takes at a time
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Inputs:
    """What some matrices are given. second_moment: the mean of x x', shape (in, in). rows: inputs it was
    taken over (of an expert: those that were routed to it; 0: zeros)."""

    matrices: tuple[str, ...]
    second_moment: Floats
    rows: int


class LayerWalk:
    def __init__(self, layers: Layers, texts: Sequence[Sequence[int]]) -> None:
        """texts: of equal length."""
        self._layers = layers
        self._at_once = max(ROWS // len(texts[0]), 1)
        self.states: Floats = np.concatenate([layers.embed(part) for part in self._parts(texts)])

    def observe(
        self, layer: int, names: Sequence[str] | None = None, progress: Progress = lambda _: None
    ) -> list[Inputs]:
        """Of the matrices so named, or of all, in the order in which they are used."""
        wanted = tuple(names or self._layers.matrices(layer))
        sums: dict[tuple[str, ...], npt.NDArray[np.float64]] = {}
        rows: dict[tuple[str, ...], int] = {}
        widths: dict[str, int] = {}
        for start, part in self._state_parts():
            _, captured = self._layers.capture(layer, part)
            widths.update((name, captured[name].shape[1]) for name in wanted)
            for group, given in _groups(wanted, captured):
                own = (given.T @ given).astype(np.float64)
                sums[group] = sums[group] + own if group in sums else own
                rows[group] = rows.get(group, 0) + len(given)
            progress((start + len(part)) / len(self.states))
        found = [
            Inputs(group, (total / rows[group]).astype(np.float32), rows[group])
            for group, total in sums.items()
        ]
        seen = {name for group in sums for name in group}
        return found + [
            Inputs((name,), np.zeros((widths[name], widths[name]), np.float32), 0)
            for name in wanted
            if name not in seen
        ]

    def go_on(self, layer: int) -> None:
        for start, part in self._state_parts():
            self.states[start : start + len(part)] = self._layers.run(layer, part)

    def _state_parts(self) -> Iterator[tuple[int, Floats]]:
        for start in range(0, len(self.states), self._at_once):
            yield start, self.states[start : start + self._at_once]

    def _parts(self, texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        for start in range(0, len(texts), self._at_once):
            yield texts[start : start + self._at_once]


def _groups(
    names: Sequence[str], captured: Mapping[str, Floats]
) -> Iterator[tuple[tuple[str, ...], Floats]]:
    """Matrices that share an array were given the same. Experts that no row came to are left out."""
    by_array: dict[int, list[str]] = {}
    for name in names:
        if len(captured[name]):
            by_array.setdefault(id(captured[name]), []).append(name)
    for group in by_array.values():
        yield tuple(group), captured[group[0]]
