"""Matrices that a file holds in 8 or 4 bits, taken with their own codes: nothing is rounded again."""

from __future__ import annotations

import numpy as np
import torch

from edgeinfer_backends.torch.number_types import Held
from edgeinfer_backends.torch.quantized import GROUP, Int4Linear, Int8Linear, has_kernel
from edgeinfer_models.conversion.sources import SafetensorsSource, TensorSource

_ROWS = 1024  # read at a time
_MIDDLE = 8  # of 16 codes; what Int4Linear's offsets stand for


def packed_linear(
    source: TensorSource, name: str, held: Held, computed: torch.dtype, device: torch.device
) -> Int8Linear | Int4Linear | None:
    """None where the file has that matrix otherwise than the kernels of `held` want it. Raises
    ModelFileInvalid."""
    matrix = source.packed(name) if isinstance(source, SafetensorsSource) else None
    if matrix is None or not isinstance(source, SafetensorsSource):
        return None
    rows, width = matrix.shape
    if not has_kernel(rows, width, held):
        return None
    if held == "int8":
        if matrix.bits != 8 or matrix.group != width or matrix.biases is not None:
            return None
        codes = torch.empty(rows, width, dtype=torch.int8, device=device)
        scales = torch.empty(rows, dtype=torch.float32, device=device)
        for start in range(0, rows, _ROWS):
            stop = min(start + _ROWS, rows)
            part, factors, _ = source.codes(name, start, stop)
            codes[start:stop] = torch.from_numpy(part.view(np.int8))
            scales[start:stop] = torch.from_numpy(np.array(factors[:, 0]))
        return Int8Linear.of_codes(codes, scales, computed)
    if matrix.bits != 4 or matrix.group % GROUP:
        return None
    return _of_4_bits(source, name, (rows, width), matrix.group // GROUP, computed, device)


def _of_4_bits(
    source: SafetensorsSource,
    name: str,
    size: tuple[int, int],
    repeats: int,
    computed: torch.dtype,
    device: torch.device,
) -> Int4Linear:
    """repeats: of the kernel's groups in one of the file's."""
    rows, width = size
    numbers = torch.empty(rows, width, dtype=torch.int32, device=device)
    scales = torch.empty(rows, width // GROUP, dtype=torch.float32, device=device)
    offsets = torch.zeros_like(scales)
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        codes, factors, biases = source.codes(name, start, stop)
        wide = codes.astype(np.int32)
        if biases is None:
            wide += _MIDDLE
        else:
            offsets[start:stop] = torch.from_numpy((biases + _MIDDLE * factors).repeat(repeats, axis=1))
        numbers[start:stop] = torch.from_numpy(wide)
        scales[start:stop] = torch.from_numpy(factors.repeat(repeats, axis=1))
    return Int4Linear.of_codes(numbers, scales, offsets, computed)
