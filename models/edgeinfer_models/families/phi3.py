"""Phi 3, 3.5 and 4 mini: a Llama with q, k, v in one matrix and gate and up in another; the long ones
with LongRoPE, Phi 4 mini with RoPE over a part of each head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family, without_biases
from edgeinfer_models.families.mistral import with_window
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    return with_window(replace(without_biases(shape), is_fused=True), values)


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    found: dict[str, Any] = {"sliding_window": shape.window or None}
    scaling = shape.rope.scaling
    if scaling is not None and scaling.original_context:
        found["original_max_position_embeddings"] = scaling.original_context
    return found


def from_gguf(shape: DecoderShape, header: GgufHeader) -> DecoderShape:
    shape = replace(without_biases(shape), is_fused=True)
    window = header.get_int("{arch}.attention.sliding_window")
    return replace(shape, window=window, sliding=(True,) * shape.num_layers) if window else shape


def to_gguf(shape: DecoderShape) -> dict[str, Any]:
    scaling = shape.rope.scaling
    original = scaling.original_context if scaling is not None else 0
    return {
        "attention.sliding_window": shape.window,
        "rope.scaling.original_context_length": original or shape.context_trained,
    }


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    hf_class="Phi3ForCausalLM",
    arch="phi3",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
    to_gguf=to_gguf,
)
