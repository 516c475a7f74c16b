"""Granite 3 and 4, dense: a Llama with four factors in its sums (maximal update parametrization)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues, gguf_float

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    divisor = values.number("logits_scaling", 1.0)
    if divisor == 0.0:
        raise values.invalid("'logits_scaling' is 0")
    return replace(
        shape,
        embedding_scale=values.number("embedding_multiplier", 1.0),
        residual_scale=values.number("residual_multiplier", 1.0),
        attention_scale=values.number("attention_multiplier", 1.0),
        logit_divisor=divisor,
    )


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    return {
        "attention_bias": shape.qkv_bias,
        "mlp_bias": shape.mlp_bias,
        "embedding_multiplier": shape.embedding_scale,
        "residual_multiplier": shape.residual_scale,
        "attention_multiplier": shape.attention_scale or shape.head_dim**-0.5,
        "logits_scaling": shape.logit_divisor,
    }


def from_gguf(shape: DecoderShape, header: GgufHeader) -> DecoderShape:
    return replace(
        shape,
        embedding_scale=gguf_float(header, "{arch}.embedding_scale") or 1.0,
        residual_scale=gguf_float(header, "{arch}.residual_scale") or 1.0,
        attention_scale=gguf_float(header, "{arch}.attention.scale"),
        logit_divisor=gguf_float(header, "{arch}.logit_scale") or 1.0,
    )


def to_gguf(shape: DecoderShape) -> dict[str, Any]:
    return {
        "embedding_scale": shape.embedding_scale,
        "residual_scale": shape.residual_scale,
        "attention.scale": shape.attention_scale or shape.head_dim**-0.5,
        "logit_scale": shape.logit_divisor,
    }


FAMILY = Family(
    name="granite",
    model_types=("granite",),
    hf_class="GraniteForCausalLM",
    arch="granite",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
    to_gguf=to_gguf,
    pairs_rows=True,
)
