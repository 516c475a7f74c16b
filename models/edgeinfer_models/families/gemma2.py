"""Gemma 2 (arXiv:2408.00118): norms on both sides of each half of a layer, every other layer with a
sliding window, and scores and logits that are squashed by tanh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import UnsupportedModel
from edgeinfer_models.families.family import Family, without_biases
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues, gguf_float

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader

PERIOD = 2  # of the layers: one of so many sees everything, the last of each
DEFAULT_WINDOW = 4096
LAYERS_OF_27B = 46
SOFTCAPS = (50.0, 30.0)


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    shape = gemma_from_hf(shape, values, PERIOD, DEFAULT_WINDOW)
    return replace(
        shape,
        attention_softcap=values.switch("attn_logit_softcapping", SOFTCAPS[0]),
        logit_softcap=values.switch("final_logit_softcapping", SOFTCAPS[1]),
    )


def gemma_from_hf(
    shape: DecoderShape, values: HfValues, period: int, default_window: int
) -> DecoderShape:
    """What Gemma 2 and 3 have in common."""
    scalar = values.number("query_pre_attn_scalar", 256.0)
    if scalar <= 0.0:
        raise values.invalid(f"'query_pre_attn_scalar' is {scalar}")
    kinds = values.list_of("layer_types", str)
    sliding = windows_of(shape.num_layers, values.size("sliding_window_pattern", period))
    if kinds is not None:
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return replace(
        of_gemma(shape, values.size("sliding_window", default_window), sliding),
        is_tied=values.flag("tie_word_embeddings", True),
        attention_scale=0.0 if scalar == shape.head_dim else scalar**-0.5,
    )


def windows_of(num_layers: int, period: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % period != 0 for layer in range(num_layers))


def of_gemma(shape: DecoderShape, window: int, sliding: Sequence[bool]) -> DecoderShape:
    return replace(
        without_biases(shape),
        activation="gelu_tanh",
        norms="around",
        adds_one_to_norms=True,
        embedding_scale=math.sqrt(shape.hidden_size),
        window=window,
        sliding=tuple(sliding),
    )


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    return {
        **gemma_to_hf(shape),
        "attn_logit_softcapping": shape.attention_softcap or None,
        "final_logit_softcapping": shape.logit_softcap or None,
    }


def gemma_to_hf(shape: DecoderShape) -> dict[str, Any]:
    scale = shape.attention_scale
    kinds = ["sliding_attention" if slides else "full_attention" for slides in shape.sliding]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.head_dim if not scale else round(scale**-2, 6),
        "sliding_window": shape.window,
        "layer_types": kinds,
        "attention_bias": False,
    }


def from_gguf(shape: DecoderShape, header: GgufHeader) -> DecoderShape:
    window = header.get_int("{arch}.attention.sliding_window", DEFAULT_WINDOW)
    shape = of_gemma(shape, window, windows_of(shape.num_layers, PERIOD))
    return replace(
        shape,
        attention_scale=scale_of_llama_cpp(shape, LAYERS_OF_27B),
        attention_softcap=gguf_float(header, "{arch}.attn_logit_softcapping", SOFTCAPS[0]),
        logit_softcap=gguf_float(header, "{arch}.final_logit_softcapping", SOFTCAPS[1]),
    )


def scale_of_llama_cpp(shape: DecoderShape, layers_of_27b: int) -> float:
    """It knows the 27B model by its layers, whose scale is that of another head size."""
    is_27b = shape.num_layers == layers_of_27b
    return (shape.hidden_size / shape.num_heads) ** -0.5 if is_27b else 0.0


def to_gguf(shape: DecoderShape) -> dict[str, Any]:
    return {
        **gemma_to_gguf(shape, PERIOD, LAYERS_OF_27B),
        "attn_logit_softcapping": shape.attention_softcap,
        "final_logit_softcapping": shape.logit_softcap,
    }


def gemma_to_gguf(shape: DecoderShape, period: int, layers_of_27b: int) -> dict[str, Any]:
    """Raises UnsupportedModel for what llama.cpp takes for granted and this model has otherwise."""
    expected = scale_of_llama_cpp(shape, layers_of_27b) or shape.head_dim**-0.5
    if not math.isclose(shape.attention_scale or shape.head_dim**-0.5, expected, rel_tol=1e-4):
        raise UnsupportedModel(
            f"llama.cpp scales the attention of a {shape.family} of {shape.num_layers} layers otherwise"
            " ('query_pre_attn_scalar'): its answers would be wrong"
        )
    if shape.sliding != windows_of(shape.num_layers, period):
        raise UnsupportedModel(
            f"llama.cpp expects all but every {period}th layer of a {shape.family} to have a sliding"
            " window ('layer_types')"
        )
    return {"attention.sliding_window": shape.window}


FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    hf_class="Gemma2ForCausalLM",
    arch="gemma2",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=from_gguf,
    to_gguf=to_gguf,
    reads_windows=True,
)
