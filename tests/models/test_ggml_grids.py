"""Blocks of ggml's types, taken apart and put together."""

from __future__ import annotations

import numpy as np
import pytest

from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.ggml_grids import GRIDS, Parts, pack, unpack


def some_blocks(name: str, rows: int = 6, width: int = 512) -> np.ndarray:
    random = np.random.default_rng(3)
    quantizer = get_backend("llamacpp").row_quantizer(1)
    try:
        return quantizer.quantize(name, random.standard_normal((rows, width)).astype(np.float32))
    finally:
        quantizer.close()


@pytest.mark.parametrize("name", GRIDS)
def test_blocks_come_back_bit_for_bit(name: str) -> None:
    blocks = some_blocks(name)
    assert np.array_equal(pack(name, unpack(name, blocks)), blocks)


@pytest.mark.parametrize("name", GRIDS)
def test_any_bytes_that_hold_finite_scales_come_back(name: str) -> None:
    random = np.random.default_rng(5)
    blocks = random.integers(0, 256, some_blocks(name).shape, dtype=np.uint8)
    parts = unpack(name, blocks)
    if not (np.isfinite(parts.unit).all() and np.isfinite(parts.offset_unit).all()):
        with pytest.raises(ValueError, match="too large"):
            pack(name, parts)
        blocks = some_blocks(name)
    assert np.array_equal(pack(name, unpack(name, blocks)), blocks)


@pytest.mark.parametrize("name", GRIDS)
def test_numbers_are_those_that_the_gguf_library_reads(name: str) -> None:
    import gguf
    from gguf.quants import dequantize

    blocks = some_blocks(name)
    wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = unpack(name, blocks).numbers(GRIDS[name])
    assert np.allclose(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", GRIDS)
def test_what_a_type_cannot_hold_is_refused(name: str) -> None:
    parts = unpack(name, some_blocks(name))
    huge = Parts(parts.unit + 1e6, parts.step, parts.offset_unit, parts.offset_step, parts.codes)
    with pytest.raises(ValueError, match="too large for F16"):
        pack(name, huge)
    half = Parts(parts.unit, parts.step + 0.5, parts.offset_unit, parts.offset_step, parts.codes)
    with pytest.raises(ValueError, match="step"):
        pack(name, half)
    if len(GRIDS[name].levels) < 256:
        codes = parts.codes.copy()
        codes[0, 0] = len(GRIDS[name].levels)
        with pytest.raises(ValueError, match="levels"):
            pack(name, Parts(parts.unit, parts.step, parts.offset_unit, parts.offset_step, codes))
    with pytest.raises(ValueError, match="whole blocks"):
        unpack(name, some_blocks(name)[:, :-1])
