"""Mistral 7B and its kin: a Llama, in the first version with a sliding window. Its GGUF is a Llama's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeinfer_models.families.family import Family, without_biases
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.values import HfValues


def from_hf(shape: DecoderShape, values: HfValues) -> DecoderShape:
    return with_window(without_biases(shape), values)


def with_window(shape: DecoderShape, values: HfValues) -> DecoderShape:
    """In all layers, if config.json has one."""
    window = values.size("sliding_window", 0, least=0)
    return replace(shape, window=window, sliding=(True,) * shape.num_layers) if window else shape


def to_hf(shape: DecoderShape) -> dict[str, Any]:
    return {"sliding_window": shape.window or None}


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    hf_class="MistralForCausalLM",
    arch="llama",
    from_hf=from_hf,
    to_hf=to_hf,
    is_of=lambda _: False,  # nothing in the file tells it from a Llama, and nothing needs to
    pairs_rows=True,
)
