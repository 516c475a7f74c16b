"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer_models.families.family import Family
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    shape = replace(shape, qkv_bias=True, output_bias=False, mlp_bias=False)
    return with_late_windows(shape, values)


def with_late_windows(shape: DecoderShape, values: HfValues) -> DecoderShape:
    """The layers from `max_window_layers` on have a sliding window, if it is switched on."""
    if not values.flag("use_sliding_window"):
        return shape
    first = values.size("max_window_layers", 0, least=0)
    kinds = values.list_of("layer_types", str)
    if kinds is None:
        kinds = ["sliding_attention" if i >= first else "" for i in range(shape.num_layers)]
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return replace(shape, window=values.size("sliding_window"), sliding=sliding)


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    if not any(shape.sliding):
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": shape.window,
        "max_window_layers": shape.sliding.index(True),
    }


def from_gguf(shape: DecoderShape, _: GgufHeader) -> DecoderShape:
    return replace(shape, qkv_bias=True, output_bias=False, mlp_bias=False)


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    hf_class="Qwen2ForCausalLM",
    arch="qwen2",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
)
