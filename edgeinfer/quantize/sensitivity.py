"""What each tensor costs in each type: how much the model's predictions would move.

To second order a change d of the weights moves the predictions by d' F d / 2 nats a token, F being the
Fisher information: the mean of g g' over the gradients g of what the model itself says (labels are drawn
from it). So it takes one way forward and one back through the model, not one for each tensor and type.
Rounding errors of different rows are independent, so each row's (g' d)² is summed by itself; some rows
of a matrix stand for all.

Source: the Fisher information as the second derivative of the KL divergence (Kullback, 1959); used for
choosing widths by HAWQ (Dong et al., 2019, arXiv:1905.03696) in the place of this one's estimate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.quantize.calibrated import Calibrated
from edgeinfer.quantize.corrected import Place, decoder_places
from edgeinfer.quantize.forms import numbers_of
from edgeinfer.quantize.layer_walk import LayerWalk
from edgeinfer_models.conversion.floats import to_float32

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.backend import Layers, RowQuantizer

    Floats = npt.NDArray[np.float32]

TEXTS = 16
_ROWS = 256  # of a matrix
_SEED = 11
Progress = Callable[[float], None]


def sensitivities(
    of: Calibrated,
    candidates: Mapping[str, Sequence[str]],
    rows: RowQuantizer,
    folder: Path,
    progress: Progress = lambda _: None,
) -> dict[str, dict[str, float]]:
    """candidates: types to be tried, by the GGUF names of layers' matrices. folder: for the states
    between the layers, while this runs. Returns nats a token for each."""
    layers = of.model.layers
    tried: dict[str, str | None] = {name: kinds[0] for name, kinds in candidates.items() if kinds}
    texts = of.calibration.texts[:: max(len(of.calibration.texts) // TEXTS, 1)][:TEXTS]
    walk = LayerWalk(layers, texts)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        shape = (layers.num_layers, *walk.states.shape)
        states = np.memmap(file, np.float32, "w+", shape=shape)
        squares: list[dict[str, Floats]] = []
        for layer in range(layers.num_layers):
            states[layer] = walk.states
            own = walk.squares(layer)
            squares.append(
                {
                    name: (total / max(count, 1)).astype(np.float32)
                    for name, (total, count) in own.items()
                }
            )
            progress(0.3 * (layer + 1) / layers.num_layers)
        slopes = _slopes_of_own_words(layers, walk.states)
        for done, layer in enumerate(reversed(range(layers.num_layers)), 1):
            matrices = decoder_places(of.source, tried, layer)
            weights = {name: _some_rows(_numbers(of, place)) for name, place in matrices.items()}
            gradients: dict[str, list[Floats]] = {name: [] for name in matrices}
            for text in range(len(texts)):
                part = slice(text, text + 1)
                slopes[part], of_weights = layers.differentiate(layer, states[layer, part], slopes[part])
                for name in matrices:
                    gradients[name].append(_some_rows(of_weights[name]).copy())
            for name, place in matrices.items():
                rule = place.rule
                slope = np.stack(gradients[name])
                share = rule.shape[0] / weights[name].shape[0]
                for type_name in candidates[rule.gguf]:
                    blocks = rows.quantize(type_name, weights[name], squares[layer][name])
                    off = numbers_of(type_name, blocks) - weights[name]
                    moved = np.einsum("bij,ij->bi", slope, off)
                    lost = share * float(np.square(moved).sum()) / (2 * len(texts) * len(texts[0]))
                    own_losses = found.setdefault(rule.gguf, {})
                    own_losses[type_name] = own_losses.get(type_name, 0.0) + lost
            progress(0.3 + 0.7 * done / layers.num_layers)
        del states
    return found


def _slopes_of_own_words(layers: Layers, states: Floats) -> Floats:
    """Of the negative log-likelihood of tokens that the model draws itself, with respect to the states
    after the last layer."""
    random = np.random.default_rng(_SEED)
    found = np.empty_like(states)
    for text in range(len(states)):
        part = slice(text, text + 1)
        logits = layers.head(states[part])
        logits -= logits.max(axis=-1, keepdims=True)
        likely = np.exp(logits)
        likely /= likely.sum(axis=-1, keepdims=True)
        drawn = random.random((*likely.shape[:-1], 1), np.float32)
        # The last ones may add up to a little less than one.
        words = (likely.cumsum(axis=-1) < drawn).sum(axis=-1).clip(max=likely.shape[-1] - 1)
        np.put_along_axis(
            likely,
            words[..., None],
            np.take_along_axis(likely, words[..., None], axis=-1) - 1,
            axis=-1,
        )
        found[part] = layers.differentiate_head(states[part], likely)
    return found


def _numbers(of: Calibrated, place: Place) -> Floats:
    source = of.source.source
    stored = source.rows(place.hf, 0, place.rule.shape[0])
    return to_float32(stored, source.info(place.hf).dtype)


def _some_rows(weight: Floats) -> Floats:
    step = max(len(weight) // _ROWS, 1)
    return np.ascontiguousarray(weight[::step])
