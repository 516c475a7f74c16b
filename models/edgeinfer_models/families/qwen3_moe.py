"""Qwen 3 with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family
from edgeinfer_models.families.qwen2_moe import (
    experts_from_gguf,
    experts_from_hf,
    experts_to_gguf,
    experts_to_hf,
)
from edgeinfer_models.families.qwen3 import FAMILY as QWEN3
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    return replace(QWEN3.from_hf(shape, values), experts=experts_from_hf(values))


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.experts is not None
    return {**QWEN3.to_hf(shape), **experts_to_hf(shape.experts)}


def from_gguf(shape: DecoderShape, header: GgufHeader) -> DecoderShape:
    experts = experts_from_gguf(header, renormalizes=True)
    return replace(QWEN3.from_gguf(shape, header), experts=experts)


def to_gguf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.experts is not None
    return experts_to_gguf(shape.experts, renormalizes=True)


FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    hf_class="Qwen3MoeForCausalLM",
    arch="qwen3moe",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
    to_gguf=to_gguf,
)
