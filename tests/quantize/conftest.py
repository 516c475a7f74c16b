"""A matrix, and what its inputs were."""

from __future__ import annotations

import numpy as np
import pytest

ROWS, WIDTH = 24, 256


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((ROWS, WIDTH)).astype(np.float32) * 0.05


@pytest.fixture(scope="module")
def moment() -> np.ndarray:
    """Of inputs whose columns go together, and are of very different sizes."""
    random = np.random.default_rng(4)
    inputs = random.standard_normal((3000, WIDTH)) @ random.standard_normal((WIDTH, WIDTH))
    inputs *= np.exp(random.standard_normal(WIDTH))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)
