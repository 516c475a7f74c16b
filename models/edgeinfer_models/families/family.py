"""What each file of this folder says of its family, and the part that a plain decoder has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.families.rope import rope_from_gguf, rope_from_hf, rope_to_gguf, rope_to_hf
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.tensors import TensorRule, tensor_rules
from edgeinfer_models.families.values import HfValues, gguf_float

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader

Factors = Mapping[str, Sequence[float]]  # RoPE tensors of a GGUF file, see rope.py
# Of a plain decoder, with what config.json or the metadata says beyond it, to the family's own; and what
# is to be written beside what a plain one has.
FromHf = Callable[[DecoderShape, HfValues], DecoderShape]
ToHf = Callable[[DecoderShape], dict[str, Any]]
FromGguf = Callable[[DecoderShape, "GgufHeader"], DecoderShape]
ToGguf = Callable[[DecoderShape], dict[str, Any]]
MOST_EXPERTS = 4096  # eight times as many as any published model has
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class Family:
    """name: the file's. model_types: of config.json. hf_class: of its `architectures`. arch: GGUF's
    name. pairs_rows: llama.cpp turns neighbouring entries of a head there (see changes.py).
    reads_windows: llama.cpp heeds its sliding windows.
    """

    name: str
    model_types: tuple[str, ...]
    hf_class: str
    arch: str
    from_hf: FromHf = lambda shape, _: shape
    to_hf: ToHf = lambda _: {}
    from_gguf: FromGguf = lambda shape, _: shape
    to_gguf: ToGguf = lambda _: {}
    is_of: Callable[[GgufHeader], bool] = lambda _: True  # where several families share an arch
    pairs_rows: bool = False
    reads_windows: bool = False

    def shape_from_hf(self, config: Mapping[str, Any], where: str) -> DecoderShape:
        """config: of config.json, text_config taken out. Raises ModelFileInvalid, UnsupportedModel."""
        values = HfValues(config, where)
        return checked(self.from_hf(_plain_from_hf(self.name, values), values), where)

    def shape_to_hf(self, shape: DecoderShape) -> dict[str, Any]:
        """A config.json, but for the tokens that begin and end a text."""
        return {**_plain_to_hf(shape, self), **self.to_hf(shape)}

    def shape_from_gguf(self, header: GgufHeader, factors: Factors) -> DecoderShape:
        """Raises ModelFileInvalid, UnsupportedModel."""
        plain = _plain_from_gguf(self.name, header, factors)
        return checked(self.from_gguf(plain, header), header.path.name)

    def shape_to_gguf(self, shape: DecoderShape) -> tuple[dict[str, Any], Factors]:
        """Metadata, with the names that follow the architecture's ("block_count"), and RoPE tensors.
        Raises UnsupportedModel where llama.cpp computes something else."""
        rope, factors = rope_to_gguf(shape.rope, shape.context_trained)
        return {**_plain_to_gguf(shape), **rope, **self.to_gguf(shape)}, factors

    def rules(self, shape: DecoderShape) -> list[TensorRule]:
        return tensor_rules(shape, self.arch, pairs_rows=self.pairs_rows)

    def notes_on_gguf(self, shape: DecoderShape) -> list[str]:
        """What llama.cpp does otherwise, a line each."""
        if any(shape.sliding) and shape.window < shape.context_trained and not self.reads_windows:
            return [
                f"llama.cpp reads this model without its sliding window of {shape.window}: past so many"
                " tokens its answers differ from the original's"
            ]
        return []


def checked(shape: DecoderShape, where: str) -> DecoderShape:
    """Raises ModelFileInvalid for sizes that do not go together."""

    def invalid(what: str) -> ModelFileInvalid:
        return ModelFileInvalid(f"{where}: {what}; check the file, or download it again")

    if shape.num_heads % shape.num_kv_heads:
        raise invalid(
            f"{shape.num_heads} attention heads do not share {shape.num_kv_heads} heads of keys evenly"
        )
    if shape.rope.dim % 2 or not 2 <= shape.rope.dim <= shape.head_dim:
        raise invalid(f"RoPE turns {shape.rope.dim} entries of a head of {shape.head_dim}")
    if shape.norm_eps <= 0.0:
        raise invalid(f"the norms' epsilon is {shape.norm_eps}")
    if shape.sliding and len(shape.sliding) != shape.num_layers:
        raise invalid(f"{len(shape.sliding)} kinds of layers for {shape.num_layers} layers")
    if any(shape.sliding) and shape.window < 1:
        raise invalid("layers with a sliding window, and no size of it")
    experts = shape.experts
    if experts is not None and experts.count > MOST_EXPERTS:
        raise invalid(f"{experts.count:,} experts")
    if experts is not None and not 1 <= experts.used <= experts.count:
        raise invalid(f"{experts.used} of {experts.count} experts are used")
    return shape


# -- config.json -----------------------------------------------------------------------------------


def _plain_from_hf(name: str, values: HfValues) -> DecoderShape:
    heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
    head_dim = values.size("head_dim", hidden // heads)
    rotary = values.table("rope_parameters").number(
        "partial_rotary_factor", values.number("partial_rotary_factor", 1.0)
    )
    if not 0.0 < rotary <= 1.0:
        raise values.invalid(f"'partial_rotary_factor' is {rotary}")
    activation = values.text("hidden_activation", values.text("hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"the activation '{activation[:40]}' is not supported")
    has_bias = values.flag("attention_bias")
    return DecoderShape(
        family=name,
        vocab_size=values.size("vocab_size"),
        hidden_size=hidden,
        num_layers=values.layers(),
        num_heads=heads,
        num_kv_heads=values.size("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=values.size("intermediate_size"),
        context_trained=values.size("max_position_embeddings", 0, least=0),
        norm_eps=values.number("rms_norm_eps", 1e-6),
        rope=rope_from_hf(values, int(head_dim * rotary)),
        is_tied=values.flag("tie_word_embeddings"),
        activation="silu" if ACTIVATIONS[activation] == "silu" else "gelu_tanh",
        qkv_bias=has_bias,
        output_bias=has_bias,
        mlp_bias=values.flag("mlp_bias"),
    )


def _plain_to_hf(shape: DecoderShape, family: Family) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": family.model_types[0],
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.context_trained,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu" if shape.activation == "silu" else "gelu_pytorch_tanh",
        "tie_word_embeddings": shape.is_tied,
        "rope_theta": shape.rope.base,
    }
    parameters = rope_to_hf(shape.rope)
    if shape.rope.scaling is not None:  # where programs older than `rope_parameters` look for it
        config["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    if shape.rope.dim != shape.head_dim:
        config["partial_rotary_factor"] = shape.rope.dim / shape.head_dim
        parameters["partial_rotary_factor"] = shape.rope.dim / shape.head_dim
    config["rope_parameters"] = parameters
    return config


# -- GGUF ------------------------------------------------------------------------------------------


def _plain_from_gguf(name: str, header: GgufHeader, factors: Factors) -> DecoderShape:
    embeddings = header.tensor("token_embd.weight")
    if embeddings is None:
        raise ModelFileInvalid(f"{header.path.name}: has no 'token_embd.weight'; download it again")
    hidden, heads = (
        header.get_int("{arch}.embedding_length"),
        header.get_int("{arch}.attention.head_count"),
    )
    layers = header.get_int("{arch}.block_count")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(header.get(f"{{arch}}.{key}"), list):
            raise UnsupportedModel(
                f"{header.path.name}: its layers are of different sizes ('{key}'), which only llama.cpp"
                " can run"
            )
    if not (hidden and heads and layers):
        raise ModelFileInvalid(f"{header.path.name}: its metadata lack sizes; download it again")
    head_dim = header.get_int("{arch}.attention.key_length", hidden // heads)
    if header.get_int("{arch}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{header.path.name}: keys and values have heads of different sizes")
    return DecoderShape(
        family=name,
        vocab_size=embeddings.shape[1],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=header.get_int("{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=header.get_int("{arch}.feed_forward_length"),
        context_trained=header.get_int("{arch}.context_length"),
        norm_eps=gguf_float(header, "{arch}.attention.layer_norm_rms_epsilon", 1e-6),
        rope=rope_from_gguf(header, head_dim, factors),
        is_tied=header.tensor("output.weight") is None,
        qkv_bias=header.tensor("blk.0.attn_q.bias") is not None,
        output_bias=header.tensor("blk.0.attn_output.bias") is not None,
        mlp_bias=header.tensor("blk.0.ffn_down.bias") is not None,
    )


def _plain_to_gguf(shape: DecoderShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "context_length": shape.context_trained,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_layers,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
    }


def without_biases(shape: DecoderShape) -> DecoderShape:
    return replace(shape, qkv_bias=False, output_bias=False, mlp_bias=False)
