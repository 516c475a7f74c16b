"""When llama.cpp's cells may be shifted."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeinfer.backend import KvLayout, RuntimeSettings, SequenceStep, Step
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf


@pytest.mark.parametrize("layout", ["shared", "private"])
@pytest.mark.parametrize(
    ("head_dim", "kv_type", "can"),
    [(32, "f16", True), (64, "q8_0", True), (32, "q8_0", False), (96, "q4_0", False)],
)
def test_quantized_keys_that_are_not_rotated_are_never_shifted(
    tmp_path: Path, head_dim: int, kv_type: str, can: bool, layout: KvLayout
) -> None:
    """llama.cpp would end the process."""
    files = resolve_model(str(write_tiny_gguf(tmp_path / "tiny.gguf", head_dim=head_dim))).files
    settings = RuntimeSettings(
        context=256, sequences=2, kv_type_k=kv_type, kv_type_v=kv_type, kv_layout=layout
    )
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    assert runtime.facts.can.evict is can
    sequence = runtime.open()
    runtime.forward(Step([SequenceStep(sequence, list(range(3, 93)))]))
    if can:
        runtime.evict(sequence, 4, 27)
    else:
        with pytest.raises(ValueError, match="cannot be shifted"):
            runtime.evict(sequence, 4, 27)
    runtime.check_integrity()
    runtime.close()
