"""A model as a Hugging Face folder that transformers and mlx-lm load: config.json and its shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer_models.conversion.floats import recast, to_float32
from edgeinfer_models.conversion.folder_files import (
    Piece,
    Progress,
    StoredTensor,
    require_free,
    write_folder,
)
from edgeinfer_models.conversion.sources import TensorSource
from edgeinfer_models.conversion.to_gguf import check_tensors, require_f16, row_chunks
from edgeinfer_models.families.tensors import TensorRule

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def write_safetensors(
    folder: Path,
    source: TensorSource,
    rules: Sequence[TensorRule],
    texts: Mapping[str, str],
    *,
    dtype: str | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """texts: the other files, by name. dtype: F32, F16 or BF16 of every tensor; None: as the source has
    each. The folder is made when all is written. Raises ModelFileInvalid, UsageError (it is there and
    not empty), OSError."""
    require_free(folder)
    check_tensors(source, rules)
    pieces = [plain_piece(source, rule, (name,), dtype) for rule in rules for name in rule.hf]
    files = {name: text.encode() for name, text in texts.items()}
    write_folder(folder, pieces, files, progress=progress)


def plain_piece(
    source: TensorSource,
    rule: TensorRule,
    names: tuple[str, ...],
    dtype: str | None,
    stored_as: str = "",
) -> Piece:
    """One tensor of the source, or several (of the same rule) stacked under the name `stored_as`. dtype:
    as `write_safetensors`."""
    wanted = dtype or source.info(names[0]).dtype
    shape = (len(names), *rule.shape) if stored_as else rule.shape
    tensor = StoredTensor(stored_as or names[0], wanted, shape)

    def parts() -> Iterator[tuple[Array, ...]]:
        for name in names:
            for _, rows in float_rows(source, rule, name, wanted):
                yield (rows,)

    elements = 1
    for size in shape:
        elements *= size
    return Piece((tensor,), parts, elements)


def float_rows(
    source: TensorSource, rule: TensorRule, name: str, wanted: str
) -> Iterator[tuple[int, Array]]:
    """A tensor's rows as `wanted`, some at a time, with the number of the first. Raises ModelFileInvalid
    for numbers that F16 does not hold."""
    dtype = source.info(name).dtype
    for start, stop in row_chunks(rule):
        rows = source.rows(name, start, stop)
        if wanted == "F16" and dtype != "F16":
            require_f16(to_float32(rows, dtype), name)
        yield start, recast(rows, dtype, wanted)
