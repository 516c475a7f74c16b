"""A small real model: random weights and a byte-level vocabulary that llama.cpp loads and decodes.

    write_tiny_gguf(tmp_path / "tiny.gguf")                     # llama, about 230 KB
    write_tiny_gguf(path, arch="gemma3", tokenizer="spm")       # sliding window, SPM vocabulary
    write_tiny_gguf(path, metadata={"llama.block_count": None}) # a key left out (or given another value)

The same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    "Ġ t", "h e", "Ġ a", "i n", "r e", "Ġt he", "o n", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n", "Ġ c",
    "i t", "i s", "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p", "o u", "Ġan d", "a l", "a r",
    "Ġt o", "Ġ m", "Ġo f", "Ġ in", "Ġ d", "Ġ h", "l e", "Ġ is",
)  # fmt: skip

Tokenizer = Literal["bpe", "spm"]
_NORMAL, _CONTROL, _BYTE, _UNKNOWN, _UNUSED = 1, 3, 6, 2, 5


def write_tiny_gguf(
    path: Path,
    *,
    arch: Literal["llama", "qwen3", "gemma3"] = "llama",
    seed: int = 1234,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    feed_forward: int = 128,
    context: int = 4096,
    tokenizer: Tokenizer = "bpe",
    template: str | None = CHATML,
    weight_type: Literal["F32", "F16", "Q8_0", "Q4_0"] = "F16",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model and return `path`.

    metadata: values that replace those written, or None to leave a key out; other keys are added (an
    int as u32, a float as f32). tensors: numpy arrays (row-major) that replace those written, or None.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    values = _metadata(arch, layers, hidden, heads, kv_heads, head_dim, feed_forward, context)
    values |= _vocabulary(tokenizer)
    if template is not None:
        values["tokenizer.chat_template"] = template
    values |= metadata or {}
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    weights = _weights(
        arch, seed, len(values["tokenizer.ggml.tokens"] or ()), layers, hidden, heads, kv_heads,
        head_dim, feed_forward,
    )  # fmt: skip
    for name, array in (weights | dict(tensors or {})).items():
        if array is not None:
            _add_tensor(writer, name, array, weight_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(
    arch: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    feed_forward: int,
    context: int,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": "Tiny Random",
        "general.license": "apache-2.0",
        "general.file_type": 1,
        f"{arch}.block_count": layers,
        f"{arch}.context_length": context,
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": feed_forward,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.rope.dimension_count": head_dim,
    }
    if arch == "gemma3":
        values[f"{arch}.attention.sliding_window"] = 64
    return values


def tiny_vocabulary(size: int) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a byte-level vocabulary, filled up with unused tokens."""
    found = _vocabulary("bpe")
    missing = size - len(found["tokenizer.ggml.tokens"])
    found["tokenizer.ggml.tokens"] += [f"[PAD{index}]" for index in range(missing)]
    found["tokenizer.ggml.token_type"] += [_UNUSED] * missing
    return found


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer == "bpe":
        pieces = [_byte_letter(b) for b in range(256)] + [merge.replace(" ", "") for merge in MERGES]
        tokens = [*SPECIAL_TOKENS, *pieces]
        types = [_CONTROL] * len(SPECIAL_TOKENS) + [_NORMAL] * len(pieces)
        own: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.merges": list(MERGES),
        }
    else:
        words = ["▁", *"etaoinshrdlucmfwypvbgkjqxz", "▁t", "he", "▁the", "in", "▁a", "er", "▁s", "on"]
        tokens = ["<unk>", *SPECIAL_TOKENS, *(f"<0x{b:02X}>" for b in range(256)), *words]
        types = [_UNKNOWN] + [_CONTROL] * len(SPECIAL_TOKENS) + [_BYTE] * 256 + [_NORMAL] * len(words)
        own = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.unknown_token_id": 0,
        }
    return own | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _byte_letter(byte: int) -> str:
    """GPT-2's printable letter for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def _weights(
    arch: str,
    seed: int,
    vocab: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ff: int,
) -> dict[str, Any]:
    import numpy as np

    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Any:
        return (random.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    def norm(size: int) -> Any:
        return (1 + 0.1 * random.standard_normal(size)).astype(np.float32)

    weights = {"token_embd.weight": matrix(vocab, hidden, hidden**0.5)}
    for layer in range(layers):
        own = {
            "attn_norm": norm(hidden),
            "attn_q": matrix(heads * head_dim, hidden),
            "attn_k": matrix(kv_heads * head_dim, hidden),
            "attn_v": matrix(kv_heads * head_dim, hidden),
            "attn_output": matrix(hidden, heads * head_dim),
            "ffn_norm": norm(hidden),
            "ffn_gate": matrix(ff, hidden),
            "ffn_up": matrix(ff, hidden),
            "ffn_down": matrix(hidden, ff),
        }
        if arch in ("qwen3", "gemma3"):
            own |= {"attn_q_norm": norm(head_dim), "attn_k_norm": norm(head_dim)}
        if arch == "gemma3":
            own |= {"post_attention_norm": norm(hidden), "post_ffw_norm": norm(hidden)}
        weights |= {f"blk.{layer}.{name}.weight": array for name, array in own.items()}
    # A wide spread of logits, so that greedy text does not hang on rounding.
    return weights | {"output_norm.weight": norm(hidden), "output.weight": matrix(vocab, hidden, 4.0)}


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key}: {value!r}")


def _add_tensor(writer: Any, name: str, array: Any, weight_type: str) -> None:
    import gguf
    import numpy as np

    if array.ndim == 1 or array.dtype != np.float32 or weight_type == "F32":
        writer.add_tensor(name, array)
    elif weight_type == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType[weight_type]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
