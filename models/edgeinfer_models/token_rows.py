"""Token embeddings read out of a GGUF file a few at a time: what a model that has no vocabulary of its
own is fed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.sources import places_of
from edgeinfer_models.gguf_header import GgufHeader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Array = npt.NDArray[Any]

_NAME = "token_embd.weight"
_PLAIN = {"F32": "<f4", "F16": "<f2"}


class TokenRows:
    """Of one model, whose file is mapped: it must stay as it is. Thread-safe."""

    def __init__(self, header: GgufHeader) -> None:
        """Raises ModelFileInvalid, UnsupportedModel, OSError."""
        import gguf
        import numpy as np

        tensor = header.tensor(_NAME)
        if tensor is None or len(tensor.shape) != 2:
            raise ModelFileInvalid(f"{header.path}: has no token embeddings")
        self.width, self.num_tokens = tensor.shape
        self._kind = gguf.GGMLQuantizationType(tensor.ggml_type)
        path, offset = places_of(header)[_NAME]
        held_as = _PLAIN.get(tensor.type_name, "u1")
        columns = tensor.num_bytes // self.num_tokens // np.dtype(held_as).itemsize
        shape = (self.num_tokens, columns)
        self._rows: Array = np.memmap(path, held_as, "r", offset, shape)
        self._is_plain = tensor.type_name in _PLAIN
        try:
            self([0])
        except NotImplementedError:
            raise UnsupportedModel(
                f"{header.path}: its token embeddings ({tensor.type_name}) cannot be read back"
            ) from None

    def __call__(self, tokens: Sequence[int]) -> Floats:
        """(n, width). The tokens must be the model's."""
        import gguf
        import numpy as np

        rows = np.asarray(self._rows[list(tokens)])
        if self._is_plain:
            return rows.astype(np.float32)
        found: Floats = gguf.quants.dequantize(rows, self._kind)
        return found
