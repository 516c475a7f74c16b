"""A quantized model taught by the one it was made of ("qat"), for as many minutes as are given.

It starts from what gptq found. What each group of numbers is multiplied with (and, where the type has
it, added to) learns, by gradients of the divergence from the full model's predictions through all
layers; the codes stay. So the result is the same type, and nothing has to be rounded in a way that has
no slope but those factors themselves, to F16 (straight through: Bengio et al., 2013, arXiv:1308.3432).
Training factors end to end after the codes are settled: EfficientQAT (Chen et al., 2024,
arXiv:2407.11062), second part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer.quantize.corrected import Place, decoder_places
from edgeinfer.quantize.teacher import Teacher
from edgeinfer_models.conversion.ggml_grids import GRIDS, Parts, pack, to_f16, unpack
from edgeinfer_models.families.changes import from_gguf, to_gguf

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.backend import Layers
    from edgeinfer.quantize.finished_tensors import FinishedTensors
    from edgeinfer_models.conversion.model import SourceModel

    Array = npt.NDArray[Any]
    Floats = npt.NDArray[np.float32]

_KEPT_EVERY_S = 60.0
Progress = Callable[[float], None]


@dataclass(frozen=True)
class DistillationSettings:
    """rate: by how much a factor may change in a step, relative to itself. batch: texts of a step."""

    minutes: float
    rate: float = 1e-3
    batch: int = 4
    warm_up: float = 0.05
    seed: int = 5


class _Learner:
    """The factors of one matrix: Adam (Kingma and Ba, 2014, arXiv:1412.6980) on their relative
    change."""

    _FIRST, _SECOND, _LEAST = 0.9, 0.99, 1e-12

    def __init__(self, type_name: str, parts: Parts) -> None:
        self.grid = GRIDS[type_name]
        self.parts = parts
        self._units = [parts.unit.copy()]
        if self.grid.has_offset:
            self._units.append(parts.offset_unit.copy())
        self._change = [np.zeros_like(unit) for unit in self._units]
        self._mean = [np.zeros_like(unit) for unit in self._units]
        self._square = [np.zeros_like(unit) for unit in self._units]
        self._steps = 0

    def numbers(self) -> Floats:
        return self.parts.numbers(self.grid)

    def state(self) -> dict[str, Array]:
        """All that `take_up` needs; the units that it began with too, since those of `parts` move."""
        found: dict[str, Array] = {"steps": np.array(self._steps)}
        for kind, arrays in self._arrays().items():
            found |= {f"{kind} {which}": array for which, array in enumerate(arrays)}
        return found

    def take_up(self, state: Mapping[str, Array]) -> bool:
        """Whether it was one of this matrix; if not, nothing has changed."""
        own = self.state()
        if state.keys() != own.keys() or any(state[key].shape != own[key].shape for key in own):
            return False
        if not all(np.isfinite(array).all() for array in state.values()):
            return False
        self._steps = int(state["steps"])
        for kind, arrays in self._arrays().items():
            for which, array in enumerate(arrays):
                array[:] = state[f"{kind} {which}"]
        self._move()
        return True

    def _arrays(self) -> dict[str, list[Floats]]:
        return {
            "units": self._units, "change": self._change, "mean": self._mean, "square": self._square,
        }  # fmt: skip

    def learn(self, gradient: Floats, rate: float) -> None:
        """gradient: with respect to the numbers, laid out as the parts are."""
        self._steps += 1
        for which, slope in enumerate(self._slopes(gradient)):
            mean, square = self._mean[which], self._square[which]
            mean += (1 - self._FIRST) * (slope - mean)
            square += (1 - self._SECOND) * (slope * slope - square)
            fair = mean / (1 - self._FIRST**self._steps)
            root = np.sqrt(square / (1 - self._SECOND**self._steps)) + self._LEAST
            self._change[which] -= rate * fair / root
        self._move()

    def _move(self) -> None:
        moved = [
            to_f16(unit * (1 + change)) for unit, change in zip(self._units, self._change, strict=True)
        ]
        self.parts = replace(self.parts, unit=moved[0])
        if self.grid.has_offset:
            self.parts = replace(self.parts, offset_unit=moved[1])

    def _slopes(self, gradient: Floats) -> list[Floats]:
        """With respect to the relative change of each unit."""
        grid, parts = self.grid, self.parts
        levels = np.asarray(grid.levels, np.float32)[parts.codes]
        by_group = (gradient * levels).reshape(len(gradient), -1, grid.group).sum(axis=-1)
        found = [_by_unit(by_group * parts.step, parts.unit.shape[1]) * self._units[0]]
        if grid.has_offset:
            plain = gradient.reshape(len(gradient), -1, grid.group).sum(axis=-1)
            offsets = _by_unit(plain * parts.offset_step, parts.unit.shape[1])
            found.append(-offsets * self._units[1])
        return found


def _by_unit(by_group: Floats, units: int) -> Floats:
    found: Floats = by_group.reshape(len(by_group), units, -1).sum(axis=-1)
    return found


def distil(
    source: SourceModel,
    types: Mapping[str, str | None],
    layers: Layers,
    texts: Sequence[Sequence[int]],
    teacher: Teacher,
    finished: FinishedTensors,
    settings: DistillationSettings,
    progress: Progress = lambda _: None,
    told: Callable[[str], None] = lambda _: None,
) -> None:
    """layers: of the original, all in memory; they become the student's. texts: those that the teacher
    read. finished: whole, from gptq; it gets what was learnt, and keeps every minute how far that is:
    called again, this goes on from there. told: a line now and then."""
    places = [decoder_places(source, types, layer) for layer in range(layers.num_layers)]
    learners: list[dict[str, _Learner]] = []
    for layer, own in enumerate(places):
        learners.append({})
        for name, place in own.items():
            rule, type_name = place.rule, place.type_name
            if type_name not in GRIDS:
                continue
            stacked = finished.blocks(rule.gguf).reshape(len(rule.hf), rule.shape[0], -1)
            stored = stacked[place.index]
            blocks = np.ascontiguousarray(from_gguf(stored, rule.change, rule.heads))
            learners[layer][name] = _Learner(type_name, unpack(type_name, blocks))
    before = _taken_up(learners, finished.learnt())
    for layer, own_learners in enumerate(learners):
        for name, learner in own_learners.items():
            layers.replace(layer, name, learner.numbers())
    begin = kept = time.monotonic()
    random = np.random.default_rng(settings.seed)
    order: list[int] = []
    lost: list[float] = []
    done = before / (60 * settings.minutes)
    while done < 1:
        if len(order) < settings.batch:
            order = [int(text) for text in random.permutation(len(texts))]
        batch = [order.pop() for _ in range(min(settings.batch, len(order)))]
        rate = settings.rate * min(done / settings.warm_up + 0.1, 1.0) * (1 - done)
        lost.append(_step(layers, [texts[text] for text in batch], batch, teacher, learners, rate))
        now = time.monotonic()
        done = (before + now - begin) / (60 * settings.minutes)
        progress(min(done, 1.0))
        if now - kept > _KEPT_EVERY_S or done >= 1:
            kept = now
            finished.keep_learnt(_state(learners, before + now - begin))
        if len(lost) % 10 == 0:
            told(f"step {len(lost)}: divergence {np.mean(lost[-10:]):.4f}")
    _keep(places, learners, finished)


def _state(learners: Sequence[Mapping[str, _Learner]], seconds: float) -> dict[str, Array]:
    found: dict[str, Array] = {"seconds": np.array(seconds)}
    for layer, own in enumerate(learners):
        for name, learner in own.items():
            found |= {f"{layer} {name} {key}": array for key, array in learner.state().items()}
    return found


def _taken_up(learners: Sequence[Mapping[str, _Learner]], kept: Mapping[str, Array]) -> float:
    """For how many seconds was learnt before; 0 where nothing fits."""
    for layer, own in enumerate(learners):
        for name, learner in own.items():
            prefix = f"{layer} {name} "
            state = {
                key.removeprefix(prefix): array for key, array in kept.items() if key.startswith(prefix)
            }
            if not learner.take_up(state):
                return 0.0
    return float(kept.get("seconds", 0.0))


def _step(
    layers: Layers,
    texts: Sequence[Sequence[int]],
    batch: Sequence[int],
    teacher: Teacher,
    learners: Sequence[Mapping[str, _Learner]],
    rate: float,
) -> float:
    states = [layers.embed(texts)]
    for layer in range(layers.num_layers):
        states.append(layers.run(layer, states[-1]))
    last = states.pop()
    slopes = np.empty_like(last)
    total = 0.0  # the factors' steps do not depend on how large a sum of texts is
    for at, text in enumerate(batch):
        own, slope = teacher.slope(text, layers.head(last[at : at + 1])[0])
        slopes[at : at + 1] = layers.differentiate_head(last[at : at + 1], slope[None])
        total += own / len(batch)
    for layer in reversed(range(layers.num_layers)):
        slopes, of_weights = layers.differentiate(layer, states.pop(), slopes)
        for name, learner in learners[layer].items():
            learner.learn(of_weights[name], rate)
            layers.replace(layer, name, learner.numbers())
    return total


def _keep(
    places: Sequence[Mapping[str, Place]],
    learners: Sequence[Mapping[str, _Learner]],
    finished: FinishedTensors,
) -> None:
    for own, learnt in zip(places, learners, strict=True):
        stacks: dict[str, list[npt.NDArray[np.uint8]]] = {}
        for name, place in own.items():
            if name in learnt:
                blocks = pack(place.type_name, learnt[name].parts)
                changed = to_gguf(blocks, place.rule.change, place.rule.heads)
                stacks.setdefault(place.rule.gguf, []).append(changed)
        for gguf_name, stack in stacks.items():
            finished.keep(gguf_name, np.concatenate(stack), finished.error(gguf_name))
