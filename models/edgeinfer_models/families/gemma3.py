"""Gemma 3, text (arXiv:2503.19786): a Gemma 2 with norms of queries and keys in place of the squashing,
five layers with a sliding window to each that sees everything, and RoPE of another base in those."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family
from edgeinfer_models.families.gemma2 import (
    gemma_from_hf,
    gemma_to_gguf,
    gemma_to_hf,
    of_gemma,
    scale_of_llama_cpp,
    windows_of,
)
from edgeinfer_models.families.rope import rope_from_hf, rope_to_hf
from edgeinfer_models.families.shape import DecoderShape, Rope
from edgeinfer_models.families.values import HfValues, gguf_float

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader

PERIOD = 6
DEFAULT_WINDOW = 4096
LAYERS_OF_27B = 62
BASE, SLIDING_BASE = 1_000_000.0, 10_000.0


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    shape = gemma_from_hf(shape, values, PERIOD, DEFAULT_WINDOW)
    rope = shape.rope
    if not values.has("rope_theta") and not values.has("rope_parameters"):
        rope = replace(rope, base=BASE)
    sliding = Rope(values.number("rope_local_base_freq", SLIDING_BASE), rope.dim)
    if values.table("rope_parameters").has("sliding_attention"):
        sliding = rope_from_hf(values, rope.dim, layers="sliding_attention")
    return replace(
        shape,
        rope=rope,
        rope_sliding=sliding,
        qk_norm="head",
        logit_softcap=values.switch("final_logit_softcapping", 0.0),
    )


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.rope_sliding is not None
    return {
        **gemma_to_hf(shape),
        "model_type": "gemma3_text",
        "final_logit_softcapping": shape.logit_softcap or None,
        "rope_local_base_freq": shape.rope_sliding.base,
        "rope_parameters": {
            "full_attention": rope_to_hf(shape.rope),
            "sliding_attention": rope_to_hf(shape.rope_sliding),
        },
    }


def from_gguf(shape: DecoderShape, header: GgufHeader) -> DecoderShape:
    window = header.get_int("{arch}.attention.sliding_window", DEFAULT_WINDOW)
    shape = of_gemma(shape, window, windows_of(shape.num_layers, PERIOD))
    sliding_base = gguf_float(header, "{arch}.rope.freq_base_swa", SLIDING_BASE)
    return replace(
        shape,
        attention_scale=scale_of_llama_cpp(shape, LAYERS_OF_27B),
        rope_sliding=Rope(sliding_base, shape.rope.dim),
        qk_norm="head",
        logit_softcap=gguf_float(header, "{arch}.final_logit_softcapping", 0.0),
    )


def to_gguf(shape: DecoderShape) -> dict[str, Any]:
    assert shape.rope_sliding is not None
    found = {
        **gemma_to_gguf(shape, PERIOD, LAYERS_OF_27B),
        "rope.freq_base_swa": shape.rope_sliding.base,
    }
    if shape.logit_softcap:
        found["final_logit_softcapping"] = shape.logit_softcap
    return found


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    hf_class="Gemma3ForCausalLM",
    arch="gemma3",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
    to_gguf=to_gguf,
    reads_windows=True,
)
