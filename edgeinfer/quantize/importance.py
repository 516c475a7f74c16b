"""An importance matrix for one model: which of its tensors have an entry, and what the file says of it.

As llama-quantize does it: a tensor without an entry is rounded as if there were none, but for types that
would be garbage then; an entry of another width ends it, but for the token embeddings, which multiply
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.backend import MOST_IMPORTANCE
from edgeinfer.errors import UsageError
from edgeinfer_models.conversion.imatrix import Imatrix, read_imatrix
from edgeinfer_models.conversion.presets import needs_importance
from edgeinfer_models.file_kind import shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_MOST_TEXT_BYTES = 127  # of a value in llama-quantize's metadata


@dataclass(frozen=True)
class NamedImatrix:
    """name: of its file, for the metadata and messages."""

    name: str
    imatrix: Imatrix

    def metadata(self) -> dict[str, int | str]:
        """What llama-quantize adds to a file's. The name without its folders: those say more of a disk
        than of the file."""
        found: dict[str, int | str] = {"quantize.imatrix.file": _cut(self.name)}
        if self.imatrix.datasets:
            found["quantize.imatrix.dataset"] = _cut(self.imatrix.datasets[0])
        found["quantize.imatrix.entries_count"] = len(self.imatrix.tensors)
        if self.imatrix.chunk_count:
            found["quantize.imatrix.chunks_count"] = self.imatrix.chunk_count
        return found


def named_imatrix(path: Path) -> NamedImatrix:
    """Raises ModelNotFound, ModelFileInvalid, UnsupportedModel."""
    return NamedImatrix(path.name, read_imatrix(path))


def importance_by_tensor(
    named: NamedImatrix,
    preset: str,
    shapes: Mapping[str, tuple[int, ...]],
    chosen: Mapping[str, str | None],
) -> dict[str, Floats]:
    """Of each tensor that gets another type and has an entry: (matrices, width). shapes: rows first, by
    GGUF name. Raises UsageError for an imatrix of another model."""
    rounded = {name: kind for name, kind in chosen.items() if kind is not None}
    where = shown(named.name)
    if not any(name in named.imatrix.tensors for name in rounded):
        some = next(iter(named.imatrix.tensors), "")
        raise UsageError(
            f"--imatrix {where}: none of its {len(named.imatrix.tensors)} entries ('{some}', …) is of a"
            " tensor of this model; it was made for another one"
        )
    found: dict[str, Floats] = {}
    for name, kind in rounded.items():
        means = named.imatrix.importance(name)
        shape = shapes[name]
        matrices, width = (shape[-3] if len(shape) > 2 else 1), shape[-1]
        if means is not None and means.size == matrices * width:
            # llama.cpp goes by the number of columns alone: the older form does not say where one
            # matrix ends.
            found[name] = means.reshape(matrices, width)
            if means.max() > MOST_IMPORTANCE:
                raise UsageError(
                    f"--imatrix {where}: says {means.max():g} of '{name}', which no input's square is;"
                    " make it anew with llama-imatrix"
                )
        elif means is not None and name not in _EMBEDDINGS:
            raise UsageError(
                f"--imatrix {where}: has {means.size:,} columns for '{name}', which has"
                f" {matrices * width:,} here; it was made for another model"
            )
        elif needs_importance(preset, name, kind):
            raise UsageError(
                f"--imatrix {where}: has no entry for '{name}', which would be garbage in {kind}"
                " without; make one that has, or take q3_k_m or larger"
            )
    return found


def _cut(text: str) -> str:
    return text.encode()[:_MOST_TEXT_BYTES].decode(errors="ignore")
