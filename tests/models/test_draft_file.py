"""Draft models made of a model's first layers and an exit: what they are made of, that they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeinfer_models.conversion.draft_file import write_draft
from edgeinfer_models.exit_file import ExitFile, read_exit_file
from edgeinfer_models.gguf_header import GgufHeader, read_gguf_header
from tests.fixtures_exits import data_of, write_own_exit
from tests.fixtures_families import llama_cpp_logits
from tests.fixtures_gguf import write_tiny_gguf

TOKENS = [5, 9, 40, 11, 7, 200, 31]
KEPT = np.arange(3, 250, 3, dtype=np.int32)


@pytest.fixture
def model(tmp_path: Path) -> GgufHeader:
    return read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf", layers=3, weight_type="Q8_0"))


@pytest.fixture
def last_layer(model: GgufHeader, tmp_path: Path) -> ExitFile:
    """An exit after all layers but the last, which is the model's own last layer: the model itself."""
    path = write_own_exit(model.path, tmp_path / "tiny.exit.gguf", KEPT)
    return read_exit_file(path)


def test_with_the_whole_head_it_is_a_model_that_llama_cpp_runs(
    model: GgufHeader, last_layer: ExitFile, tmp_path: Path
) -> None:
    draft = tmp_path / "draft.gguf"
    write_draft(draft, model, last_layer, has_whole_head=True)
    assert np.array_equal(llama_cpp_logits(draft, TOKENS), llama_cpp_logits(model.path, TOKENS))


def test_a_head_of_the_kept_tokens_has_their_rows(
    model: GgufHeader, last_layer: ExitFile, tmp_path: Path
) -> None:
    draft = tmp_path / "draft.gguf"
    write_draft(draft, model, last_layer, has_whole_head=False)
    found = read_gguf_header(draft)
    assert found.get_int("llama.vocab_size") == len(KEPT)
    assert found.get_str("tokenizer.ggml.model") == "no_vocab"
    assert found.get_length("tokenizer.ggml.tokens") is None
    tensor = found.tensor("token_embd.weight")
    assert tensor is not None and tensor.shape == (64, len(KEPT))
    whole = np.frombuffer(data_of(model, "token_embd.weight"), np.uint8)
    rows = whole.reshape(-1, tensor.num_bytes // len(KEPT))
    assert data_of(found, "token_embd.weight") == rows[KEPT].tobytes()
    for name in ("blk.0.attn_q.weight", "blk.2.ffn_down.weight", "output_norm.weight"):
        assert data_of(found, name) == data_of(model, name)
