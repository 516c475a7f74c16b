"""Every family on an NVIDIA GPU: the logits that the processor computes, read as a prompt and decoded
step by step (as recorded graphs where there are some). Skipped where there is no such device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer_models.conversion.model import source_of_folder
from tests.backends.test_torch_families import CONTEXT, MORE, torch_logits
from tests.fixtures_families import CONFIGS, full, shape_of, write_folder

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

PROMPT, DECODED = 24, 24


def runtime_on_cuda(folder: Path, *, heavy_hitters: bool = False, compiled: bool = False) -> Any:
    from edgeinfer_backends.torch.number_types import NumberTypes
    from edgeinfer_backends.torch.runtime import TorchRuntime
    from edgeinfer_backends.torch.weights import load_decoder

    cuda = torch.device("cuda")
    decoder = load_decoder(source_of_folder(folder), torch.float32, cuda, "plain", lambda _: True)
    settings = RuntimeSettings(
        context=CONTEXT,
        sequences=2,
        logit_rows=64,
        kv_type_k="f32",
        kv_type_v="f32",
        heavy_hitters=heavy_hitters,
        compiled=compiled,
        gpu_layers=-1,
    )
    no_tokenizer: Any = None
    types = NumberTypes("f32", "plain")
    return TorchRuntime(decoder, no_tokenizer, settings, cuda, torch.float32, types, {})


@pytest.mark.parametrize("config", [*CONFIGS.values(), *MORE.values()], ids=[*CONFIGS, *MORE])
@pytest.mark.parametrize("heavy_hitters", [False, True], ids=["graphs", "counted"])
def test_a_gpu_computes_what_the_processor_does(
    config: Mapping[str, Any], heavy_hitters: bool, tmp_path: Path
) -> None:
    config = {**full(config), "pad_token_id": 0}
    folder = write_folder(tmp_path / "model", config)
    vocabulary = shape_of(config).vocab_size
    rng = np.random.default_rng(5)
    tokens = [int(token) for token in rng.integers(0, vocabulary, PROMPT + DECODED)]
    wanted = torch_logits(folder, tokens, CONTEXT)
    runtime = runtime_on_cuda(folder, heavy_hitters=heavy_hitters)
    try:
        sequence = runtime.open()
        step = runtime.forward(Step([SequenceStep(sequence, tokens[:PROMPT], "all")]))
        found = [runtime.logits(step.starts[0] + row).copy() for row in range(PROMPT)]
        for token in tokens[PROMPT:]:
            step = runtime.forward(Step([SequenceStep(sequence, [token])]))
            found.append(runtime.logits(step.starts[0]).copy())
    finally:
        runtime.close()
    # TF32 is off by default for products; reductions are in another order.
    assert np.abs(np.stack(found) - wanted).max() < 1e-3
