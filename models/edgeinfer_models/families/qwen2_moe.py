"""Qwen 1.5 and 2 with experts: small ones, and one that every token goes through by its own gate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import UnsupportedModel
from edgeinfer_models.families.family import Family
from edgeinfer_models.families.qwen2 import FAMILY as QWEN2
from edgeinfer_models.families.shape import DecoderShape, Experts
from edgeinfer_models.families.values import HfValues

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    shape = QWEN2.from_hf(replace(shape), values)
    return replace(
        shape,
        experts=experts_from_hf(values, shared_width=values.size("shared_expert_intermediate_size")),
    )


def experts_from_hf(values: HfValues, shared_width: int = 0) -> Experts:
    """Raises UnsupportedModel where some layers have experts and others none."""
    if values.size("decoder_sparse_step", 1) != 1 or values.list_of("mlp_only_layers", int):
        raise UnsupportedModel("some layers of this model have experts and others none: not supported")
    return Experts(
        values.size("num_experts"),
        values.size("num_experts_per_tok"),
        values.size("moe_intermediate_size"),
        renormalizes=values.flag("norm_topk_prob"),
        shared_width=shared_width,
        gates_shared=shared_width > 0,
    )


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.experts is not None
    return {
        **QWEN2.to_hf(shape),
        **experts_to_hf(shape.experts),
        "shared_expert_intermediate_size": shape.experts.shared_width,
    }


def experts_to_hf(experts: Experts) -> dict[str, Any]:
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.used,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.renormalizes,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def from_gguf(shape: DecoderShape, header: GgufHeader) -> DecoderShape:
    experts = experts_from_gguf(header, renormalizes=False)
    return replace(QWEN2.from_gguf(shape, header), experts=experts)


def experts_from_gguf(header: GgufHeader, *, renormalizes: bool) -> Experts:
    shared = header.tensor("blk.0.ffn_gate_shexp.weight")
    each = header.tensor("blk.0.ffn_gate_exps.weight")
    return Experts(
        header.get_int("{arch}.expert_count"),
        header.get_int("{arch}.expert_used_count"),
        each.shape[1] if each is not None and len(each.shape) == 3 else 0,
        renormalizes=renormalizes,
        shared_width=0 if shared is None else shared.shape[1],
        gates_shared=header.tensor("blk.0.ffn_gate_inp_shexp.weight") is not None,
    )


def to_gguf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.experts is not None
    return {
        **experts_to_gguf(shape.experts, renormalizes=False),
        "expert_shared_feed_forward_length": shape.experts.shared_width,
    }


def experts_to_gguf(experts: Experts, *, renormalizes: bool) -> dict[str, Any]:
    """renormalizes: what llama.cpp does in this architecture, whatever the file says."""
    if experts.renormalizes != renormalizes:
        raise UnsupportedModel(
            "llama.cpp weighs the experts of this architecture otherwise ('norm_topk_prob'): its answers"
            " would be wrong"
        )
    return {
        "expert_count": experts.count,
        "expert_used_count": experts.used,
        "expert_feed_forward_length": experts.width,
    }


FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    hf_class="Qwen2MoeForCausalLM",
    arch="qwen2moe",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
    to_gguf=to_gguf,
)
