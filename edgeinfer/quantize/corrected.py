"""A model's matrices onto their forms' grids, layer by layer, with calibration text running through
them.

Each layer is given what the layers before it, as they now are, make of the text; so what they got
wrong is among what the next ones are fitted to. Two methods, which go together:

- gptq: error feedback and coordinate descent onto the form's own grid (error_feedback.py);
- awq: columns that matter are made larger before they are rounded (scaling.py).

ggml's types without an even grid (IQ1 to IQ3) are rounded by its search, weighted with the inputs'
squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.quantize.error_feedback import Feedback, FeedbackSettings, output_error
from edgeinfer.quantize.layer_walk import Inputs, LayerWalk
from edgeinfer.quantize.scaling import Link, best_scales, links_of
from edgeinfer_models.conversion.floats import to_float32
from edgeinfer_models.families.changes import from_gguf, to_gguf
from edgeinfer_models.families.tensors import TensorRule, decoder_name

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.backend import Layers
    from edgeinfer.quantize.finished_tensors import FinishedTensors
    from edgeinfer.quantize.forms import Form
    from edgeinfer_models.conversion.model import SourceModel

    Floats = npt.NDArray[np.float32]
    Blocks = npt.NDArray[np.uint8]

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Correction:
    """scales: awq. feeds_back: gptq; without, rows are rounded with weights."""

    scales: bool = False
    feeds_back: bool = True
    feedback: FeedbackSettings = field(default_factory=FeedbackSettings)


def correct(
    source: SourceModel,
    types: Mapping[str, str | None],
    layers: Layers,
    texts: Sequence[Sequence[int]],
    forms: Mapping[str, Form],
    finished: FinishedTensors,
    correction: Correction | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """types: of each tensor, by its GGUF name; None: it stays. forms: by types. What is done is put
    into `finished` by those names: blocks of matrices, and F32 numbers of norms and biases that awq
    changed. Layers that are there whole are taken from it. Raises OSError, ModelFileInvalid."""
    how = correction or Correction()
    walk = LayerWalk(layers, texts)
    for layer in range(layers.num_layers):
        work = _Layer(source, types, layers, layer, forms, finished)
        if not work.is_finished:
            inputs = walk.observe(layer, work.names, _part(progress, layer, layers.num_layers, 0, 0.5))
            work.correct(inputs, how, _part(progress, layer, layers.num_layers, 0.5, 0.4))
        work.put_back()
        walk.go_on(layer)
        progress((layer + 1) / layers.num_layers)


def _part(progress: Progress, layer: int, count: int, start: float, share: float) -> Progress:
    return lambda done: progress((layer + start + share * done) / count)


@dataclass(frozen=True)
class Place:
    """Of a matrix that is to be rounded. index: in a stack of experts."""

    rule: TensorRule
    type_name: str
    index: int

    @property
    def hf(self) -> str:
        return self.rule.hf[self.index]


def decoder_places(source: SourceModel, types: Mapping[str, str | None], layer: int) -> dict[str, Place]:
    """Those of a layer, by their names in it, as `Layers` has them. types: by GGUF names; None: none."""
    found: dict[str, Place] = {}
    for rule in source.family.rules(source.shape):
        kind = types.get(rule.gguf) if rule.layer == layer and len(rule.shape) == 2 else None
        if kind is not None:
            for index, hf in enumerate(rule.hf):
                found[name_in_layer(hf, layer)] = Place(rule, kind, index)
    return found


def name_in_layer(hf: str, layer: int) -> str:
    return decoder_name(hf).removeprefix(f"layers.{layer}.").removesuffix(".weight")


class _Layer:
    """names: of its matrices that are rounded, within the layer, as `Layers` has them."""

    def __init__(
        self,
        source: SourceModel,
        types: Mapping[str, str | None],
        layers: Layers,
        layer: int,
        forms: Mapping[str, Form],
        finished: FinishedTensors,
    ) -> None:
        self._source, self._layers, self._layer = source, layers, layer
        self._finished = finished
        self._rules = [rule for rule in source.family.rules(source.shape) if rule.layer == layer]
        self._places = decoder_places(source, types, layer)
        self._forms = {name: forms[place.type_name] for name, place in self._places.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    @property
    def is_finished(self) -> bool:
        return all(place.rule.gguf in self._finished for place in self._places.values())

    def correct(self, inputs: Sequence[Inputs], how: Correction, progress: Progress) -> None:
        weights = {name: self._numbers(place.hf, place.rule) for name, place in self._places.items()}
        scales = _Scales(weights)
        if how.scales:
            self._scale(inputs, weights, scales)
        blocks: dict[str, Blocks] = {}
        errors: dict[str, float] = {}
        for group in inputs:
            columns = scales.columns[group.matrices[0]]
            moment = group.second_moment / np.outer(columns, columns)
            feedback = Feedback(moment, how.feedback)
            for name in group.matrices:
                scaled = scales.applied(name, weights[name])
                found = _rounded(scaled, self._forms[name], feedback, how)
                numbers = self._forms[name].numbers(found)
                errors[name] = output_error(scaled, numbers, moment)
                blocks[name] = found
                progress(len(blocks) / len(self._places))
        self._keep(blocks, errors, scales)

    def put_back(self) -> None:
        """What was rounded, into the layer. Of what awq scaled: what comes to the same there, since the
        layer's norms stay as they are."""
        for name, place in self._places.items():
            rule = place.rule
            stacked = self._finished.blocks(rule.gguf).reshape(len(rule.hf), rule.shape[0], -1)
            stored = stacked[place.index]
            numbers = self._forms[name].numbers(from_gguf(stored, rule.change, rule.heads))
            for axis, kind in ((0, "rows"), (1, "columns")):
                key = _scale_key(self._layer, name, kind)
                if key in self._finished:
                    scale = self._finished.blocks(key)[0].view(np.float32)
                    numbers = numbers / (scale[:, None] if axis == 0 else scale)
            self._layers.replace(self._layer, name, numbers)

    # -- parts -----------------------------------------------------------------------------------

    def _scale(self, inputs: Sequence[Inputs], weights: Mapping[str, Floats], scales: _Scales) -> None:
        moments = {name: group.second_moment for group in inputs for name in group.matrices}
        for link in links_of(self._source.shape)[0]:
            forms = [self._forms.get(name) for name in link.fed]
            if any(form is None or form.grid is None for form in forms):
                continue  # what is not rounded gains nothing
            if not link.is_norm and link.feeder not in weights:
                continue
            found = best_scales(link, weights, moments[link.fed[0]], self._forms)
            if (found == 1).all():
                continue
            for name in link.fed:
                scales.columns[name] = found
            self._divide(link, found, scales)

    def _divide(self, link: Link, found: Floats, scales: _Scales) -> None:
        """What feeds them takes the factors: a norm's weight, or rows of a matrix and of its bias."""
        if link.is_norm:
            rule = self._rule(f"{link.feeder}.weight")
            assert rule is not None  # noqa: S101 (`links_of` goes by the same shape)
            scales.vectors[rule.gguf] = self._vector(rule) / found
            return
        factors = np.ones(self._places[link.feeder].rule.shape[0], np.float32)
        factors[link.rows] = 1 / found
        scales.rows[link.feeder] = factors
        bias = self._rule(f"{link.feeder}.bias")
        if bias is not None:
            scales.vectors[bias.gguf] = self._vector(bias) * to_gguf(factors, bias.change, bias.heads)

    def _keep(self, blocks: Mapping[str, Blocks], errors: Mapping[str, float], scales: _Scales) -> None:
        """Matrices last: a layer is finished once they are all there."""
        for name, vector in scales.vectors.items():
            self._finished.keep(name, _as_bytes(vector), 0.0)
        for kind, found in (("rows", scales.rows), ("columns", scales.columns)):
            for name, scale in found.items():
                if (scale != 1).any():
                    self._finished.keep(_scale_key(self._layer, name, kind), _as_bytes(scale), 0.0)
        for rule in self._rules:
            own = [name for name, place in self._places.items() if place.rule.gguf == rule.gguf]
            if own:
                stacked = [to_gguf(blocks[name], rule.change, rule.heads) for name in own]
                mean = float(np.mean([errors[name] for name in own]))
                self._finished.keep(rule.gguf, np.concatenate(stacked), mean)

    def _numbers(self, hf: str, rule: TensorRule) -> Floats:
        source = self._source.source
        return to_float32(source.rows(hf, 0, rule.shape[0]), source.info(hf).dtype)

    def _vector(self, rule: TensorRule) -> Floats:
        """As GGUF has it."""
        found: Floats = to_gguf(self._numbers(rule.hf[0], rule), rule.change, rule.heads)
        return found

    def _rule(self, name: str) -> TensorRule | None:
        wanted = f"layers.{self._layer}.{name}"
        return next((rule for rule in self._rules if decoder_name(rule.hf[0]) == wanted), None)


class _Scales:
    """Factors that matrices are multiplied with before they are rounded, and vectors that changed, by
    GGUF's names."""

    def __init__(self, weights: Mapping[str, Floats]) -> None:
        self.rows = {name: np.ones(weight.shape[0], np.float32) for name, weight in weights.items()}
        self.columns = {name: np.ones(weight.shape[1], np.float32) for name, weight in weights.items()}
        self.vectors: dict[str, Floats] = {}

    def applied(self, name: str, weight: Floats) -> Floats:
        found: Floats = weight * self.rows[name][:, None] * self.columns[name]
        return found


def _rounded(weight: Floats, form: Form, feedback: Feedback, how: Correction) -> Blocks:
    if how.feeds_back and form.grid is not None:
        return feedback.quantize(weight, form)
    return form.rounded(weight, feedback.importance)


def _scale_key(layer: int, name: str, kind: str) -> str:
    return f"{kind} of layer {layer}, {name}"


def _as_bytes(values: Floats) -> Blocks:
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint8).reshape(1, -1)
