"""A model's weights in fewer bits: what becomes of each tensor, and the doing of it.

plan = plan_quantization(opened(path), path, "q4_0", out=None, force=False)
quantize(plan, progress)

Numbers are rounded each by itself ("rtn"), or weighed by an importance matrix, or become what another
`encode` makes of them, in ggml's types, mixed as llama.cpp's presets are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.errors import UsageError
from edgeinfer.quantize.conversion import TYPES
from edgeinfer.quantize.importance import NamedImatrix, importance_by_tensor
from edgeinfer.quantize.rounding import rounding
from edgeinfer_models.config import config_from_gguf
from edgeinfer_models.conversion.conversion import lacking_room
from edgeinfer_models.conversion.model import SourceModel, source_of_folder
from edgeinfer_models.conversion.new_file import require_place
from edgeinfer_models.conversion.presets import MixtureFacts, choose_types, file_type
from edgeinfer_models.conversion.rewritten import rewrite_gguf, written_bytes
from edgeinfer_models.conversion.tensor_data import Encode
from edgeinfer_models.conversion.to_gguf import (
    GgufPlan,
    check_tensors,
    model_head,
    tensor_bytes,
    write_gguf,
)
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.gguf_patch import reserved

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

METHODS = ("rtn", "imatrix")
_OF_BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# Filled once the file can be measured; spaces where it was not.
REPORT_KEY, REPORT_BYTES = "edgeinfer.quantize.report", 512
Progress = Callable[[float], None]
Source = SourceModel | GgufHeader


@dataclass(frozen=True)
class Quantization:
    """types: of each tensor in the file, by its GGUF name. num_bytes and elements: of all tensors.
    importance: see `rounding`. metadata: what the file says beside what the model does."""

    source: Source
    preset: str
    types: Mapping[str, str]
    chosen: Mapping[str, str | None]  # as `types`, but None where a tensor stays as it is
    out: Path
    force: bool
    num_bytes: int
    elements: int
    notes: tuple[str, ...]
    imatrix: NamedImatrix | None = None
    importance: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, int | str]:
        found: dict[str, int | str] = {
            "general.file_type": file_type(self.preset),
            "general.quantization_version": _QUANTIZATION_VERSION,
        }
        return {
            **found,
            REPORT_KEY: reserved(REPORT_BYTES),
            **(self.imatrix.metadata() if self.imatrix else {}),
        }

    @property
    def changed(self) -> dict[str, str | None]:
        """As `chosen`, but None where a tensor has the type already."""
        own = {name: _own_type(self.source, name) for name in self.chosen}
        return {name: None if kind == own[name] else kind for name, kind in self.chosen.items()}

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.elements

    def bytes_by_type(self) -> Mapping[str, int]:
        """The largest share first."""
        found: Counter[str] = Counter()
        for name, size in _sizes(self.source, self.chosen).items():
            found[self.types[name]] += size
        return dict(found.most_common())


def opened(path: Path) -> Source:
    """A Hugging Face folder, or any GGUF model. Raises ModelFileInvalid, UnsupportedModel,
    ModelNotFound."""
    return source_of_folder(path) if path.is_dir() else read_gguf_model(path)


def quantized_already(source: Source) -> str:
    """What is to be said of a model that is; "" of others."""
    if not isinstance(source, GgufHeader):
        return ""
    rounded = Counter(
        tensor.type_name for tensor in source.tensors if GGML_TYPES_BY_NAME[tensor.type_name].block > 1
    )
    if not rounded:
        return ""
    kinds = ", ".join(name for name, _ in rounded.most_common(3))
    return (
        f"its weights are quantized already ({kinds}): quantized again they lose more than the"
        " original's would"
    )


def num_weights(source: Source) -> int:
    return sum(_product(shape) for shape in _shapes(source).values())


def head_bytes(source: Source) -> int:
    """Of a file before its tensors: metadata, vocabulary, names. Alignment may add a few."""
    if isinstance(source, GgufHeader):
        return source.data_offset + REPORT_BYTES + 256
    plan = GgufPlan(source.family, source.shape, "F32", source.gguf_metadata())
    return len(model_head(plan)) + REPORT_BYTES + 256


def plan_quantization(
    source: Source,
    beside: Path,
    type_name: str,
    out: Path | None,
    *,
    force: bool,
    imatrix: NamedImatrix | None = None,
    weighs: bool = False,
) -> Quantization:
    """Everything that can be found out before a byte is written. type_name: of TYPES. beside: the
    model's own path. weighs: the method will find out which columns matter, so types are mixed as with
    an importance matrix. Raises UsageError, UnsupportedModel, ModelFileInvalid."""
    preset = type_name.upper()
    shapes = _shapes(source)
    chosen = choose_types(preset, shapes, _facts(source), has_imatrix=weighs or imatrix is not None)
    importance: Mapping[str, npt.NDArray[np.float32]] = {}
    if imatrix is not None:
        rounded = {n: kind for n, kind in chosen.items() if kind and kind != _own_type(source, n)}
        importance = importance_by_tensor(imatrix, preset, shapes, rounded)
    target = out or beside.parent / f"{beside.name.removesuffix('.gguf')}-{type_name}.gguf"
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder; make it, or give another -o")
    require_place(target, beside, force=force)
    num_bytes = sum(_sizes(source, chosen).values())
    require_room(target, num_bytes)
    types = {name: kind or _own_type(source, name) for name, kind in chosen.items()}
    elements = sum(_product(shape) for shape in shapes.values())
    notes = _notes(source, preset, chosen)
    return Quantization(
        source,
        preset,
        types,
        chosen,
        target,
        force,
        num_bytes,
        elements,
        notes,
        imatrix,
        importance,
    )


def with_types(plan: Quantization, chosen: Mapping[str, str | None]) -> Quantization:
    """The same with other types of its tensors. Raises UsageError where they find no room."""
    num_bytes = sum(_sizes(plan.source, chosen).values())
    require_room(plan.out, num_bytes)
    types = {name: kind or _own_type(plan.source, name) for name, kind in chosen.items()}
    return replace(plan, types=types, chosen=chosen, num_bytes=num_bytes)


def quantize(
    plan: Quantization,
    progress: Progress = lambda _: None,
    *,
    encode: Encode | None = None,
    watch: Callable[[Encode], Encode] = lambda encode: encode,
    stored: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    threads: int = 0,
) -> None:
    """encode: what makes rows into blocks; None: they are rounded (`rounding`), and `watch` may look at
    it. stored: the data of
    tensors that are known already. threads: 0: one for each core. Raises ModelFileInvalid,
    UnsupportedModel, UsageError (the result is there), BackendUnavailable, OSError. Then nothing is
    left of it."""
    if encode is None:
        with rounding(plan.importance, _num_rows(plan)) as rounded:
            quantize(plan, progress, encode=watch(rounded), stored=stored, threads=threads)
        return
    source = plan.source
    if isinstance(source, GgufHeader):
        rewrite_gguf(
            plan.out,
            source,
            plan.chosen,
            plan.metadata,
            encode,
            stored=stored,
            threads=threads,
            force=plan.force,
            progress=progress,
        )
        return
    parts = GgufPlan(
        source.family,
        source.shape,
        "F32",
        {**source.gguf_metadata(), **plan.metadata},
        types=plan.chosen,
        encode=encode,
    )
    write_gguf(
        plan.out,
        source.source,
        parts,
        stored=stored,
        threads=threads,
        force=plan.force,
        progress=progress,
    )


def require_room(target: Path, num_bytes: int) -> None:
    """Raises UsageError."""
    lacking = lacking_room(target.parent, num_bytes)
    if lacking:
        raise UsageError(f"{target}: {lacking}; free some, or give another -o")


def _num_rows(plan: Quantization) -> dict[str, int]:
    """Of one matrix of each tensor that is weighed."""
    return {name: shape[-2] for name, shape in _shapes(plan.source).items() if name in plan.importance}


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Rows first, by GGUF name."""
    if isinstance(source, GgufHeader):
        return {tensor.name: tuple(reversed(tensor.shape)) for tensor in source.tensors}
    rules = source.family.rules(source.shape)
    check_tensors(source.source, rules)
    return {rule.gguf: rule.gguf_shape for rule in rules}


