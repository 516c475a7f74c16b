"""What the full-precision model says, kept for every token of a text: its likeliest next tokens and what
is left for all others. A token takes half a kilobyte, where whole predictions take a hundred."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.quantize.layer_walk import LayerWalk

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.backend import Layers

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]

LIKELIEST = 64
_LEAST = 1e-9
Progress = Callable[[float], None]


class Teacher:
    """In a file without a name, for as long as this lives."""

    def __init__(
        self,
        layers: Layers,
        texts: Sequence[Sequence[int]],
        folder: Path,
        progress: Progress = lambda _: None,
    ) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (`close` closes it)
        walk = LayerWalk(layers, texts)
        for layer in range(layers.num_layers):
            walk.go_on(layer)
            progress((layer + 1) / layers.num_layers)
        ids, shares = [], []
        for text in range(len(texts)):
            likely = softmax(layers.head(walk.states[text : text + 1])[0])
            count = min(LIKELIEST, likely.shape[-1] - 1)
            best = np.argpartition(likely, -count, axis=-1)[:, -count:]
            ids.append(best.astype(np.int32))
            shares.append(np.take_along_axis(likely, best, axis=-1).astype(np.float32))
        self._file.write(np.stack(ids).tobytes())
        self._file.write(np.stack(shares).tobytes())
        self._file.flush()
        shape = (len(texts), *ids[0].shape)
        self._ids = np.memmap(self._file, np.int32, "r", shape=shape)
        self._shares = np.memmap(
            self._file, np.float32, "r", offset=4 * int(np.prod(shape)), shape=shape
        )

    def slope(self, text: int, logits: Floats) -> tuple[float, Floats]:
        """logits: the student's: (n, vocabulary). Returns the mean divergence of what the teacher says
        from it (what is left over as one event), and its gradient with respect to the logits."""
        ids, wanted = np.asarray(self._ids[text], np.int64), np.asarray(self._shares[text])
        likely = softmax(logits)
        found = np.take_along_axis(likely, ids, axis=-1)
        rest_wanted = np.maximum(1 - wanted.sum(axis=-1, keepdims=True), _LEAST)
        rest = np.maximum(1 - found.sum(axis=-1, keepdims=True), _LEAST)
        lost = (wanted * np.log(np.maximum(wanted, _LEAST) / np.maximum(found, _LEAST))).sum(axis=-1)
        lost += (rest_wanted * np.log(rest_wanted / rest))[:, 0]
        # Of a token among the likeliest: q - p; of one of the others: q less its part of what was left.
        slope = likely * (1 - rest_wanted / rest)
        np.put_along_axis(slope, ids, found - wanted, axis=-1)
        return float(lost.mean()), (slope / len(logits)).astype(np.float32)

    def close(self) -> None:
        self._file.close()


def softmax(logits: Floats) -> Floats:
    shifted: Floats = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted
