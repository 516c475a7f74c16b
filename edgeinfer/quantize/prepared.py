"""From what a user asks for to all that a file is written from: types, methods, calibration, budget.

with prepare(path, request, show) as ready:
    write(ready, show)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.errors import UnsupportedModel, UsageError
from edgeinfer.quality.tensor_error import TensorError
from edgeinfer.quantize.budget import choose_within
from edgeinfer.quantize.calibrated import (
    CORRECTING,
    Calibrated,
    calibrated,
    computed_imatrix,
    corrected,
    files_of,
    stored_of,
    work_folder,
)
from edgeinfer.quantize.calibration import DEFAULT_TOKENS, TEXT_TOKENS
from edgeinfer.quantize.distillation import DistillationSettings, distil
from edgeinfer.quantize.finished_tensors import FinishedTensors, kept_apart
from edgeinfer.quantize.importance import NamedImatrix, named_imatrix
from edgeinfer.quantize.quantization import (
    Quantization,
    Source,
    head_bytes,
    opened,
    plan_quantization,
    quantize,
    require_room,
    with_types,
)
from edgeinfer.quantize.rounding_errors import RoundingErrors
from edgeinfer.quantize.sensitivity import sensitivities
from edgeinfer.quantize.teacher import Teacher
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.ggml_grids import GRIDS
from edgeinfer_models.conversion.imatrix import write_imatrix
from edgeinfer_models.conversion.model import SourceModel, source_of_gguf
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME, row_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

METHODS = ("auto", "rtn", "imatrix", "awq", "gptq", "awq+gptq", "qat")
# auto: more weights take gptq hours on a processor.
MOST_AUTOMATIC = 2_000_000_000
DEFAULT_MINUTES = 20.0
Show = Callable[[str, float], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What was asked for. type_name: of TYPES. imatrix: a file of llama-imatrix. calibration: a text.
    budget: bytes of all tensors; then type_name says what embeddings and head get. minutes: of qat."""

    type_name: str
    method: str = "auto"
    out: Path | None = None
    force: bool = False
    imatrix: Path | None = None
    save_imatrix: Path | None = None
    calibration: Path | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    budget: int | None = None
    minutes: float = DEFAULT_MINUTES


@dataclass(frozen=True)
class Ready:
    """method: what auto became. stored: tensors that are done. finished: where they lie."""

    plan: Quantization
    method: str
    notes: tuple[str, ...]
    stored: Mapping[str, npt.NDArray[np.uint8]]
    errors: tuple[TensorError, ...]
    finished: FinishedTensors | None = None


@contextmanager
def prepare(
    path: Path, request: Request, show: Show = lambda *_: None, say: Say = lambda _: None
) -> Iterator[Ready]:
    """path: a folder of safetensors or a GGUF file. show: what is done, and how far it is. say: what is
    to be known before hours have passed.

    What gptq, awq and qat have finished stays beside the result until it is written: asked again, they
    go on from there. Raises UsageError, UnsupportedModel,
    ModelFileInvalid, BackendUnavailable, LoadFailed, OSError.
    """
    source = opened(path)
    method, notes = chosen_method(source, request)
    named = None if request.imatrix is None else named_imatrix(request.imatrix)
    plan = plan_quantization(
        source,
        path,
        request.type_name,
        request.out,
        force=request.force,
        imatrix=named,
        weighs=_weighs(method, request.type_name),
    )
    needs_text = method in CORRECTING or method == "qat" or request.budget is not None
    if method == "imatrix" and named is None:
        needs_text = True
    if not needs_text:
        yield Ready(plan, method, (*plan.notes, *notes), {}, ())
        return
    fits = method in CORRECTING or method == "qat"
    with kept_apart(work_folder(plan.out)) if fits else nullcontext():
        yield _after_text(source, path, request, Ready(plan, method, notes, {}, ()), named, show, say)


def _after_text(
    source: Source,
    path: Path,
    request: Request,
    wanted: Ready,
    named: NamedImatrix | None,
    show: Show,
    say: Say,
) -> Ready:
    """wanted: as far as it is known before a text is looked at."""
    plan, method, notes = wanted.plan, wanted.method, wanted.notes
    with calibrated(source, request.calibration, request.calibration_tokens) as of:
        notes += of.calibration.notes
        if request.budget is not None:
            plan = _within(plan, of, request, lambda done: show("finding where bytes matter", done), say)
        if method == "imatrix" and named is None:
            named = computed_imatrix(of, lambda done: show("finding which weights matter", done))
            if request.save_imatrix is not None:
                write_imatrix(request.save_imatrix, named.imatrix, force=request.force)
            plan = _weighed(plan, source, path, request, named)
        if method in ("rtn", "imatrix"):
            return Ready(plan, method, (*plan.notes, *notes), {}, ())
        by = "gptq" if method == "qat" else method
        # What is finished lies beside the result for a while; so does what qat has learnt, old and new.
        require_room(plan.out, (4 if method == "qat" else 2) * plan.num_bytes)
        finished, told = corrected(
            plan,
            of,
            by,
            work_folder(plan.out),
            lambda done: show(f"{by}: fitting what is rounded to the text", done),
            say,
        )
        if method == "qat":
            _teach(plan, of, finished, request.minutes, show)
    stored = stored_of(finished, plan)
    errors = tuple(
        TensorError(name, plan.types[name], finished.error(name))
        for name in stored
        if plan.changed.get(name)
    )
    return Ready(plan, method, (*plan.notes, *notes, *told), stored, errors, finished)


