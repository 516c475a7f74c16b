"""The types that `--type auto` chooses among, for one model: what each makes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.errors import UsageError
from edgeinfer.quantize.importance import NamedImatrix
from edgeinfer.quantize.quantization import Source, plan_quantization
from edgeinfer_models.conversion.presets import file_type
from edgeinfer_models.conversion.to_gguf import FILE_TYPES, dtype_of
from edgeinfer_models.ggml_types import row_bytes
from edgeinfer_models.gguf_header import GgufHeader

# One for each kernel that a machine may be fast with, from 4 to 16 bits. Where two come to the same
# (q6_k where rows are no whole blocks of 256), the first name stays.
TYPES = ("q4_0", "iq4_nl", "q4_k_m", "q5_k_m", "q8_0", "q6_k")


@dataclass(frozen=True)
class Candidate:
    """types: of all tensors. made_up: of those that are made up where its speed is measured; None: they
    are the model's own. shapes: rows first."""

    type_name: str
    types: Mapping[str, str]
    made_up: Mapping[str, str | None]
    shapes: Mapping[str, tuple[int, ...]]
    file_type: int | None
    is_original: bool = False

    def bytes_of(self, tensor: str) -> int:
        return tensor_bytes(self.shapes[tensor], self.types[tensor])

    @property
    def num_bytes(self) -> int:
        return sum(map(self.bytes_of, self.types))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / sum(_product(shape) for shape in self.shapes.values())

    @property
    def weight_types(self) -> tuple[tuple[str, int], ...]:
        """As those of ModelFiles."""
        found: dict[str, int] = {}
        for tensor, kind in self.types.items():
            found[kind] = found.get(kind, 0) + self.bytes_of(tensor)
        return tuple(found.items())


def candidates(
    source: Source, path: Path, out: Path | None, imatrix: NamedImatrix | None = None
) -> tuple[list[Candidate], list[str]]:
    """Those that there are for a model, each way of making its tensors once, and notes on those left
    out. path: the model's own. out: where the result is to go. Raises UnsupportedModel,
    ModelFileInvalid, UsageError where there is none: no room on the disk, another model's imatrix."""
    found: list[Candidate] = [_unquantized(source)]
    notes: list[str] = []
    refused: UsageError | None = None
    for name in TYPES:
        try:
            plan = plan_quantization(source, path, name, out, force=True, imatrix=imatrix)
        except UsageError as error:  # no room or no folder for its file, or another model's imatrix
            refused = error
            continue
        same = next((each for each in found if each.types == plan.types), None)
        if same is not None:
            notes.append(f"{name} is the same as {same.type_name} for this model")
            continue
        made_up = dict(plan.chosen)
        found.append(Candidate(name, plan.types, made_up, found[0].shapes, file_type(plan.preset)))
    if refused is not None and len(found) == 1:
        raise refused
    if refused is not None:
        notes.append(f"a type was left out: {refused}")
    return [*found[1:], found[0]], notes


def tensor_bytes(shape: Sequence[int], type_name: str) -> int:
    return _product(shape[:-1]) * row_bytes(type_name, shape[-1])


def _unquantized(source: Source) -> Candidate:
    """A folder in F16; of a GGUF file what it is now."""
    if isinstance(source, GgufHeader):
        shapes = {tensor.name: tuple(reversed(tensor.shape)) for tensor in source.tensors}
        types = {tensor.name: tensor.type_name for tensor in source.tensors}
        sizes: dict[str, int] = {}
        for tensor in source.tensors:
            sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.num_bytes
        most = max(sizes, key=lambda kind: sizes[kind]).lower()
        own: dict[str, str | None] = dict.fromkeys(types)
        return Candidate(most, types, own, shapes, None, is_original=True)
    rules = source.family.rules(source.shape)
    shapes = {rule.gguf: rule.gguf_shape for rule in rules}
    types = {rule.gguf: dtype_of(rule, "F16") for rule in rules}
    made_up = {name: kind if kind == "F16" else None for name, kind in types.items()}
    return Candidate("f16", types, made_up, shapes, FILE_TYPES["F16"])


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found
