"""Mixtral 8x7B and 8x22B (Jiang et al. 2024, arXiv:2401.04088): a Mistral with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family, without_biases
from edgeinfer_models.families.mistral import to_hf as mistral_to_hf
from edgeinfer_models.families.mistral import with_window
from edgeinfer_models.families.shape import DecoderShape, Experts
from edgeinfer_models.families.values import HfValues

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    count, used = values.size("num_local_experts"), values.size("num_experts_per_tok", 2)
    experts = Experts(count, used, shape.intermediate_size, renormalizes=True)
    return with_window(replace(without_biases(shape), experts=experts), values)


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.experts is not None
    return {
        **mistral_to_hf(shape),
        "num_local_experts": shape.experts.count,
        "num_experts_per_tok": shape.experts.used,
    }


def from_gguf(shape: DecoderShape, header: GgufHeader) -> DecoderShape:
    experts = Experts(
        header.get_int("{arch}.expert_count"),
        header.get_int("{arch}.expert_used_count"),
        shape.intermediate_size,
        renormalizes=True,
    )
    return replace(without_biases(shape), experts=experts)


def to_gguf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.experts is not None
    return {"expert_count": shape.experts.count, "expert_used_count": shape.experts.used}


FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    hf_class="MixtralForCausalLM",
    arch="llama",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
    to_gguf=to_gguf,
    is_of=lambda header: header.get_int("{arch}.expert_count") > 0,
    pairs_rows=True,
)
