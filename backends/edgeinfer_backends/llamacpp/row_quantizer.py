"""Rows of numbers as blocks of ggml's types, by its own functions: what llama-quantize writes."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgeinfer.backend import MOST_IMPORTANCE
from edgeinfer_backends.llamacpp.library import ggml, library
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME, row_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Blocks = npt.NDArray[np.uint8]

# Of a tensor that several threads share; each thread takes whole rows.
_LEAST_ELEMENTS = 2**16
# No type's scale and numbers reach further; ggml's sums of squares overflow some way beyond it, where it
# finds no block that fits and ends the process.
_MOST = 1e9
# ggml has no function for them, or asserts an importance matrix where there is none.
_NOT_WRITTEN = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "NVFP4")
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")


class GgmlRows:
    """Implements `edgeinfer.backend.RowQuantizer`. Thread-safe."""

    def __init__(self, threads: int) -> None:
        """threads: 0: one for each core."""
        library()
        symbols = ggml()
        # GGML_API size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst,
        #     int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix)  (ggml.h, 0.3.36)
        symbols.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        symbols.ggml_quantize_chunk.restype = ctypes.c_size_t
        # GGML_API void ggml_quantize_init(enum ggml_type type)
        symbols.ggml_quantize_init.argtypes = [ctypes.c_int]
        symbols.ggml_quantize_init.restype = None
        self._symbols = symbols
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, "edgeinfer-quantize")
        self._threads = threads or os.cpu_count() or 1

    def quantize(self, type_name: str, rows: Floats, importance: Floats | None = None) -> Blocks:
        import numpy as np

        kind = GGML_TYPES_BY_NAME.get(type_name)
        if kind is None or kind.block == 1 or type_name in _NOT_WRITTEN:
            raise ValueError(f"{type_name} is no type that rows are quantized to")
        if rows.ndim != 2 or not rows.size or rows.shape[1] % kind.block:
            raise ValueError(
                f"rows of the shape {list(rows.shape)} are not whole blocks of {kind.block}"
            )
        # A NaN is neither; a comparison with it is false.
        if not (rows.min() >= -_MOST and rows.max() <= _MOST):
            raise ValueError(f"rows hold a number that is not finite, or larger than {_MOST:g}")
        if importance is None and type_name in NEED_IMPORTANCE:
            raise ValueError(f"{type_name} needs the importance of each column")
        values = np.ascontiguousarray(rows, dtype=np.float32)
        weights = _checked(importance, rows.shape[1])
        found = np.zeros((rows.shape[0], row_bytes(type_name, rows.shape[1])), np.uint8)
        # Tables are made once, and not by several threads at a time.
        self._symbols.ggml_quantize_init(kind.id)
        parts = 1 if rows.size < _LEAST_ELEMENTS else min(self._threads, rows.shape[0])
        edges = [rows.shape[0] * part // parts for part in range(parts + 1)]

        def work(first: int, last: int) -> None:
            # Both arrays outlive the call: it waits below. ctypes gives up the interpreter's lock.
            self._symbols.ggml_quantize_chunk(
                kind.id,
                values[first:last].ctypes.data,
                found[first:last].ctypes.data,
                0,
                last - first,
                rows.shape[1],
                None if weights is None else weights.ctypes.data,
            )

        spans = list(pairwise(edges))
        if parts == 1:
            work(*spans[0])
        else:
            list(self._pool.map(lambda span: work(*span), spans))
        return found

    def close(self) -> None:
        self._pool.shutdown()


def _checked(importance: Floats | None, width: int) -> Any:
    import numpy as np

    if importance is None:
        return None
    is_sound = importance.shape == (width,) and (
        importance.min() >= 0 and importance.max() <= MOST_IMPORTANCE
    )
    if not is_sound:
        raise ValueError(
            f"importance is one number from 0 to {MOST_IMPORTANCE:g} for each of {width} columns"
        )
    return np.ascontiguousarray(importance, dtype=np.float32)
