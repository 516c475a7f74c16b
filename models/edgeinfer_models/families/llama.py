"""Llama 1 to 3.x, SmolLM 1 and 2, and whatever else is a plain Llama."""

from __future__ import annotations

from typing import Any

from edgeinfer_models.families.family import Family
from edgeinfer_models.families.shape import DecoderShape


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    return {"attention_bias": shape.qkv_bias, "mlp_bias": shape.mlp_bias}


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    hf_class="LlamaForCausalLM",
    arch="llama",
    to_hf=to_hf,
    is_of=lambda header: not header.get_int("{arch}.expert_count"),
    pairs_rows=True,
)
