"""Stored predictions of the real starter, beside its KL worked out in full."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.predictions import CHUNK, log_softmax
from edgeinfer.quality.reference import agreement_with, write_reference
from edgeinfer.quality.windows import predictions, windows_of
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

pytestmark = pytest.mark.model


def load(path: Path, kv_type: str = "f16") -> Runtime:
    settings = RuntimeSettings(
        context=256,
        logit_rows=CHUNK,
        kv_type_k=kv_type,
        kv_type_v=kv_type,
        threads=1,
        threads_batch=1,
        gpu_layers=0,
    )
    return get_backend("llamacpp").load(ModelFiles("starter", (path,), "gguf"), settings, lambda _: True)


@pytest.mark.parametrize("kv_type", ["q4_0", "q8_0"])
def test_what_was_stored_gives_the_divergence_that_all_logits_give(starter: Path, kv_type: str) -> None:
    # (a quantized KV cache stands for quantized weights: another model, a little away and farther)
    reference, other = load(starter), load(starter, kv_type)
    try:
        windows = windows_of(reference, measured_text(None), 512, size=256)
        file = io.BytesIO()
        found = agreement_with(write_reference(file, reference, windows), other, windows)
        same = agreement_with(write_reference(io.BytesIO(), reference, windows), reference, windows)
        exact = []
        for window in windows:
            sides = [
                np.concatenate([logits for logits, _ in predictions(runtime, window, 0, CHUNK)])
                for runtime in (reference, other)
            ]
            p, q = map(log_softmax, sides)
            exact.append((np.exp(p) * (p - q)).sum(axis=-1))
    finally:
        reference.close()
        other.close()
    wanted = np.concatenate(exact)
    assert abs(found.mean_kl / wanted.mean() - 1) < 0.01
    assert abs(found.median_kl / np.median(wanted) - 1) < 0.02
    assert (same.mean_kl, same.top1) == (0.0, 1.0), "the same steps give the same logits"
    assert len(file.getvalue()) < 3000 * len(wanted)
