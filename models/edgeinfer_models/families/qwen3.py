"""Qwen 3, dense: norms over each head of queries and keys in place of Qwen 2's biases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family
from edgeinfer_models.families.qwen2 import to_hf as qwen2_to_hf
from edgeinfer_models.families.qwen2 import with_late_windows
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    return with_late_windows(replace(shape, qk_norm="head", mlp_bias=False), values)


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    return {**qwen2_to_hf(shape), "attention_bias": shape.qkv_bias}


def from_gguf(shape: DecoderShape, _: GgufHeader) -> DecoderShape:
    return replace(shape, qk_norm="head", mlp_bias=False)


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    hf_class="Qwen3ForCausalLM",
    arch="qwen3",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
)
