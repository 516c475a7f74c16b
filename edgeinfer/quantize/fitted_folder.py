"""Folders whose layers' matrices are fitted to calibration text (gptq, awq), onto their own grids.

method, notes = method_of_folder(plan, "auto", None)
with kept_apart(work_folder(plan.out)):
    fitted = fit_folder(plan, method, None, DEFAULT_TOKENS, show)
    write(fitted.plan)
    fitted.finished.remove()

Embeddings, head and routers are rounded to nearest, as without text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import UsageError
from edgeinfer.quantize.calibrated import CORRECTING, Say, calibrated, fitted, work_folder
from edgeinfer.quantize.folder_forms import FolderForm
from edgeinfer.quantize.folders import FLOAT_TYPES, FolderPlan, kind_of, pieces_of
from edgeinfer.quantize.prepared import Request, chosen_method
from edgeinfer.quantize.quantization import require_room
from edgeinfer_models.conversion import affine
from edgeinfer_models.conversion.compressed_folder import BITS, ROUTERS, group_of, is_packed
from edgeinfer_models.conversion.floats import from_float32
from edgeinfer_models.conversion.mlx_folder import packed_as
from edgeinfer_models.conversion.sources import TensorInfo, TensorSource
from edgeinfer_models.families.changes import from_gguf
from edgeinfer_models.families.tensors import TensorRule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer.quantize.finished_tensors import FinishedTensors
    from edgeinfer_models.conversion.affine import AffineEncode
    from edgeinfer_models.conversion.grids import Parts
    from edgeinfer_models.conversion.symmetric import Codes

    Array = npt.NDArray[Any]
    Floats = npt.NDArray[np.float32]

# What loses enough for text to be worth its time: of 8 bits rounding to nearest loses next to nothing.
FITTED_BY_DEFAULT = ("mlx-4bit", "int4")
Show = Callable[[str, float], None]


@dataclass(frozen=True)
class FittedFolder:
    """notes: what there is to tell beside the plan's. finished: what is beside the result until then."""

    plan: FolderPlan
    notes: tuple[str, ...]
    finished: FinishedTensors


def method_of_folder(
    plan: FolderPlan, method: str, calibration: Path | None
) -> tuple[str | None, tuple[str, ...]]:
    """What auto is here, and why; None where nothing is rounded. Raises UsageError."""
    kind = plan.type_name
    if kind in FLOAT_TYPES:
        if method != "auto" or calibration is not None:
            option = "--calibration" if method == "auto" else "--method"
            raise UsageError(f"{option} is for weights of fewer bits, which --type {kind} has not")
        return None, ()
    if method not in ("auto", "rtn", *CORRECTING):
        known = ", ".join(("rtn", *CORRECTING))
        raise UsageError(f"--method {method} is for GGUF files; of folders there are {known}")
    if kind == "fp8" and method in CORRECTING:
        raise UsageError(f"--method {method} is for whole numbers, and fp8 has floats; leave it out")
    if method == "auto" and kind not in FITTED_BY_DEFAULT:
        if calibration is not None:
            other = "leave it out" if kind == "fp8" else "it is for --method gptq, awq or awq+gptq"
            raise UsageError(f"--calibration: {kind} is rounded without looking at text; {other}")
        return "rtn", ()
    return chosen_method(plan.model, Request(kind, method, calibration=calibration))


def fit_folder(
    plan: FolderPlan,
    method: str,
    calibration: Path | None,
    tokens: int,
    show: Show = lambda *_: None,
    say: Say = lambda _: None,
) -> FittedFolder:
    """method: of CORRECTING. calibration: a text; tokens: at most so many of it. What is finished stays
    beside the result until it is told to go: asked again, it goes on from there. Raises UsageError,
    UnsupportedModel, ModelFileInvalid, BackendUnavailable, LoadFailed, OSError."""
    require_room(plan.out, 2 * plan.num_bytes)  # what is finished lies beside the result for a while
    forms = forms_of(plan)
    types = {name: form.name for name, form in forms.items()}
    by_name = {form.name: form for form in forms.values()}
    with calibrated(plan.model, calibration, tokens) as of:
        finished, notes = fitted(
            of,
            types,
            by_name,
            method,
            work_folder(plan.out),
            lambda done: show(f"{method}: fitting what is rounded to the text", done),
            say,
        )
        notes = (*of.calibration.notes, *notes)
    return FittedFolder(with_finished(plan, forms, finished), notes, finished)


