"""Numbers of 16 bits as float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeinfer_models.conversion.floats import to_float32

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE = HALVES[np.isfinite(HALVES)]


@pytest.mark.parametrize(
    "halves",
    [HALVES, FINITE, FINITE[:1024], FINITE[::3], FINITE[:600].reshape(20, 30).T, FINITE[:0]],
    ids=["all", "finite", "subnormal", "apart", "turned", "none"],
)
def test_every_f16_number_becomes_the_same_number_bit_for_bit(halves: Any) -> None:
    found = to_float32(halves, "F16")
    assert found.dtype == np.float32 and found.shape == halves.shape
    assert np.array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))
