"""The starter in a folder for mlx-lm, straight from its GGUF file: what mlx-lm makes of its plain
folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeinfer.quantize.folders import FolderOptions, plan_folder, write
from edgeinfer_backends.mlx import MlxBackend
from edgeinfer_models.conversion.conversion import convert, prepare_conversion
from edgeinfer_models.conversion.model import source_of_gguf

FOUND = MlxBackend().probe()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(not FOUND.usable, reason=f"mlx: {FOUND.reason}"),
]


def test_it_is_what_mlx_lm_makes_of_the_plain_folder_and_answers(starter: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    mx.set_default_device(mx.cpu)
    model = source_of_gguf(starter)
    # Scales of 16 bits are slow on the processor.
    convert(prepare_conversion(model, "safetensors", "F32", tmp_path / "plain"))
    options = FolderOptions(scale_type="f32")
    write(plan_folder(model, starter, "mlx-4bit", None, tmp_path / "ours", options))
    theirs, _ = quantize_model(*load_model(tmp_path / "plain", lazy=True), 64, 4)
    wanted = dict(tree_flatten(theirs.parameters()))
    found = mx.load(str(tmp_path / "ours" / "model.safetensors"))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(np.array(found[name]), np.array(values)), name
    ours, tokenizer = mlx_lm.load(str(tmp_path / "ours"))[:2]
    prompt = tokenizer.encode("<|im_start|>user\nName a color.<|im_end|>\n<|im_start|>assistant\n")
    answers = [mlx_lm.generate(each, tokenizer, prompt, max_tokens=8) for each in (ours, theirs)]
    assert answers[0] == answers[1] and answers[0].split()
