"""The tensors of a decoder: their names in both worlds, their shapes, and what changes in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgeinfer.errors import UnsupportedModel
from edgeinfer_models.families.changes import Change
from edgeinfer_models.families.shape import DecoderShape


@dataclass(frozen=True)
class TensorRule:
    """hf: the tensor's name, or those of the tensors that are stacked into the GGUF one (experts).
    shape: of each of them, as Hugging Face has it (rows first; GGUF lists the same backwards).
    heads: what a `pair_rows` change needs. layer: -1 outside the layers."""

    gguf: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    change: Change = "keep"
    heads: int = 0
    layer: int = -1
    is_stack: bool = False

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        """Rows first, as numpy has it."""
        if self.change == "flatten":
            return self.shape[1:]
        return (len(self.hf), *self.shape) if self.is_stack else self.shape


_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class _Part:
    """A tensor of one layer before it has its GGUF name. stacked: where GGUF has a stack, the name that
    its tensor map knows it by."""

    name: str
    shape: tuple[int, ...]
    change: Change = "keep"
    heads: int = 0
    stacked: tuple[str, ...] = ()


def decoder_name(name: str) -> str:
    """Of a Hugging Face tensor: what all families call it, without "model."."""
    own = name.removeprefix("model.")
    if ".block_sparse_moe." in own:
        own = own.replace(".block_sparse_moe.", ".mlp.")
        head, _, rest = own.rpartition(".experts.")
        if head:
            index, which, leaf = rest.split(".")
            own = f"{head}.experts.{index}.{_MIXTRAL[which]}.{leaf}"
    return own


def tensor_rules(shape: DecoderShape, arch: str, *, pairs_rows: bool) -> list[TensorRule]:
    """All tensors of the model, in the order of its layers. arch: GGUF's name of the architecture.
    pairs_rows: llama.cpp turns neighbouring entries there (see changes.py).

    Names come from the `gguf` package's own map. Raises UnsupportedModel where that has none.
    """
    name_of = _Names(arch, shape.num_layers)
    norm: Change = "add_one" if shape.adds_one_to_norms else "keep"
    vocab = (shape.vocab_size, shape.hidden_size)
    rules = [name_of.rule(_Part("model.embed_tokens.weight", vocab))]
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for part in _layer_parts(shape, norm, pairs_rows):
            rules.append(name_of.rule(part, prefix, layer))
    rules.append(name_of.rule(_Part("model.norm.weight", (shape.hidden_size,), norm)))
    if not shape.is_tied:
        rules.append(name_of.rule(_Part("lm_head.weight", vocab)))
    return rules


def _layer_parts(shape: DecoderShape, norm: Change, pairs_rows: bool) -> Iterator[_Part]:
    yield from _norms(shape, norm)
    yield from _attention(shape, norm, "pair_rows" if pairs_rows else "keep")
    if shape.experts is None:
        yield from _feed_forward(shape, "mlp.", shape.intermediate_size)
    else:
        yield from _experts(shape)


def _norms(shape: DecoderShape, norm: Change) -> Iterator[_Part]:
    names = {
        "before": ("input_layernorm", "post_attention_layernorm"),
        "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "around": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    }[shape.norms]
    for name in names:
        yield _Part(f"{name}.weight", (shape.hidden_size,), norm)


def _attention(shape: DecoderShape, norm: Change, turned: Change) -> Iterator[_Part]:
    hidden, q_size, kv_size = shape.hidden_size, shape.q_size, shape.kv_size
    sizes: list[tuple[str, int, Change, int]]
    if shape.is_fused:
        sizes = [("qkv_proj", q_size + 2 * kv_size, "keep", 0)]
    else:
        sizes = [
            ("q_proj", q_size, turned, shape.num_heads),
            ("k_proj", kv_size, turned, shape.num_kv_heads),
            ("v_proj", kv_size, "keep", 0),
        ]
    for name, size, change, heads in sizes:
        yield _Part(f"self_attn.{name}.weight", (size, hidden), change, heads)
        if shape.qkv_bias:
            yield _Part(f"self_attn.{name}.bias", (size,), change, heads)
    yield _Part("self_attn.o_proj.weight", (hidden, q_size))
    if shape.output_bias:
        yield _Part("self_attn.o_proj.bias", (hidden,))
    if shape.qk_norm != "none":
        per_head = shape.qk_norm == "head"
        yield _Part("self_attn.q_norm.weight", (shape.head_dim if per_head else q_size,), norm)
        yield _Part("self_attn.k_norm.weight", (shape.head_dim if per_head else kv_size,), norm)


def _feed_forward(shape: DecoderShape, prefix: str, width: int) -> Iterator[_Part]:
    hidden = shape.hidden_size
    if shape.is_fused:
        yield _Part(f"{prefix}gate_up_proj.weight", (2 * width, hidden))
    else:
        for name in ("gate_proj", "up_proj"):
            yield _Part(f"{prefix}{name}.weight", (width, hidden))
            if shape.mlp_bias:
                yield _Part(f"{prefix}{name}.bias", (width,))
    yield _Part(f"{prefix}down_proj.weight", (hidden, width))
    if shape.mlp_bias:
        yield _Part(f"{prefix}down_proj.bias", (hidden,))


def _experts(shape: DecoderShape) -> Iterator[_Part]:
    experts, hidden = shape.experts, shape.hidden_size
    assert experts is not None
    if shape.family == "mixtral":
        room, names = "block_sparse_moe.", ("w1", "w3", "w2")
    else:
        room, names = "mlp.", ("gate_proj", "up_proj", "down_proj")
    yield _Part(f"{room}gate.weight", (experts.count, hidden))
    for name, known_as in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
        is_down = known_as == "down_proj"
        each = (hidden, experts.width) if is_down else (experts.width, hidden)
        of_each = tuple(f"{room}experts.{index}.{name}.weight" for index in range(experts.count))
        yield _Part(f"mlp.experts.{known_as}.weight", each, stacked=of_each)
    if experts.shared_width:
        yield from _feed_forward(shape, "mlp.shared_expert.", experts.shared_width)
        if experts.gates_shared:
            yield _Part("mlp.shared_expert_gate.weight", (1, hidden), "flatten")


class _Names:
    """GGUF's names of Hugging Face's tensors, by the map in the `gguf` package."""

    def __init__(self, arch: str, num_layers: int) -> None:
        import gguf  # 180 ms, and numpy with it

        known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch not in known:
            raise UnsupportedModel(f"the architecture {arch} is unknown to the gguf package")
        self._arch = arch
        self._map = gguf.get_tensor_name_map(known[arch], num_layers)

    def rule(self, part: _Part, prefix: str = "", layer: int = -1) -> TensorRule:
        found = self._map.get_name(prefix + part.name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModel(f"{self._arch} has no place for a tensor '{prefix}{part.name}'")
        names = tuple(prefix + name for name in part.stacked or (part.name,))
        return TensorRule(
            found, names, part.shape, part.change, part.heads, layer, is_stack=bool(part.stacked)
        )
