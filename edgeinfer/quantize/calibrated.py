"""What methods that look at text need before a file is written: importance, or finished tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer import __version__
from edgeinfer.backend import LayeredModel
from edgeinfer.errors import BackendUnavailable, ModelFileInvalid
from edgeinfer.quantize.calibration import TEXT_TOKENS, Calibration, read_calibration
from edgeinfer.quantize.corrected import Correction, correct, name_in_layer
from edgeinfer.quantize.finished_tensors import FinishedTensors
from edgeinfer.quantize.forms import Form, ggml_forms
from edgeinfer.quantize.importance import NamedImatrix
from edgeinfer.quantize.layer_walk import LayerWalk
from edgeinfer.quantize.scaling import links_of, said
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.floats import HELD_AS, from_float32
from edgeinfer_models.conversion.imatrix import Columns, Imatrix
from edgeinfer_models.conversion.model import SourceModel, source_of_gguf
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from edgeinfer.quantize.quantization import Quantization, Source

Progress = Callable[[float], None]
Say = Callable[[str], None]
CORRECTING = ("awq", "gptq", "awq+gptq")


@dataclass(frozen=True)
class Calibrated:
    """A model that calibration text can be run through."""

    source: SourceModel
    model: LayeredModel
    calibration: Calibration


@contextmanager
def calibrated(source: Source, text: Path | None, tokens: int) -> Iterator[Calibrated]:
    """Raises UsageError (the text), UnsupportedModel (torch does not know the family),
    BackendUnavailable (torch is not there), LoadFailed, ModelFileInvalid."""
    known = source if isinstance(source, SourceModel) else source_of_gguf(source.path)
    backend = get_backend("torch")
    lacking = backend.lacks()
    if lacking:
        raise BackendUnavailable(f"calibration runs through torch: {lacking}; or take --method rtn")
    model = backend.open_layers(files_of(known), TEXT_TOKENS)
    try:
        yield Calibrated(known, model, read_calibration(text, model.tokenizer, tokens))
    finally:
        model.close()


def computed_imatrix(of: Calibrated, progress: Progress = lambda _: None) -> NamedImatrix:
    """How much each column of a layer's matrices matters to the model as it is."""
    import numpy as np

    layers = of.model.layers
    walk = LayerWalk(layers, of.calibration.texts)
    found: dict[str, Columns] = {}
    for layer in range(layers.num_layers):
        squares = walk.squares(layer)
        for rule in of.source.family.rules(of.source.shape):
            if rule.layer != layer or len(rule.shape) != 2:
                continue
            names = [name_in_layer(hf, layer) for hf in rule.hf]
            if all(name in squares for name in names):
                sums = np.stack([squares[name][0] for name in names])
                counts = np.array([squares[name][1] for name in names], np.int64)
                found[rule.gguf] = Columns(sums, counts)
        progress((layer + 1) / layers.num_layers)
    calibration = of.calibration
    chunks = len(calibration.texts)
    return NamedImatrix(calibration.origin, Imatrix(found, (calibration.origin,), TEXT_TOKENS, chunks))


def corrected(
    plan: Quantization,
    of: Calibrated,
    method: str,
    folder: Path,
    progress: Progress = lambda _: None,
    say: Say = lambda _: None,
) -> tuple[FinishedTensors, tuple[str, ...]]:
    """Of a GGUF file. Otherwise as `fitted`."""
    rows = get_backend("llamacpp").row_quantizer()
    try:
        forms = ggml_forms(plan.changed.values(), rows)
        return fitted(of, plan.changed, forms, method, folder, progress, say)
    finally:
        rows.close()


def fitted(
    of: Calibrated,
    types: Mapping[str, str | None],
    forms: Mapping[str, Form],
    method: str,
    folder: Path,
    progress: Progress = lambda _: None,
    say: Say = lambda _: None,
) -> tuple[FinishedTensors, tuple[str, ...]]:
    """types: of each tensor, by its GGUF name; None: it stays. forms: by types. method: of CORRECTING.
    folder: where what is done is kept. say: whether there was any. Returns it, and a line for each thing
    to be told. Raises OSError, UsageError, ModelFileInvalid."""
    how = Correction(scales="awq" in method, feeds_back="gptq" in method)
    job = {
        "version": __version__,
        "source": _stamp(of.source),
        "types": dict(types),
        "calibration": of.calibration.digest,
        "method": asdict(how),
    }
    finished = FinishedTensors(folder, job)
    if len(finished):
        say(f"going on from {folder.name}, where {len(finished)} tensors are finished")
    elif finished.has_discarded:
        say(f"{folder.name} was of another job (model, types, method or text): begun anew")
    texts = of.calibration.texts
    try:
        correct(of.source, types, of.model.layers, texts, forms, finished, how, progress)
    except ModelFileInvalid:  # there is nothing to go on with
        finished.remove()
        raise
    unscaled = links_of(of.source.shape)[1]
    return finished, (said(unscaled),) if how.scales and unscaled else ()


def work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


def stored_of(finished: FinishedTensors, plan: Quantization) -> Mapping[str, npt.NDArray[np.uint8]]:
    """What of it is a tensor of the file. Norms and biases that awq changed are kept in F32, and written
    in the type that the file has them in."""
    import numpy as np

    found = {}
    for name, kind in plan.types.items():
        if name in finished:
            found[name] = finished.blocks(name)
            if kind in HELD_AS and kind != "F32":
                numbers = found[name].reshape(-1).view(np.float32)
                found[name] = from_float32(numbers, kind).view(np.uint8)
    return found


def files_of(source: SourceModel) -> ModelFiles:
    origin = source.origin
    if isinstance(origin, GgufHeader):
        return ModelFiles(source.name, (origin.path,), "gguf")
    return ModelFiles(source.name, tuple(shard.path for shard in origin.shards), "safetensors")


def _stamp(source: SourceModel) -> list[tuple[str, int, int]]:
    """Names, sizes and times: reading gigabytes would cost more than it finds."""
    origin = source.origin
    if isinstance(origin, GgufHeader):
        paths = list(origin.shards)
    else:
        paths = [shard.path for shard in origin.shards]
    stats = [path.resolve().stat() for path in paths]
    return [
        (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        for path, stat in zip(paths, stats, strict=True)
    ]