def write(
    ready: Ready,
    show: Show = lambda *_: None,
    to: Path | None = None,
    errors: RoundingErrors | None = None,
) -> None:
    """to: in the place of the plan's path. errors: sees what is rounded. What was finished stays until
    it is told to go. Raises as `quantize`."""
    plan = ready.plan if to is None else replace(ready.plan, out=to, force=True)
    quantize(
        plan,
        lambda done: show(f"writing {ready.plan.out.name}", done),
        watch=(lambda encode: encode) if errors is None else errors.watching,
        stored=ready.stored,
    )


def forget_finished(ready: Ready) -> None:
    if ready.finished is not None:
        ready.finished.remove()


def chosen_method(source: Source, request: Request) -> tuple[str, tuple[str, ...]]:
    """What auto is here, and why. Raises UsageError."""
    method = request.method
    if method not in METHODS:
        raise UsageError(f"--method {method[:40]!r} is not one of {', '.join(METHODS)}")
    if request.imatrix is not None:
        if method not in ("auto", "imatrix"):
            raise UsageError(
                f"--imatrix is for --method imatrix, not {method}; leave one of the two out"
            )
        return "imatrix", ()
    if method != "auto":
        if method == "rtn" and request.calibration is not None and request.budget is None:
            raise UsageError("--method rtn looks at no text; leave --calibration out, or --method")
        return method, ()
    lacking = get_backend("torch").lacks()
    if lacking:
        return "rtn", (f"rounded without looking at text, which loses more: {lacking}",)
    try:
        known = source if isinstance(source, SourceModel) else source_of_gguf(source.path)
    except UnsupportedModel as error:
        return "rtn", (f"rounded without looking at text, which loses more: {error}",)
    weights = sum(_product(rule.gguf_shape) for rule in known.family.rules(known.shape))
    if weights > MOST_AUTOMATIC:
        return "rtn", (
            f"rounded without looking at text: gptq would take hours for {weights / 1e9:.1f} billion"
            " weights; --method gptq loses less",
        )
    return "awq+gptq", ()


def _weighs(method: str, type_name: str) -> bool:
    """Whether types are mixed as with an importance matrix."""
    if method == "rtn":
        return False
    # Then llama.cpp has a few matrices of Q4_0 and Q5_0 files in Q4_1 and Q5_1, for which it has no fast
    # kernels. What is fitted to a text is better than those without.
    return method == "imatrix" or type_name not in ("q4_0", "q5_0")


def _weighed(
    plan: Quantization, source: Source, path: Path, request: Request, named: NamedImatrix
) -> Quantization:
    again = plan_quantization(
        source, path, request.type_name, request.out, force=request.force, imatrix=named
    )
    return again if request.budget is None else with_types(again, plan.chosen)


def _within(
    plan: Quantization,
    of: Calibrated,
    request: Request,
    progress: Callable[[float], None],
    say: Say,
) -> Quantization:
    """Layers' matrices in the types that lose least; everything else as the preset has it."""
    assert request.budget is not None  # noqa: S101
    shapes = {rule.gguf: rule.gguf_shape for rule in of.source.family.rules(of.source.shape)}
    layers = {rule.gguf for rule in of.source.family.rules(of.source.shape) if rule.layer >= 0}
    candidates = {
        name: [kind for kind in GRIDS if shapes[name][-1] % GGML_TYPES_BY_NAME[kind].block == 0]
        for name, kind in plan.changed.items()
        if kind is not None and name in layers
    }
    sizes = {
        name: {kind: _bytes(shapes[name], kind) for kind in kinds} for name, kinds in candidates.items()
    }
    rest = plan.num_bytes - sum(_bytes(shapes[name], plan.types[name]) for name in candidates)
    least = rest + sum(min(own.values()) for own in sizes.values())
    if request.budget < least:
        size, bits = least + head_bytes(plan.source), 8 * least / plan.elements
        raise UsageError(
            f"--budget: too small for this model, of which the smallest types make {size / 1e6:,.1f} MB;"
            f" give at least {math.ceil(size / 2**20)}M, or {math.ceil(100 * bits) / 100:.2f}bpw"
        )
    most = {name: max(own, key=lambda kind: own[kind]) for name, own in sizes.items()}
    if request.budget >= rest + sum(sizes[name][kind] for name, kind in most.items()):
        kinds = ", ".join(sorted(set(most.values())))
        say(f"--budget is more than the largest types take: layers get those ({kinds})")
        return with_types(plan, {**plan.chosen, **most})
    rows = get_backend("llamacpp").row_quantizer()
    try:
        losses = sensitivities(of, candidates, rows, plan.out.parent, progress)
    finally:
        rows.close()
    return with_types(plan, {**plan.chosen, **choose_within(losses, sizes, request.budget - rest)})


def _teach(
    plan: Quantization, of: Calibrated, finished: FinishedTensors, minutes: float, show: Show
) -> None:
    from edgeinfer.backend import RuntimeSettings

    folder = plan.out.parent
    texts = of.calibration.texts
    teacher = Teacher(
        of.model.layers, texts, folder, lambda done: show("what the full model says", done)
    )
    settings = RuntimeSettings(context=TEXT_TOKENS, sequences=1, step_tokens=TEXT_TOKENS)
    runtime = get_backend("torch").load(files_of(of.source), settings, lambda _: True)
    try:
        distil(
            of.source,
            plan.changed,
            runtime.layers(),
            texts,
            teacher,
            finished,
            DistillationSettings(minutes),
            lambda done: show("qat: learning from the full model", done),
        )
    finally:
        runtime.close()
        teacher.close()


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    return _product(shape[:-1]) * row_bytes(kind, shape[-1])


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