def forms_of(plan: FolderPlan) -> dict[str, FolderForm]:
    """Of the matrices that are fitted, by their GGUF names."""
    rules = plan.model.family.rules(plan.model.shape)
    found = {rule.gguf: _form(plan, rule) for rule in rules}
    return {name: form for name, form in found.items() if form is not None}


def _form(plan: FolderPlan, rule: TensorRule) -> FolderForm | None:
    if rule.layer < 0 or len(rule.shape) != 2 or rule.hf[0].endswith(ROUTERS):
        return None
    dtype = plan.dtype or plan.model.source.info(rule.hf[0]).dtype
    if plan.packing is not None:
        packed = packed_as(rule, plan.packing)
        return None if packed is None else FolderForm("mlx", *packed, dtype)
    kind = kind_of(plan.type_name)
    if not is_packed(rule, kind, plan.group):
        return None
    return FolderForm("compressed", BITS[kind], group_of(rule, kind, plan.group), dtype)


def with_finished(
    plan: FolderPlan, forms: Mapping[str, FolderForm], finished: FinishedTensors
) -> FolderPlan:
    """The same with what is finished in the place of rounding, and with the norms and biases that awq
    changed."""
    rules = plan.model.family.rules(plan.model.shape)
    stored = _Stored(rules, forms, finished)
    source = _Changed(plan.model.source, _vectors(rules, finished), plan.dtype)
    model = replace(plan.model, source=source)
    if plan.packing is not None:
        pieces = pieces_of(replace(plan, model=model), rounding=stored.affine)
    else:
        pieces = pieces_of(replace(plan, model=model), encode=stored.symmetric)
    return replace(plan, model=model, pieces=pieces)


class _Stored:
    """What is finished, as the functions that folders take in the place of rounding."""

    def __init__(
        self,
        rules: Sequence[TensorRule],
        forms: Mapping[str, FolderForm],
        finished: FinishedTensors,
    ) -> None:
        self._forms, self._finished = forms, finished
        self._places = {
            name: (rule, index)
            for rule in rules
            if rule.gguf in forms
            for index, name in enumerate(rule.hf)
        }

    def affine(self, bits: int, group: int) -> AffineEncode:
        nearest = affine.nearest(bits, group)

        def encode(name: str, rows: Floats, first_row: int) -> affine.Rounded:
            if name not in self._places:
                return nearest(name, rows, first_row)
            parts = self._parts(name, first_row, len(rows))
            return parts.codes, parts.scale, parts.offset

        return encode

    def symmetric(self, name: str, rows: Floats, first_row: int) -> tuple[Codes, Floats]:
        import numpy as np

        parts = self._parts(name, first_row, len(rows))
        form = self._forms[self._places[name][0].gguf]
        around_zero = (parts.codes - np.uint8(1 << form.bits - 1)).view(np.int8)  # they wrap around
        return around_zero, parts.scale

    def _parts(self, name: str, first: int, count: int) -> Parts:
        rule, index = self._places[name]
        blocks = self._finished.blocks(rule.gguf).reshape(len(rule.hf), rule.shape[0], -1)[index]
        # It is kept in GGUF's order of rows, which a folder has not.
        rows = from_gguf(blocks, rule.change, rule.heads)[first : first + count]
        return self._forms[rule.gguf].parts(rows)


def _vectors(rules: Sequence[TensorRule], finished: FinishedTensors) -> dict[str, Floats]:
    """Norms and biases that awq changed, by their Hugging Face names."""
    import numpy as np

    return {
        rule.hf[0]: from_gguf(finished.blocks(rule.gguf)[0].view(np.float32), rule.change, rule.heads)
        for rule in rules
        if len(rule.shape) == 1 and rule.gguf in finished
    }


class _Changed:
    """A model's tensors, some vectors among them others. dtype: what those are; None: what they were."""

    def __init__(self, source: TensorSource, vectors: Mapping[str, Floats], dtype: str | None) -> None:
        self._source, self._vectors, self._dtype = source, vectors, dtype

    @property
    def names(self) -> Sequence[str]:
        return self._source.names

    def info(self, name: str) -> TensorInfo:
        own = self._source.info(name)
        return replace(own, dtype=self._dtype or own.dtype) if name in self._vectors else own

    def rows(self, name: str, start: int, stop: int) -> Array:
        if name not in self._vectors:
            return self._source.rows(name, start, stop)
        return from_float32(self._vectors[name][start:stop], self.info(name).dtype)