def _sizes(source: Source, chosen: Mapping[str, str | None]) -> dict[str, int]:
    if isinstance(source, GgufHeader):
        return {tensor.name: written_bytes(tensor, chosen[tensor.name]) for tensor in source.tensors}
    rules = source.family.rules(source.shape)
    return {rule.gguf: tensor_bytes(rule, chosen[rule.gguf] or "F32") for rule in rules}


def _own_type(source: Source, name: str) -> str:
    if not isinstance(source, GgufHeader):
        return "F32"
    tensor = source.tensor(name)
    assert tensor is not None  # noqa: S101 (its name came from there)
    return tensor.type_name


def _facts(source: Source) -> MixtureFacts:
    if isinstance(source, GgufHeader):
        config = config_from_gguf(source)
        kv_heads = config.num_kv_heads[0] if config.num_kv_heads else 0
        shared = config.num_heads // kv_heads if kv_heads else 0
        return MixtureFacts(source.architecture, config.num_layers, shared, config.num_experts)
    shape = source.shape
    experts = shape.experts.count if shape.experts else 0
    shared = shape.num_heads // shape.num_kv_heads
    return MixtureFacts(source.family.arch, shape.num_layers, shared, experts)


def _notes(source: Source, preset: str, chosen: Mapping[str, str | None]) -> tuple[str, ...]:
    found: list[str] = []
    if isinstance(source, GgufHeader):
        already = quantized_already(source)
        if already and any(chosen.values()):
            found.append(already)
    else:
        source.family.shape_to_gguf(source.shape)  # says now what llama.cpp computes otherwise
        found += source.notes()
    shapes = _shapes(source)
    odd = [name for name, kind in chosen.items() if kind and shapes[name][-1] % 256]
    if odd and preset not in _OF_BLOCKS_OF_32:
        found.append(
            f"{len(odd)} tensors have rows that are no whole blocks of 256; they get a type of blocks of"
            " 32 instead, as llama.cpp does it"
        )
    return tuple(found)


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


__all__ = ["TYPES", "Quantization", "opened", "plan_quantization", "quantize"]
