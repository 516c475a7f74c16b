"""OLMo 2 (arXiv:2501.00656): norms behind the halves of a layer, and over all of queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family, without_biases
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, _: HfValues) -> DecoderShape:
    return replace(shape, norms="after", qk_norm="whole", mlp_bias=False)


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    return {"attention_bias": shape.qkv_bias}


def from_gguf(shape: DecoderShape, _: GgufHeader) -> DecoderShape:
    return replace(without_biases(shape), norms="after", qk_norm="whole")


FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    hf_class="Olmo2ForCausalLM",
    arch="olmo2",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
)
