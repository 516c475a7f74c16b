"""What decides whether a snapshot of llama.cpp's may be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeinfer.backend import KvLayout, RuntimeSettings, SequenceStep, Step
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf

HEAD_DIM = 32
LONG_ROPE = {
    "llama.rope.scaling.type": "longrope",
    "llama.rope.scaling.original_context_length": 512,
}
FACTORS = {
    "rope_factors_long.weight": np.linspace(2.0, 9.0, HEAD_DIM // 2, dtype=np.float32),
    "rope_factors_short.weight": np.ones(HEAD_DIM // 2, dtype=np.float32),
}


@pytest.mark.parametrize(
    ("layout", "sequences"), [("private", 1), ("private", 2), ("shared", 1), ("shared", 2)]
)
def test_keys_rotated_by_other_factors_have_another_identity(
    tmp_path: Path, layout: KvLayout, sequences: int
) -> None:
    """A model with long and short RoPE factors takes them by the size of the context."""
    path = write_tiny_gguf(
        tmp_path / "long.gguf", head_dim=HEAD_DIM, metadata=LONG_ROPE, tensors=FACTORS
    )
    files = resolve_model(str(path)).files
    found = []
    for context in (128, 256, 2048, 4096):
        settings = RuntimeSettings(context=context, sequences=sequences, kv_layout=layout)
        runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
        sequence = runtime.open()
        runtime.forward(Step([SequenceStep(sequence, list(range(3, 83)))]))
        found.append((dict(runtime.identity()), runtime.snapshot(sequence, 0, 80)))
        runtime.close()
    identities, snapshots = zip(*found, strict=True)
    assert snapshots[2] == snapshots[3] and identities[2] == identities[3]
    assert snapshots[0] != snapshots[2] and identities[0] != identities[2]
    for one, other in ((0, 1), (1, 2)):  # (a small context may have cells for more than it)
        assert (snapshots[one] == snapshots[other]) == (identities[one] == identities[other])


def test_an_ordinary_model_keeps_its_identity_at_every_context(tmp_path: Path) -> None:
    files = resolve_model(str(write_tiny_gguf(tmp_path / "tiny.gguf", context=4096))).files
    identities = []
    for context in (256, 1024, 4096):
        runtime = get_backend("llamacpp").load(files, RuntimeSettings(context=context), lambda _: True)
        identities.append(dict(runtime.identity()))
        runtime.close()
    assert identities[0] == identities[1] == identities[2]
