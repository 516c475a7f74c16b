"""A small Hugging Face folder: random weights and a byte-level tokenizer.json, as real ones are.

    write_tiny_folder(tmp_path / "tiny")                     # Llama, float32, about 0.5 MB
    write_tiny_folder(path, model_type="qwen3", layers=1)
    write_tiny_folder(path, config={"rope_theta": "many"})   # a key given another value, or left out
    write_tiny_folder(path, tokenizer=unigram_definition())  # a vocabulary of another kind

The same arguments give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tests.fixtures_gguf import CHATML, MERGES, SPECIAL_TOKENS

ModelType = Literal["llama", "mistral", "qwen2", "qwen3"]
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_HEAD_SCALE = 0.3  # logits with a standard deviation of about 2.4, as trained models have
UNUSED_IDS = 5  # of the model that the tokenizer has no text for, as real models have


def write_tiny_folder(
    folder: Path,
    *,
    model_type: ModelType = "llama",
    seed: int = 1234,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    feed_forward: int = 96,
    dtype: Literal["float32", "float16"] = "float32",
    tokenizer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder and return it. config, tensors: what replaces what is written; None leaves out.
    tokenizer: a tokenizer.json in place of the byte-level one, with the same special tokens."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    is_qwen = model_type.startswith("qwen")
    bos = None if is_qwen else SPECIAL_TOKENS[0]
    definition = tokenizer or tokenizer_definition("NFC" if is_qwen else None, bos)
    added = [token["id"] + 1 for token in definition["added_tokens"]]
    vocab_size = max(len(definition["model"]["vocab"]), *added) + UNUSED_IDS
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": model_type == "qwen3",
        "eos_token_id": added[-1] - 1,
    } | dict(config or {})
    values = {key: value for key, value in values.items() if value is not None}
    weights = _weights(
        model_type, seed, vocab_size, layers, hidden, heads, kv_heads, head_dim, feed_forward
    )
    if not values.get("tie_word_embeddings"):
        weights["lm_head.weight"] = _normal(seed + 1, vocab_size, hidden) * _HEAD_SCALE
    weights |= dict(tensors or {})
    kept = {name: array.astype(dtype) for name, array in weights.items() if array is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": bos,
                "eos_token": {"content": "<|im_end|>", "special": True},
                "chat_template": CHATML,
            }
        )
    )
    return folder


def tokenizer_definition(normalizer: str | None = None, bos: str | None = None) -> dict[str, Any]:
    """A tokenizer.json of the kind GPT-2, Llama 3 and Qwen use, made by the library itself."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: token for token, text in enumerate(letters)}
    merges = []
    for left, right in (merge.split(" ") for merge in MERGES):
        if left in vocab and right in vocab:  # the library refuses the others
            merges.append((left, right))
            vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    if bos:
        beginning = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A", special_tokens=[beginning]
        )
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


def unigram_definition(
    normalizer: Mapping[str, Any] | None = None, pre_tokenizer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A tokenizer.json of Unigram's kind, trained by the library itself on a few pages of prose; its
    special tokens are `<unk>` and those of the byte-level one. With neither argument blanks become
    U+2581 and nothing else happens to a text."""
    import numpy as np
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers

    from edgeinfer.measure.texts import measured_text

    if normalizer is None and pre_tokenizer is None:
        normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")  # type: ignore[assignment]
    empty = {**json.loads(tokenizer.to_str()), "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    tokenizer = Tokenizer.from_str(json.dumps(empty))
    special = [AddedToken(text, special=True) for text in ("<unk>", *SPECIAL_TOKENS)]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(measured_text(None)[:40_000].splitlines(), trainer)
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    for piece in definition["model"]["vocab"]:  # as SentencePiece writes scores
        piece[1] = float(np.float32(piece[1]))
    return definition


def _weights(
    model_type: str,
    seed: int,
    vocab: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    feed_forward: int,
) -> dict[str, Any]:
    import numpy as np

    weights: dict[str, Any] = {"model.embed_tokens.weight": _normal(seed, vocab, hidden) * _HEAD_SCALE}
    ones = np.ones(hidden, np.float32)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (feed_forward, hidden),
            "mlp.up_proj": (feed_forward, hidden),
            "mlp.down_proj": (hidden, feed_forward),
        }
        for index, (name, (rows, columns)) in enumerate(shapes.items()):
            # 1.5 / sqrt(columns): activations neither die nor explode, and attention is not uniform
            scale = 1.5 * columns**-0.5
            weights[f"{at}.{name}.weight"] = (
                _normal(seed + 100 * layer + 2 + index, rows, columns) * scale
            )
            if model_type == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                weights[f"{at}.{name}.bias"] = _normal(seed + 7, 1, rows)[0] * np.float32(0.1)
        weights[f"{at}.input_layernorm.weight"] = ones
        weights[f"{at}.post_attention_layernorm.weight"] = ones
        if model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"{at}.self_attn.{name}.weight"] = np.ones(head_dim, np.float32)
    weights["model.norm.weight"] = ones
    return weights


def _normal(seed: int, rows: int, columns: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
