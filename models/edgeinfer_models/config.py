"""What a model is, in numbers: one `ModelConfig` whatever file it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.ggml_types import row_bytes
from edgeinfer_models.gguf_checks import layer_values
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.safetensors_header import SafetensorsFolder, read_safetensors_folder

# llama_ftype of llama.h, as people write it.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip


INPUT, OUTPUT = -1, -2  # `WeightGroup.layer` of what stands before and behind the layers


@dataclass(frozen=True)
class WeightGroup:
    """Tensors of one type in one layer, added up: enough to tell where they will lie."""

    layer: int  # or INPUT, OUTPUT
    type_name: str
    num_bytes: int


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int  # the widest layer's; 0: unknown
    num_heads: int  # the most any layer has
    num_kv_heads: tuple[int, ...]  # per layer; 0 for a layer without attention
    head_dim_k: int
    head_dim_v: int
    vocab_size: int
    context_trained: int
    rope_freq_base: float  # 0: no RoPE
    rope_dim: int
    sliding_window: int  # 0: none
    num_experts: int  # 0: dense
    num_experts_used: int
    parameters: int
    file_bytes: int
    weights_bytes: int
    licence: str  # "" if the file does not say
    quantization: str  # "Q4_K_M", "BF16" …
    caches_values: bool = True  # MLA keeps one latent instead of keys and values
    num_merges: int = 0  # of a BPE vocabulary
    is_tied: bool = False  # the token embeddings are the output's weights too
    model_type: str = ""  # of config.json; "" of a GGUF file
    packing: str = ""  # `quant_method` of weights that another tool than MLX packed: gptq, awq, fp8 …
    weights: tuple[WeightGroup, ...] = ()  # empty where only `weights_bytes` is known

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weights_bytes / self.parameters if self.parameters else 0.0

    def kv_bytes_per_token(self, type_k: str = "f16", type_v: str = "f16") -> int:
        """Bytes of KV cache for one position in all layers, without a sliding window's savings.

        Raises UsageError for an unknown type.
        """
        total = 0
        for heads in self.num_kv_heads:
            total += row_bytes(type_k, heads * self.head_dim_k)
            if self.caches_values:
                total += row_bytes(type_v, heads * self.head_dim_v)
        return total


def config_from_gguf(header: GgufHeader) -> ModelConfig:
    """The configuration in a header that `read_gguf_model` has checked."""
    layers = header.get_int("{arch}.block_count")
    width = header.get_int("{arch}.embedding_length")
    heads = layer_values(header, "{arch}.attention.head_count", layers) or (0,) * layers
    kv_heads = layer_values(header, "{arch}.attention.head_count_kv", layers) or heads
    feed_forward = layer_values(header, "{arch}.feed_forward_length", layers) or (0,)
    experts_used = layer_values(header, "{arch}.expert_used_count", layers) or (0,)
    # Qwen 3 Next and its kin: every n-th layer has attention, the others a recurrent state.
    interval = header.get_int("{arch}.full_attention_interval")
    if interval > 1:
        kv_heads = tuple(n if (i + 1) % interval == 0 else 0 for i, n in enumerate(kv_heads))
    default_head = width // heads[0] if heads and heads[0] else 0
    head_dim_k = header.get_int("{arch}.attention.key_length", default_head)
    tokens = header.get_length("tokenizer.ggml.tokens")
    return ModelConfig(
        architecture=header.architecture,
        name=header.get_str("general.name") or header.path.stem,
        num_layers=layers,
        hidden_size=width,
        intermediate_size=max(feed_forward),
        num_heads=max(heads, default=0),
        num_kv_heads=kv_heads,
        head_dim_k=head_dim_k,
        head_dim_v=header.get_int("{arch}.attention.value_length", default_head),
        vocab_size=tokens or header.get_int("{arch}.vocab_size"),
        context_trained=header.get_int("{arch}.context_length"),
        rope_freq_base=header.get_float("{arch}.rope.freq_base", 10000.0 if any(heads) else 0.0),
        rope_dim=header.get_int("{arch}.rope.dimension_count", head_dim_k),
        sliding_window=header.get_int("{arch}.attention.sliding_window"),
        num_experts=header.get_int("{arch}.expert_count"),
        num_experts_used=max(experts_used),
        parameters=sum(t.elements for t in header.tensors),
        file_bytes=header.file_bytes,
        weights_bytes=header.weights_bytes,
        licence=header.get_str("general.license"),
        quantization=_quantization(header),
        caches_values=header.get("{arch}.attention.key_length_mla") is None,
        num_merges=header.get_length("tokenizer.ggml.merges") or 0,
        is_tied=header.tensor("output.weight") is None,
        weights=_weight_groups(header),
    )


def config_from_hf(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face folder. Raises ModelFileInvalid for what is not one."""
    model = read_safetensors_folder(folder)
    outer = model.config
    text = outer.get("text_config")
    values = _HfValues(folder, {**outer, **text} if isinstance(text, dict) else outer)
    layers = values.integer("num_hidden_layers", "n_layer")
    width = values.integer("hidden_size", "n_embd")
    heads = values.integer("num_attention_heads", "n_head")
    head_dim = values.integer("head_dim", default=width // heads if heads else 0)
    kv_heads = values.integer("num_key_value_heads", default=heads)
    window = values.integer("sliding_window", default=0)
    if values.get("use_sliding_window") is False:
        window = 0
    weights = sum(t.num_bytes for t in model.tensors)
    dtypes: dict[str, int] = {}
    for tensor in model.tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.num_bytes
    rope_parameters = values.get("rope_parameters")
    nested = rope_parameters if isinstance(rope_parameters, dict) else {}
    theta = values.get("rope_theta") or nested.get("rope_theta")
    return ModelConfig(
        architecture=values.architecture(),
        name=folder.resolve().name,
        num_layers=layers,
        hidden_size=width,
        intermediate_size=values.integer("intermediate_size", "n_inner", default=0),
        num_heads=heads,
        num_kv_heads=(kv_heads,) * layers,
        head_dim_k=head_dim,
        head_dim_v=head_dim,
        vocab_size=values.integer("vocab_size"),
        context_trained=values.integer("max_position_embeddings", "n_positions", default=0),
        rope_freq_base=float(theta) if isinstance(theta, int | float) else 10000.0,
        rope_dim=head_dim,
        sliding_window=window,
        num_experts=values.integer("num_local_experts", "num_experts", "n_routed_experts", default=0),
        num_experts_used=values.integer("num_experts_per_tok", default=0),
        parameters=_num_weights(model),
        file_bytes=sum(shard.file_bytes for shard in model.shards),
        weights_bytes=weights,
        licence=_readme_licence(folder),
        quantization=_packed_as(outer) or max(dtypes, key=lambda d: dtypes[d], default=""),
        is_tied=all(tensor.name != "lm_head.weight" for tensor in model.tensors),
        model_type=str(outer.get("model_type") or ""),
        packing=_packing(outer),
    )


def _packing(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if quantization is None or config.get("quantization") is not None:  # MLX writes both
        return ""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) and method else "unknown"


def _packed_as(config: Mapping[str, Any]) -> str:
    """What packed weights are called; "" for plain ones."""
    of_mlx = config.get("quantization")
    if isinstance(of_mlx, dict):
        return f"MLX-{str(of_mlx.get('bits'))[:4]}BIT"
    packing = _packing(config)
    if packing == "compressed-tensors":
        kind = _compressed_kind(config["quantization_config"])
        return f"{kind[0].upper()}{kind[1]}" if kind else packing.upper()
    return packing.upper()


def _compressed_kind(quantization: Mapping[str, Any]) -> tuple[str, int] | None:
    """("int" or "fp", bits) of compressed-tensors' weights, where one kind is for all of them."""
    groups = quantization.get("config_groups")
    found: set[tuple[str, int]] = set()
    for each in groups.values() if isinstance(groups, dict) else ():
        weights = each.get("weights") if isinstance(each, dict) else None
        kind, bits = (
            (weights.get("type"), weights.get("num_bits")) if isinstance(weights, dict) else (0, 0)
        )
        if kind in ("int", "float") and type(bits) is int and 2 <= bits <= 8:
            found.add(("int" if kind == "int" else "fp", bits))
    return found.pop() if len(found) == 1 else None


# Of a matrix's parts those that stand for no weights of their own.
_BESIDE_CODES = (
    ".qzeros", ".scales", ".biases", ".g_idx", "_scale", "_scale_inv", ".weight_shape",
    ".weight_zero_point", ".weight_g_idx",
)  # fmt: skip


def _num_weights(model: SafetensorsFolder) -> int:
    """Without the scales beside them; packed ones as many as they stand for."""
    config = model.config
    packing, given = _packing(config), config.get("quantization")
    of_mlx: Mapping[str, Any] = given if isinstance(given, dict) else {}
    names = {tensor.name for tensor in model.tensors}
    total = 0
    for tensor in model.tensors:
        stem = tensor.name.removesuffix(".weight")
        if of_mlx and stem != tensor.name and f"{stem}.scales" in names:
            own = of_mlx.get(stem)
            bits = (own if isinstance(own, dict) else of_mlx).get("bits")
            total += tensor.elements * 32 // (bits if bits in (2, 3, 4, 5, 6, 8) else 4)
        elif tensor.name.endswith(".qweight"):
            said = config.get("quantization_config")
            quantization = said if isinstance(said, dict) else {}
            bits = quantization.get("bits", quantization.get("w_bit"))
            total += tensor.elements * (32 // bits if bits in (2, 4, 8) else 8)
        elif packing == "compressed-tensors" and tensor.name.endswith(".weight_packed"):
            kind = _compressed_kind(config["quantization_config"])
            total += tensor.elements * 32 // (kind[1] if kind else 4)
        elif not tensor.name.endswith(_BESIDE_CODES):
            total += tensor.elements
    return total


_LAYER = re.compile(r"blk\.(\d+)\.")
_BEFORE_LAYERS = ("token_embd", "token_types", "position_embd", "per_layer_token_embd")


def _weight_groups(header: GgufHeader) -> tuple[WeightGroup, ...]:
    sizes: dict[tuple[int, str], int] = {}
    for tensor in header.tensors:
        match = _LAYER.match(tensor.name)
        layer = int(match[1]) if match else INPUT if tensor.name.startswith(_BEFORE_LAYERS) else OUTPUT
        key = (layer, tensor.type_name)
        sizes[key] = sizes.get(key, 0) + tensor.num_bytes
    return tuple(WeightGroup(*key, num_bytes) for key, num_bytes in sorted(sizes.items()))


class _HfValues:
    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        self._where = f"{folder / 'config.json'}"
        self._values = values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def integer(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if type(value) is not int or not 0 <= value < 2**31:
                raise ModelFileInvalid(
                    f"{self._where}: '{key}' is not a number that can be; check the file"
                )
            if value > 4096 and key in ("num_hidden_layers", "n_layer"):
                raise ModelFileInvalid(f"{self._where}: {value:,} layers; check the file")
            return value
        if default is None:
            raise ModelFileInvalid(
                f"{self._where}: '{keys[0]}' is missing; download the whole model folder"
            )
        return default

    def architecture(self) -> str:
        names = self._values.get("architectures")
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
        kind = self._values.get("model_type")
        return kind if isinstance(kind, str) and kind else "unknown"


def _quantization(header: GgufHeader) -> str:
    """What the file says it is, or the type most of its bytes have."""
    label = FILE_TYPES.get(header.get_int("general.file_type", -1))
    if label:
        return label
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.num_bytes
    return max(sizes, key=lambda name: sizes[name]) if sizes else ""


def _readme_licence(folder: Path) -> str:
    """`license:` of the model card's front matter."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            lines = [file.readline(1000).rstrip() for _ in range(100)]
    except OSError:
        return ""
    if lines[0] != "---":
        return ""
    for line in lines[1:]:
        if line == "---":
            break
        if line.startswith("license:"):
            return line.removeprefix("license:").strip().strip("'\"")
    return ""
