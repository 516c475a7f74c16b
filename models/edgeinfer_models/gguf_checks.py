"""Whether a GGUF header describes a model that llama.cpp can build without aborting.

llama.cpp answers some bad headers with an exception and others with GGML_ASSERT, which ends the
process, a few only at the first decode. Each check here names what it saves from. Source:
llama-model.cpp (load_hparams), llama-model-loader.cpp, src/models, ggml-cpu/ops.cpp, 0.3.36.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.architectures import (
    ATTENTION_FREE,
    DRAFT_ONLY,
    EQUAL_HEADS,
    LLAMA_CPP_ARCHITECTURES,
    NOT_TEXT_MODELS,
    WHOLE_HEAD_ROPE,
)
from edgeinfer_models.ggml_types import MATRIX_TYPES
from edgeinfer_models.gguf_format import GgufArray
from edgeinfer_models.gguf_header import GgufHeader, GgufTensor

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_WIDTH = 1 << 20
MAX_CONTEXT = 2**31 - 1
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_BLOCK = re.compile(r"^blk\.(\d+)\.")


def check_model(header: GgufHeader) -> None:
    """Raises UnsupportedModel (an architecture or type nobody here runs) or ModelFileInvalid."""
    architecture = _check_architecture(header)
    checks = _Checks(header)
    layers = checks.integer("{arch}.block_count", 1, MAX_LAYERS)
    checks.integer("{arch}.context_length", 1, MAX_CONTEXT)
    width = checks.integer("{arch}.embedding_length", 1, MAX_WIDTH)
    checks.experts(layers)
    checks.floats()
    checks.choices()
    if architecture not in ATTENTION_FREE:
        checks.heads(architecture, layers, width)
    checks.tensor_types()
    if architecture not in DRAFT_ONLY:
        checks.layers_are_there(layers)
        checks.embeddings(width)


def layer_values(header: GgufHeader, key: str, layers: int) -> tuple[int, ...] | None:
    """A key that is one number for all layers or an array with one for each; None if absent.

    Raises ModelFileInvalid if it is neither.
    """
    value = header.get(key)
    if value is None:
        return None
    kind = header.types.get(header._key(key), "")
    if isinstance(value, int) and kind == "u32":
        return (value,) * layers
    if isinstance(value, list | GgufArray) and kind in ("[u32]", "[i32]"):
        numbers = header.get_list(key) or []
        if len(numbers) == layers:
            return tuple(int(n) for n in numbers)
    raise _invalid(
        header, f"'{header._key(key)}' is neither a number nor one for each of {layers} layers"
    )


def _check_architecture(header: GgufHeader) -> str:
    name = header.path.name
    architecture = header.architecture
    if not architecture:
        raise _invalid(header, "'general.architecture' is missing")
    kind = header.get_str("general.type", "model")
    if kind not in ("model", ""):
        raise UnsupportedModel(
            f"{name}: is of type '{kind}', not a whole model; give the model it belongs to"
        )
    if architecture in NOT_TEXT_MODELS:
        raise UnsupportedModel(
            f"{name}: is {NOT_TEXT_MODELS[architecture]}; give the file of a language model"
        )
    if architecture not in LLAMA_CPP_ARCHITECTURES:
        raise UnsupportedModel(
            f"{name}: architecture '{architecture}' is unknown to this build's llama.cpp;"
            " update edgeinfer, or use another model"
        )
    return architecture


def _invalid(header: GgufHeader, what: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"{header.path.name}: {what}; the file is damaged, download it again")


class _Checks:
    def __init__(self, header: GgufHeader) -> None:
        self.header = header

    def invalid(self, what: str) -> ModelFileInvalid:
        return _invalid(self.header, what)

    def integer(self, key: str, low: int, high: int) -> int:
        """A required u32 inside [low, high]. llama.cpp refuses any other integer type."""
        value = self.optional_integer(key, low, high)
        if value is None:
            raise self.invalid(f"'{self.header._key(key)}' is missing")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        full = self.header._key(key)
        value = self.header.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or self.header.types[full] != "u32":
            raise self.invalid(f"'{full}' has the type {self.header.types[full]}, not u32")
        if not low <= value <= high:
            raise self.invalid(f"'{full}' is {value:,}, outside [{low:,}, {high:,}]")
        return value

    def experts(self, layers: int) -> None:
        """load_hparams asserts all of these."""
        experts = self.optional_integer("{arch}.expert_count", 0, MAX_EXPERTS) or 0
        used = max(layer_values(self.header, "{arch}.expert_used_count", layers) or (0,))
        if not 0 <= used <= experts or (experts and not used):
            if self.header.architecture in ("hunyuan_vl", "hunyuan-dense") and experts <= 1:
                return
            raise self.invalid(f"it routes to {used} of {experts} experts")
        groups = self.optional_integer("{arch}.expert_group_count", 0, MAX_EXPERTS) or 0
        groups_used = self.optional_integer("{arch}.expert_group_used_count", 0, MAX_EXPERTS) or 0
        bad = groups >= experts if experts else groups > 0
        if groups > 1 and experts:
            bad = bad or experts % groups != 0 or not 0 < groups_used < groups
        if bad:
            raise self.invalid(f"it has {groups} groups ({groups_used} used) of {experts} experts")
        self.optional_integer("{arch}.nextn_predict_layers", 0, layers)

    def floats(self) -> None:
        """ggml_norm and ggml_rms_norm assert eps >= 0; RoPE with NaN or 0 gives only NaN."""
        for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
            self._float(f"{{arch}}.attention.{key}", 0.0, 1.0)
        for key in ("freq_base", "freq_base_swa"):
            self._float(f"{{arch}}.rope.{key}", 1e-6, 1e15)
        self._float("{arch}.rope.scaling.factor", 0.0, 1e9)
        self._float("{arch}.attention.scale", 0.0, 1e6)

    def _float(self, key: str, low: float, high: float) -> None:
        full = self.header._key(key)
        value = self.header.get(key)
        if value is None:
            return
        if not isinstance(value, float) or self.header.types[full] != "f32":
            raise self.invalid(f"'{full}' has the type {self.header.types[full]}, not f32")
        if not math.isfinite(value) or not low <= value <= high:
            raise self.invalid(f"'{full}' is {value}, outside [{low:g}, {high:g}]")

    def choices(self) -> None:
        """Names and numbers that llama.cpp looks up with an assertion or an unchecked cast."""
        scaling = self.header.get("{arch}.rope.scaling.type", "linear")
        if scaling not in ROPE_SCALINGS:
            raise UnsupportedModel(
                f"{self.header.path.name}: RoPE scaling '{scaling}' is unknown to this build's"
                " llama.cpp;"
                " update edgeinfer, or use another model"
            )
        self.optional_integer("{arch}.pooling_type", 0, 4)
        self.optional_integer("{arch}.attention.sliding_window", 0, MAX_CONTEXT)
        self.optional_integer("general.file_type", 0, 2**31 - 1)
        for key, kind in (
            ("general.name", "str"),
            ("tokenizer.chat_template", "str"),
            ("{arch}.attention.causal", "bool"),
            ("{arch}.rope.scaling.finetuned", "bool"),
        ):
            full = self.header._key(key)
            if self.header.types.get(full, kind) != kind:
                raise self.invalid(f"'{full}' has the type {self.header.types[full]}, not {kind}")

    def heads(self, architecture: str, layers: int, width: int) -> None:
        """Head counts divide, and heads are as wide as the graph and RoPE take for granted."""
        header = self.header
        heads = layer_values(header, "{arch}.attention.head_count", layers)
        if heads is None:
            raise self.invalid(f"'{architecture}.attention.head_count' is missing")
        kv_heads = layer_values(header, "{arch}.attention.head_count_kv", layers) or heads
        varies = len(set(heads)) > 1 or len(set(kv_heads)) > 1  # hybrids have layers without attention
        for layer, (count, kv_count) in enumerate(zip(heads, kv_heads, strict=True)):
            least = 0 if varies else 1
            if not least <= count <= MAX_WIDTH or not least <= kv_count <= MAX_WIDTH:
                raise self.invalid(
                    f"layer {layer} has {count:,} attention heads and {kv_count:,} KV heads"
                )
            if kv_count and count % kv_count:
                raise self.invalid(f"layer {layer} has {count} attention heads over {kv_count} KV heads")
        first = heads[0]
        key = self.optional_integer("{arch}.attention.key_length", 1, MAX_WIDTH)
        value = self.optional_integer("{arch}.attention.value_length", 1, MAX_WIDTH)
        if first and (key is None or value is None) and width % first:
            raise self.invalid(f"an embedding of {width} does not divide into {first} heads")
        default = width // first if first else 0
        key, value = key or default, value or default
        if key != value and architecture in EQUAL_HEADS:
            raise self.invalid(
                f"keys are {key} wide and values {value}, which '{architecture}' does not have"
            )
        rope = self.optional_integer("{arch}.rope.dimension_count", 0, MAX_WIDTH)
        if rope is None or not first:
            return
        if rope > key or rope % 2 or (architecture in WHOLE_HEAD_ROPE and rope != key):
            raise self.invalid(f"RoPE turns {rope} dimensions of heads that have {key}")

    def tensor_types(self) -> None:
        """ggml-cpu has no product for some types and adds or multiplies by F32 vectors only."""
        for tensor in self.header.tensors:
            if not tensor.name.endswith((".weight", ".bias")):
                continue
            if _must_be_f32(tensor):
                if tensor.type_name != "F32":
                    raise UnsupportedModel(
                        f"{self.header.path.name}: vector '{tensor.name}' has the type"
                        f" {tensor.type_name},"
                        " and llama.cpp computes with F32 vectors only; convert the model again"
                    )
            elif tensor.type_name not in MATRIX_TYPES and not _is_table(tensor):
                raise UnsupportedModel(
                    f"{self.header.path.name}: matrix '{tensor.name}' has the type {tensor.type_name},"
                    " which llama.cpp cannot multiply; convert the model again"
                )

    def layers_are_there(self, layers: int) -> None:
        """A damaged block_count shows as a layer without tensors or tensors without a layer."""
        found: set[int] = set()
        for tensor in self.header.tensors:
            match = _BLOCK.match(tensor.name)
            if match:
                found.add(int(match[1]))
        if not found:
            if any(t.name.startswith(("enc.blk.", "dec.blk.")) for t in self.header.tensors):
                return
            raise ModelFileInvalid(
                f"{self.header.path.name}: has no weights, only a vocabulary or a header;"
                " give the file with the model's weights"
            )
        missing = next((n for n in range(layers) if n not in found), None)
        if missing is not None:
            raise self.invalid(f"layer {missing} of {layers} has no tensors")
        if max(found) >= layers:
            raise self.invalid(f"it has tensors for layer {max(found)} but says it has {layers} layers")

    def embeddings(self, width: int) -> None:
        tensor = self.header.tensor("token_embd.weight")
        if tensor is None:
            raise self.invalid("tensor 'token_embd.weight' is missing")
        tokens = self.header.get_length("tokenizer.ggml.tokens")
        if tokens is None:
            tokens = self.header.get_int("{arch}.vocab_size", self.header.get_int("vocab_size"))
        elif len(tensor.shape) == 2 and tensor.shape[1] != tokens:
            raise self.invalid(
                f"its vocabulary has {tokens:,} tokens where 'token_embd.weight' has {tensor.shape[1]:,}"
                " rows"
            )
        shape: Sequence[int] = tensor.shape
        if len(shape) != 2 or shape[0] != width or (tokens and shape[1] != tokens):
            raise self.invalid(
                f"'token_embd.weight' has the shape {list(shape)} where the header says [{width},"
                f" {tokens}]"
            )


def _must_be_f32(tensor: GgufTensor) -> bool:
    return (
        len(tensor.shape) == 1
        or tensor.name.endswith(("_norm.weight", ".bias"))
        or ".ssm_conv1d" in tensor.name
    )


def _is_table(tensor: GgufTensor) -> bool:
    # DeepSeek V4 routes by an integer table from token to expert.
    return tensor.type_name in ("I32", "I64") and "tid2eid" in tensor.name
