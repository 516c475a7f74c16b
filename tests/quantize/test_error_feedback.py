"""Matrices rounded so that what they compute changes least."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edgeinfer.backend import RowQuantizer
from edgeinfer.quantize.error_feedback import Feedback, FeedbackSettings, output_error
from edgeinfer.quantize.forms import GgmlForm
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.ggml_grids import GRIDS, pack, unpack
from tests.quantize.conftest import ROWS, WIDTH


@pytest.fixture(scope="module")
def rows() -> Iterator[RowQuantizer]:
    found = get_backend("llamacpp").row_quantizer(1)
    yield found
    found.close()


def numbers(name: str, blocks: np.ndarray) -> np.ndarray:
    return unpack(name, blocks).numbers(GRIDS[name])


@pytest.mark.parametrize("name", GRIDS)
def test_outputs_change_less_than_with_weighted_rounding(
    name: str, rows: RowQuantizer, weight: np.ndarray, moment: np.ndarray
) -> None:
    weighted = numbers(name, rows.quantize(name, weight, np.diag(moment).copy()))
    feedback = Feedback(moment, FeedbackSettings(shrinkage=0.0))
    blocks = feedback.quantize(weight, GgmlForm(name, rows))
    assert np.array_equal(pack(name, unpack(name, blocks)), blocks)  # a plain tensor of that type
    found = output_error(weight, numbers(name, blocks), moment)
    assert found < 0.7 * output_error(weight, weighted, moment)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ4_XS"])
def test_each_sweep_lowers_the_error(
    name: str, rows: RowQuantizer, weight: np.ndarray, moment: np.ndarray
) -> None:
    errors = []
    for sweeps in range(4):
        settings = FeedbackSettings(shrinkage=0.0, damping=1e-4, sweeps=sweeps)
        blocks = Feedback(moment, settings).quantize(weight, GgmlForm(name, rows))
        errors.append(output_error(weight, numbers(name, blocks), moment))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0]


def test_numbers_that_lie_on_the_grid_stay(rows: RowQuantizer, moment: np.ndarray) -> None:
    random = np.random.default_rng(5).standard_normal((ROWS, WIDTH)).astype(np.float32)
    blocks = rows.quantize("Q8_0", random)
    on_grid = numbers("Q8_0", blocks)
    found = Feedback(moment).quantize(on_grid, GgmlForm("Q8_0", rows))
    assert output_error(on_grid, numbers("Q8_0", found), moment) < 1e-7


@pytest.mark.parametrize("seen", ["nothing", "one input", "half of the columns"])
def test_little_calibration_is_no_error(seen: str, rows: RowQuantizer, weight: np.ndarray) -> None:
    moment = np.zeros((WIDTH, WIDTH), np.float32)
    if seen == "one input":
        moment = np.outer(weight[0], weight[0])
    elif seen == "half of the columns":
        moment[np.diag_indices(WIDTH // 2)] = 1.0
    found = numbers("Q4_0", Feedback(moment).quantize(weight, GgmlForm("Q4_0", rows)))
    plain = numbers("Q4_0", rows.quantize("Q4_0", weight))
    assert np.isfinite(found).all()
    assert np.square(found - weight).sum() < 30 * np.square(plain - weight).sum()


def test_rows_of_zeros_stay_zeros(rows: RowQuantizer, moment: np.ndarray) -> None:
    for name in GRIDS:
        blocks = Feedback(moment).quantize(np.zeros((4, WIDTH), np.float32), GgmlForm(name, rows))
        assert not numbers(name, blocks).any(), name
