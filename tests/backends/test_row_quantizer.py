"""Rows as ggml's blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeinfer.registry import get_backend

ROWS = np.random.default_rng(0).normal(size=(300, 512)).astype(np.float32)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS"])
def test_threads_change_nothing(type_name: str) -> None:
    found = []
    for threads in (1, 3):
        rows = get_backend("llamacpp").row_quantizer(threads)
        found.append(rows.quantize(type_name, ROWS))
        rows.close()
    assert np.array_equal(*found)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rows = get_backend("llamacpp").row_quantizer(1)
    whole = rows.quantize("Q4_K", ROWS)
    assert np.array_equal(rows.quantize("Q4_K", ROWS[7:8]), whole[7:8])
    assert np.array_equal(rows.quantize("Q4_K", ROWS[::2]), whole[::2]), "of rows that lie apart"
    rows.close()


def test_importance_moves_the_rounding_to_where_it_matters_less() -> None:
    import gguf

    rows = get_backend("llamacpp").row_quantizer(1)
    importance = np.ones(512, np.float32)
    importance[:32] = 1e-6
    importance[32:64] = 1e4
    errors = []
    for weights in (None, importance):
        blocks = rows.quantize("Q4_K", ROWS, weights)
        back = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
        errors.append(float(((back - ROWS)[:, 32:64] ** 2).mean()))
    assert errors[1] < errors[0]
    rows.close()


@pytest.mark.parametrize(
    ("type_name", "rows", "importance"),
    [
        ("F16", ROWS, None),
        ("Q8_K", ROWS, None),
        ("nonsense", ROWS, None),
        ("Q4_K", ROWS[:, :100], None),
        ("Q4_0", ROWS[0], None),
        ("Q4_0", ROWS[:0], None),
        ("Q4_0", np.full((2, 32), np.nan, np.float32), None),
        ("Q4_0", np.full((2, 32), np.inf, np.float32), None),
        ("Q4_0", np.full((2, 32), 2e9, np.float32), None),
        ("IQ2_XXS", ROWS, None),
        ("Q4_0", ROWS, np.ones(511, np.float32)),
        ("Q4_0", ROWS, -np.ones(512, np.float32)),
        ("Q4_0", ROWS, np.full(512, np.nan, np.float32)),
        ("IQ2_XS", ROWS, np.full(512, 1e37, np.float32)),
    ],
)
def test_what_ggml_would_abort_on_never_reaches_it(type_name: str, rows: Any, importance: Any) -> None:
    quantizer = get_backend("llamacpp").row_quantizer(1)
    with pytest.raises(ValueError):
        quantizer.quantize(type_name, rows, importance)
    quantizer.close()


@pytest.mark.parametrize(
    "type_name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M", "IQ3_XXS", "Q4_K"]
)
@pytest.mark.parametrize("size", [1.0, 9e8])
def test_the_largest_and_smallest_importance_end_in_blocks(type_name: str, size: float) -> None:
    """ggml ends the process where a sum overflows."""
    quantizer = get_backend("llamacpp").row_quantizer(1)
    rows = np.clip(ROWS[:4], -1.0, 1.0) * np.float32(size)
    random = np.random.default_rng(2)
    for importance in (
        np.zeros(512, np.float32),
        np.full(512, 1e15, np.float32),
        np.full(512, 1e-45, np.float32),
        np.where(np.arange(512) % 32, 0.0, 1e15).astype(np.float32),
        10.0 ** random.uniform(-45.0, 15.0, 512).astype(np.float32),
    ):
        assert quantizer.quantize(type_name, rows, importance).size
    quantizer.close()
