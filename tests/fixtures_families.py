"""A tiny random checkpoint of every family, as a Hugging Face folder and as GGUF.

config = full(CONFIGS["gemma3"])
folder = write_folder(tmp_path / "model", config)    # config.json and model.safetensors, no tokenizer
path = converted(folder, config)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.sources import SafetensorsSource
from edgeinfer_models.conversion.to_gguf import GgufPlan, write_gguf
from edgeinfer_models.families import family_of_config
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.safetensors_header import read_safetensors_folder
from tests.fixtures_gguf import tiny_vocabulary

VOCAB = 320
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "type": "longrope",
    "long_factor": [1.0 + i for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 16},
    "llama tied, biased, scaled": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **EXPERTS,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": False,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 32, **EXPERTS, "norm_topk_prob": True},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "num_hidden_layers": 7,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {"model_type": "phi3", "sliding_window": None, "original_max_position_embeddings": 256},
    "phi3 long": {
        "model_type": "phi3",
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 128,
    },
    "olmo2": {"model_type": "olmo2"},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
        "logits_scaling": 8.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
}


def full(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**SMALL, **config, "architectures": ["X"]}


def shape_of(config: Mapping[str, Any]) -> DecoderShape:
    return family_of_config(config, "config.json").shape_from_hf(config, "config.json")


def write_folder(folder: Path, config: Mapping[str, Any], dtype: str = "float32") -> Path:
    """Random weights, written by the safetensors library."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(7)
    shape = shape_of(config)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for rule in family_of_config(config, "").rules(shape):
        for name in rule.hf:
            values = random.normal(0.0, 0.3 if len(rule.shape) == 1 else 0.08, rule.shape)
            tensors[name] = values.astype(dtype)
            if "norm" in name and rule.change != "add_one":
                tensors[name] = (1.0 + values).astype(dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def converted(folder: Path, config: Mapping[str, Any], dtype: str = "F32") -> Path:
    path = folder.with_suffix(".gguf")
    source = SafetensorsSource(read_safetensors_folder(folder))
    plan = GgufPlan(family_of_config(config, ""), shape_of(config), dtype, tiny_vocabulary(VOCAB))
    write_gguf(path, source, plan)
    return path


def llama_cpp_logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """shape: (tokens, VOCAB)."""
    settings = RuntimeSettings(
        context=256,
        threads=1,
        threads_batch=1,
        kv_type_k="f32",
        kv_type_v="f32",
        flash_attention=False,  # which computes in f16
    )
    files = ModelFiles("tiny", (path,), "gguf")
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    result = runtime.forward(Step([SequenceStep(runtime.open(), tokens, "all")]))
    found = np.stack([runtime.logits(result.starts[0] + i).copy() for i in range(len(tokens))])
    runtime.close()
    return found
