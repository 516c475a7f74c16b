"""RoPE and its scalings, between config.json, GGUF metadata and the frequencies themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.families.shape import Rope, RopeScaling
from edgeinfer_models.families.values import HfValues, gguf_float

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader

DEFAULT_BASE = 10_000.0
# (factor, low, high, original context) of the models that were published with Llama 3's scaling: GGUF
# keeps only the factors that come of them.
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 4.0, 8192))


# -- frequencies -----------------------------------------------------------------------------------


def frequencies(rope: Rope) -> list[float]:
    """Radians for each position, of each pair of entries: dim / 2 of them, unscaled."""
    return [rope.base ** (-2.0 * i / rope.dim) for i in range(rope.dim // 2)]


def llama3_factors(rope: Rope) -> list[float]:
    """What each frequency is divided by: 1 for the high ones, `factor` for the low ones, and a ramp
    between them. Source: the reference code of Llama 3.1."""
    scaling = rope.scaling
    assert scaling is not None and scaling.kind == "llama3"
    longest = scaling.original_context / scaling.low_freq_factor
    shortest = scaling.original_context / scaling.high_freq_factor
    factors = []
    for frequency in frequencies(rope):
        wave = 2.0 * math.pi / frequency
        if wave < shortest:
            factors.append(1.0)
        elif wave > longest:
            factors.append(scaling.factor)
        else:
            ramp = (scaling.original_context / wave - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1.0 / ((1.0 - ramp) / scaling.factor + ramp))
    return factors


def longrope_attention_factor(context: int, original: int) -> float:
    """Of queries and keys, where a longer context than the original was trained for. Source: Phi 3's
    reference code."""
    if context <= original:
        return 1.0
    return math.sqrt(1.0 + math.log(context / original) / math.log(original))


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """Of queries and keys. Source: Peng et al. 2023, arXiv:2309.00071."""
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1.0 else 1.0


# -- config.json -----------------------------------------------------------------------------------


def rope_from_hf(values: HfValues, dim: int, *, layers: str = "full_attention") -> Rope:
    """Of the layers of one kind, where config.json tells them apart. Reads `rope_parameters` (newer
    files) or `rope_theta` and `rope_scaling`. Raises ModelFileInvalid, UnsupportedModel."""
    parameters = values.table("rope_parameters")
    if parameters.has(layers):
        parameters = parameters.table(layers)
    base = parameters.number("rope_theta", values.number("rope_theta", DEFAULT_BASE))
    if base <= 1.0:
        raise values.invalid(f"'rope_theta' is {base}")
    if not parameters.has("rope_type"):
        parameters = values.table("rope_scaling")
    return Rope(base, dim, _scaling_from_hf(parameters, values, dim))


def _scaling_from_hf(given: HfValues, values: HfValues, dim: int) -> RopeScaling | None:
    kind = given.text("rope_type", given.text("type", "default"))
    original = given.size(
        "original_max_position_embeddings",
        values.size(
            "original_max_position_embeddings", values.size("max_position_embeddings", 0, least=0)
        ),
        least=0,
    )
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _factor(given))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            _factor(given),
            original,
            low_freq_factor=given.number("low_freq_factor", 1.0),
            high_freq_factor=given.number("high_freq_factor", 4.0),
        )
    if kind == "yarn":
        if not given.flag("truncate", True):
            raise UnsupportedModel("YaRN without rounded ends of its ramp ('truncate') is not supported")
        factor = _factor(given)
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=given.number("beta_fast", 32.0),
            beta_slow=given.number("beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(given, factor),
        )
    if kind in ("longrope", "su"):
        return RopeScaling(
            "longrope",
            given.number("factor", 1.0),
            original,
            attention_factor=given.number("attention_factor", 0.0),
            long_factors=_factors(given, "long_factor", dim),
            short_factors=_factors(given, "short_factor", dim),
        )
    raise UnsupportedModel(f"RoPE scaling of the type '{kind[:40]}' is not supported")


def _yarn_attention_factor(given: HfValues, factor: float) -> float:
    """0: what the method says."""
    whole, parts = given.switch("mscale", 0.0), given.switch("mscale_all_dim", 0.0)
    if given.has("attention_factor") or not (whole and parts):
        return given.switch("attention_factor", 0.0)
    return yarn_attention_factor(factor, whole) / yarn_attention_factor(factor, parts)


def _factor(given: HfValues) -> float:
    factor = given.number("factor")
    if factor < 1.0:
        raise given.invalid(f"'factor' is {factor}")
    return factor


def _factors(given: HfValues, key: str, dim: int) -> tuple[float, ...]:
    found = given.list_of(key, float)
    if found is None or len(found) != dim // 2 or not all(0.0 < each < 1e6 for each in found):
        raise given.invalid(f"'{key}' is not a list of {dim // 2} factors")
    return tuple(float(each) for each in found)


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` as config.json has them."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": rope.base}
    found: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": rope.base}
    if scaling.kind != "longrope":
        found["factor"] = scaling.factor
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        found["low_freq_factor"] = scaling.low_freq_factor
        found["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        found["beta_fast"], found["beta_slow"] = scaling.beta_fast, scaling.beta_slow
    if scaling.kind == "longrope":
        found["long_factor"] = list(scaling.long_factors)
        found["short_factor"] = list(scaling.short_factors)
    if scaling.attention_factor:
        found["attention_factor"] = scaling.attention_factor
    return found


# -- GGUF ------------------------------------------------------------------------------------------


def rope_to_gguf(rope: Rope, context: int) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """Metadata (names after the architecture's) and tensors of factors. context: that it was trained
    for, which LongRoPE's attention factor follows from."""
    values: dict[str, Any] = {"rope.dimension_count": rope.dim, "rope.freq_base": rope.base}
    tensors: dict[str, Sequence[float]] = {}
    scaling = rope.scaling
    if scaling is None:
        return values, tensors
    if scaling.kind == "llama3":
        return values, {"rope_freqs.weight": llama3_factors(rope)}
    values["rope.scaling.type"] = scaling.kind
    if scaling.kind in ("linear", "yarn"):
        values["rope.scaling.factor"] = scaling.factor
    if scaling.kind in ("yarn", "longrope"):
        values["rope.scaling.original_context_length"] = scaling.original_context
    if scaling.kind == "yarn":
        values["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
        values["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
        if scaling.attention_factor:
            # llama.cpp multiplies this by the method's own.
            own = yarn_attention_factor(scaling.factor)
            values["rope.scaling.attn_factor"] = scaling.attention_factor / own
    if scaling.kind == "longrope":
        values["rope.scaling.attn_factor"] = scaling.attention_factor or longrope_attention_factor(
            context, scaling.original_context
        )
        tensors["rope_factors_long.weight"] = scaling.long_factors
        tensors["rope_factors_short.weight"] = scaling.short_factors
    return values, tensors


def rope_from_gguf(header: GgufHeader, dim: int, factors: Mapping[str, Sequence[float]]) -> Rope:
    """factors: the tensors that `rope_to_gguf` names, as far as the file has them. Raises
    UnsupportedModel for factors nobody published a scaling for."""
    base = gguf_float(header, "{arch}.rope.freq_base", DEFAULT_BASE)
    if base <= 1.0:
        raise ModelFileInvalid(f"{header.path.name}: 'rope.freq_base' is {base}; download it again")
    rope = Rope(base, header.get_int("{arch}.rope.dimension_count", dim))
    original = header.get_int("{arch}.rope.scaling.original_context_length")
    kind = header.get_str("{arch}.rope.scaling.type", "none")
    factor = gguf_float(header, "{arch}.rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in factors:
        return _named_llama3(rope, factors["rope_freqs.weight"], header.path.name)
    if "rope_factors_long.weight" in factors:
        if "rope_factors_short.weight" not in factors:
            raise ModelFileInvalid(
                f"{header.path.name}: has 'rope_factors_long.weight' and no short ones; download it"
                " again"
            )
        scaling = RopeScaling(
            "longrope",
            original_context=original,
            attention_factor=gguf_float(header, "{arch}.rope.scaling.attn_factor", 0.0),
            long_factors=tuple(factors["rope_factors_long.weight"]),
            short_factors=tuple(factors["rope_factors_short.weight"]),
        )
        return replace(rope, scaling=scaling)
    if kind == "linear" and factor != 1.0:
        return replace(rope, scaling=RopeScaling("linear", factor))
    if kind == "yarn":
        scaling = RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=gguf_float(header, "{arch}.rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=gguf_float(header, "{arch}.rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=gguf_float(header, "{arch}.rope.scaling.attn_factor", 0.0)
            * yarn_attention_factor(factor),
        )
        return replace(rope, scaling=scaling)
    return rope


def _named_llama3(rope: Rope, factors: Sequence[float], name: str) -> Rope:
    """The scaling that these factors come of."""
    for factor, low, high, original in _LLAMA3:
        scaling = RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
        found = replace(rope, scaling=scaling)
        expected = llama3_factors(found)
        if len(expected) == len(factors) and all(
            math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, factors, strict=True)
        ):
            return found
    if all(each == 1.0 for each in factors):
        return rope
    raise UnsupportedModel(
        f"{name}: its RoPE factors ('rope_freqs.weight') are of no scaling that is known by name"
    )
