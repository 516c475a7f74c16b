"""The starter's weights and vocabulary, put into a Hugging Face folder: MLX agrees with llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.registry import get_backend
from edgeinfer_backends.mlx import MlxBackend
from edgeinfer_models.model_files import ModelFiles

FOUND = MlxBackend().probe()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(not FOUND.usable, reason=f"mlx: {FOUND.reason}"),
]
SETTINGS = RuntimeSettings(context=512, kv_type_k="f32", kv_type_v="f32", threads=1, threads_batch=1)
TEXT = (
    "The river Rhine begins in the Swiss Alps and flows through Germany and the Netherlands before it"
    " reaches the North Sea. Along its course there are many old cities, castles and vineyards, and for"
    " centuries ships have carried goods between them."
)
TEXTS = (
    TEXT,
    "In 1984, 12345 people paid $6.78 each; that's 50% more!",
    "naïve café — 日本語のテキスト 😀 👩‍👩‍👧‍👦",
    "def f(x):\n    return x  # two\n\n\n\tthree   spaces   ",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing ",
    "I'll we've YOU'RE don't",
)
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def folder(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("starter") / "smollm2"
    path.mkdir()
    _convert(starter, path)
    yield path
    shutil.rmtree(path)  # half a gigabyte


@pytest.fixture(scope="module")
def on_llamacpp(starter: Path) -> Iterator[Runtime]:
    files = ModelFiles("starter", (starter,), "gguf")
    runtime = get_backend("llamacpp").load(files, SETTINGS, lambda done: True)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def on_mlx(folder: Path) -> Iterator[Runtime]:
    files = ModelFiles("starter", (folder / "model.safetensors",), "safetensors")
    runtime = get_backend("mlx").load(files, SETTINGS, lambda done: True)
    yield runtime
    runtime.close()


@pytest.mark.parametrize("parse_special", [False, True])
def test_both_tokenizers_give_the_same_ids(
    on_llamacpp: Runtime, on_mlx: Runtime, parse_special: bool
) -> None:
    theirs, ours = on_llamacpp.tokenizer, on_mlx.tokenizer
    for text in TEXTS:
        expected = theirs.encode(text, add_special=True, parse_special=parse_special)
        assert ours.encode(text, add_special=True, parse_special=parse_special) == expected, text
        assert ours.decode(expected) == theirs.decode(expected)


def test_both_tokenizers_say_the_same_of_every_token(on_llamacpp: Runtime, on_mlx: Runtime) -> None:
    theirs, ours = on_llamacpp.tokenizer, on_mlx.tokenizer
    assert (ours.vocab_size, ours.bos, ours.eos) == (theirs.vocab_size, theirs.bos, theirs.eos)
    assert ours.adds_bos == theirs.adds_bos
    for token in range(ours.vocab_size):
        assert ours.piece(token) == theirs.piece(token), token
        assert ours.text(token) == theirs.text(token), token
        assert ours.is_control(token) == theirs.is_control(token), token


def test_the_predictions_are_those_of_llamacpp(on_llamacpp: Runtime, on_mlx: Runtime) -> None:
    """llama.cpp rounds activations to 8 bits for 4-bit weights, MLX runs them as float32: measured mean
    KL 0.003 to 0.006."""
    tokens = on_mlx.tokenizer.encode(TEXT, add_special=False, parse_special=False)
    theirs, ours = (_log_probabilities(runtime, tokens) for runtime in (on_llamacpp, on_mlx))
    divergence = np.sum(np.exp(ours) * (ours - theirs), axis=1)
    assert divergence.mean() < 0.02
    assert np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1)) > 0.85
    assert ours[np.arange(len(tokens) - 1), tokens[1:]].mean() > -4.0, "this is a text it should know"


def _log_probabilities(runtime: Runtime, tokens: list[int]) -> Any:
    sequence = runtime.open()
    result = runtime.forward(Step([SequenceStep(sequence, tokens, "all")]))
    rows = np.stack([runtime.logits(result.starts[0] + i) for i in range(len(tokens))]).astype(
        np.float64
    )
    runtime.free(sequence)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def _convert(gguf_path: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_path)
    heads = {"attn_q": 9, "attn_k": 3}
    weights = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name in heads:  # llama.cpp keeps the two halves of a rotated pair side by side
            rows, columns = values.shape
            paired = values.reshape(heads[name], rows // heads[name] // 2, 2, columns)
            values = paired.swapaxes(1, 2).reshape(rows, columns)
        where = f"model.layers.{block[1]}." if block else ""
        weights[f"{where}{NAMES[name]}.weight"] = np.ascontiguousarray(values)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 30,
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    )
    (folder / "tokenizer.json").write_text(_tokenizer(reader))


def _tokenizer(reader: Any) -> str:
    """With the pre-tokenizer that the model's publisher gives: single digits, then GPT-2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    texts = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [
        AddedToken(text, special=True) for text, kind in zip(texts, kinds, strict=True) if kind == 3
    ]
    tokenizer.add_special_tokens(special)
    definition: str = tokenizer.to_str()
    return definition
