"""Token embeddings read out of a GGUF file a few at a time: what a model that has no vocabulary of its
own is fed with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.ggml_types import row_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer_models.gguf_header import GgufHeader

    Floats = npt.NDArray[np.float32]
    Array = npt.NDArray[Any]

_NAME = "token_embd.weight"
_PLAIN = {"F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class RowsPlace:
    """Where a model's embeddings lie: of `num_tokens` tokens, `width` numbers each, in rows of a type of
    ggml's."""

    path: Path
    offset: int
    type_name: str
    width: int
    num_tokens: int

    @staticmethod
    def of(header: GgufHeader) -> RowsPlace:
        """Raises ModelFileInvalid."""
        from edgeinfer_models.conversion.sources import places_of

        tensor = header.tensor(_NAME)
        if tensor is None or len(tensor.shape) != 2:
            raise ModelFileInvalid(f"{header.path}: has no token embeddings")
        path, offset = places_of(header)[_NAME]
        return RowsPlace(path, offset, tensor.type_name, *tensor.shape)


class TokenRows:
    """Of one model, whose file must stay as it is. Read, not mapped: pages that were looked at once
    would stay in the process's memory, sixteen for each row. Thread-safe."""

    def __init__(self, place: RowsPlace) -> None:
        """Raises ModelFileInvalid, UnsupportedModel, OSError."""
        self.width, self.num_tokens = place.width, place.num_tokens
        self._path, self._offset, self._type = place.path, place.offset, place.type_name
        self._row_bytes = row_bytes(place.type_name, place.width)
        self._lock = threading.Lock()
        self._file = self._path.open("rb", buffering=0)
        try:
            self([0])
        except NotImplementedError:
            self.close()
            raise UnsupportedModel(
                f"{place.path}: its token embeddings ({self._type}) cannot be read back"
            ) from None
        except BaseException:
            self.close()
            raise

    def __call__(self, tokens: Sequence[int]) -> Floats:
        """(n, width). The tokens must be the model's. Raises ModelFileInvalid where the file is no
        longer whole."""
        import numpy as np

        from edgeinfer_models.conversion.ggml_grids import GRIDS, unpack

        raw = b"".join(self._raw(token) for token in tokens)
        if self._type in _PLAIN:
            numbers = np.frombuffer(raw, _PLAIN[self._type])
            return numbers.astype(np.float32).reshape(len(tokens), self.width)
        rows = np.frombuffer(raw, np.uint8).reshape(len(tokens), self._row_bytes)
        if self._type in GRIDS:  # without the library, which takes megabytes of memory
            return unpack(self._type, rows).numbers(GRIDS[self._type])
        import gguf

        found: Floats = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self._type.upper()])
        return found

    def close(self) -> None:
        self._file.close()

    def _raw(self, token: int) -> bytes:
        with self._lock:
            self._file.seek(self._offset + token * self._row_bytes)
            found = self._file.read(self._row_bytes)
        if len(found) != self._row_bytes:
            raise ModelFileInvalid(f"{self._path}: has become shorter; load the model again")
        return found
