"""Matrices onto the grids that folders have: found, stored and read as those say."""

from __future__ import annotations

import numpy as np
import pytest

from edgeinfer.quantize.error_feedback import Feedback, FeedbackSettings, output_error
from edgeinfer.quantize.folder_forms import FolderForm, Layout
from edgeinfer_models.conversion import affine, symmetric
from edgeinfer_models.conversion.floats import from_float32, to_float32
from tests.quantize.conftest import ROWS, WIDTH

FORMS = [
    pytest.param(layout, bits, group, dtype, id=f"{layout} {bits} {group} {dtype}")
    for layout, bits, group, dtype in (
        ("mlx", 4, 32, "F16"),
        ("mlx", 4, 64, "BF16"),
        ("mlx", 4, 128, "F32"),
        ("mlx", 8, 64, "F16"),
        ("compressed", 4, 32, "BF16"),
        ("compressed", 4, 128, "F16"),
        ("compressed", 8, WIDTH, "F32"),
    )
]


def to_nearest(layout: Layout, bits: int, group: int, dtype: str, weight: np.ndarray) -> np.ndarray:
    """What folders get without text, as it is read."""
    if layout == "mlx":
        codes, *found = affine.round_to_nearest(weight, bits, group)
        scale, bias = (to_float32(from_float32(each, dtype), dtype) for each in found)
    else:
        signed, scale = symmetric.round_to_nearest(weight, "int4" if bits == 4 else "int8", group, dtype)
        codes, bias = signed, np.zeros_like(scale)
    groups = codes.astype(np.float32).reshape(len(weight), -1, group)
    return (groups * scale[:, :, None] + bias[:, :, None]).reshape(weight.shape)


@pytest.mark.parametrize(("layout", "bits", "group", "dtype"), FORMS)
def test_outputs_change_less_than_with_rounding_to_nearest(
    layout: Layout, bits: int, group: int, dtype: str, weight: np.ndarray, moment: np.ndarray
) -> None:
    form = FolderForm(layout, bits, group, dtype)
    nearest = output_error(weight, to_nearest(layout, bits, group, dtype, weight), moment)
    weighted = form.numbers(form.rounded(weight, np.diag(moment).copy()))
    assert output_error(weight, weighted, moment) < nearest
    blocks = Feedback(moment, FeedbackSettings(shrinkage=0.0)).quantize(weight, form)
    assert np.array_equal(form.pack(form.parts(blocks)), blocks)
    assert output_error(weight, form.numbers(blocks), moment) < 0.6 * nearest


@pytest.mark.parametrize(("layout", "bits", "group", "dtype"), FORMS)
def test_scales_are_those_that_the_float_type_holds(
    layout: Layout, bits: int, group: int, dtype: str, weight: np.ndarray, moment: np.ndarray
) -> None:
    form = FolderForm(layout, bits, group, dtype)
    parts = form.parts(Feedback(moment).quantize(weight, form))
    assert parts.codes.max() < 2**bits
    assert parts.scale.shape == (ROWS, WIDTH // group)
    for values in (parts.scale, parts.offset):
        assert np.array_equal(values, to_float32(from_float32(values, dtype), dtype))
    if layout == "compressed":
        assert (parts.scale > 0).all() and not parts.offset.any()


@pytest.mark.parametrize(("layout", "bits", "group", "dtype"), FORMS)
def test_numbers_without_a_spread_are_no_error(
    layout: Layout, bits: int, group: int, dtype: str, moment: np.ndarray
) -> None:
    form = FolderForm(layout, bits, group, dtype)
    for value in (0.0, 0.25, -0.25):
        flat = np.full((4, WIDTH), value, np.float32)
        for blocks in (
            form.rounded(flat, np.ones(WIDTH, np.float32)),
            Feedback(moment).quantize(flat, form),
        ):
            assert np.abs(form.numbers(blocks) - flat).max() <= 2.0**-10
    nothing = Feedback(np.zeros_like(moment)).quantize(flat, form)
    assert np.isfinite(form.numbers(nothing)).all()


def test_a_range_too_large_for_f16_is_left_at_what_can_be_stored() -> None:
    form = FolderForm("mlx", 4, 32, "F16")
    rows = np.linspace(-60_000, 60_000, 64, dtype=np.float32).reshape(1, -1)
    numbers = form.numbers(form.rounded(rows, np.ones(64, np.float32)))
    assert np.abs(numbers - rows).max() < 3000
