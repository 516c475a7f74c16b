"""Models of any size that take no disk: weights that are holes in files (all zeros).

What is read and computed is as much as with other numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeinfer_models.families import family

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
SHAPE_1B: dict[str, Any] = {
    **_LLAMA,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
}
SHAPE_8B: dict[str, Any] = {
    **_LLAMA,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "tie_word_embeddings": False,
}
SHARDS = 4


def write_holes(folder: Path, config: Mapping[str, Any]) -> int:
    """A Llama of this config.json. Returns the bytes of its weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    shape = family("llama").shape_from_hf(config, "config.json")
    names = [(name, rule.shape) for rule in family("llama").rules(shape) for name in rule.hf]
    weight_map, total = {}, 0
    for shard in range(SHARDS):
        path = folder / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, offset = {}, 0
        for name, sizes in names[shard::SHARDS]:
            elements = 1
            for size in sizes:
                elements *= size
            stop = offset + 2 * elements
            header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [offset, stop]}
            weight_map[name], offset = path.name, stop
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return total


def write_holes_gguf(path: Path, folder: Path) -> int:
    """The same model as one GGUF file in BF16. Returns the bytes of its weights."""
    from edgeinfer_models.conversion.model import source_of_folder
    from edgeinfer_models.conversion.to_gguf import ALIGNMENT, GgufPlan, model_head, rule_bytes

    model = source_of_folder(folder)
    plan = GgufPlan(model.family, model.shape, "BF16", model.gguf_metadata())
    sizes = [rule_bytes(rule, plan.dtype) for rule in model.family.rules(model.shape)]
    head = model_head(plan)
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    return sum(sizes)
