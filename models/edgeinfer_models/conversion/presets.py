"""Which type each tensor gets in a file of a type such as Q4_K_M: llama.cpp's mixtures.

    types = choose_types("Q4_K_M", {"token_embd.weight": (49152, 576), ...}, facts)

They are what people compare files by, so they are reproduced, whatever else `--budget` may find. Facts
from src/llama-quant.cpp of llama.cpp as packaged in llama-cpp-python 0.3.36; a bar compares every preset
with what llama-quantize writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgeinfer.errors import UsageError
from edgeinfer_models.config import FILE_TYPES
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME

Role = Literal[
    "output", "embeddings", "qkv", "kv_b", "v", "k", "q", "attention output", "up", "gate", "down",
    "other",
]  # fmt: skip
# What most tensors are; other presets are called as their type.
_BASE = {
    "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S",
}  # fmt: skip
PRESETS: tuple[str, ...] = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S",
    "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M",
    "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
)  # fmt: skip
_TINY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
# Rows that no whole number of blocks of 256 makes up get a type of blocks of 32.
_FALLBACKS = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight",
    "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd",
)  # fmt: skip
_NOT_MATRICES = ("position_embd.weight", "token_types.weight")
_ROLES: tuple[tuple[str, Role], ...] = (
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "kv_b"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attention output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class MixtureFacts:
    """Of a model, what the mixtures go by. heads_per_kv: of attention; experts: 0 in a dense one."""

    architecture: str
    num_layers: int
    heads_per_kv: int
    num_experts: int = 0


def file_type(preset: str) -> int:
    """Its number in `general.file_type`."""
    return next(number for number, name in FILE_TYPES.items() if name == preset)


def choose_types(
    preset: str,
    shapes: Mapping[str, tuple[int, ...]],
    facts: MixtureFacts,
    *,
    has_imatrix: bool = False,
) -> dict[str, str | None]:
    """shapes: of all tensors by their GGUF names, rows first. None: a tensor stays as it is. Raises
    UsageError for a preset that needs an importance matrix and has none."""
    chooser = _Chooser(preset, shapes, facts, has_imatrix)
    # In llama.cpp's order, as some presets count tensors.
    names = sorted(shapes, key=lambda name: (_layer_of(name), name))
    return {name: chooser.choose(name, shapes[name]) for name in names}


def needs_importance(preset: str, name: str, kind: str) -> bool:
    """Whether a tensor of this type, in a file of this preset, would be garbage without it."""
    if _role(name) in ("output", "embeddings"):
        return False
    if kind == "Q2_K":
        return preset == "Q2_K_S"
    return kind in ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")


class _Chooser:
    def __init__(
        self,
        preset: str,
        shapes: Mapping[str, tuple[int, ...]],
        facts: MixtureFacts,
        has_imatrix: bool,
    ) -> None:
        self._preset = preset
        self._base = _BASE.get(preset, preset)
        self._facts = facts
        self._has_imatrix = has_imatrix
        self._is_tied = "output.weight" not in shapes
        self._num_v = sum(_role(name) in ("qkv", "kv_b", "v") for name in shapes)
        self._seen = {"v": 0, "down": 0, "gate": 0, "up": 0}

    def choose(self, name: str, shape: tuple[int, ...]) -> str | None:
        if not _is_quantized(name, shape):
            return None
        role = _role(name)
        found = self._mixed(role, name, shape[-1])
        found = _fitting(found, shape[-1])
        if not self._has_imatrix and needs_importance(self._preset, name, found):
            raise UsageError(
                f"--type {self._preset.lower()} needs to know which weights matter (tensor '{name}');"
                " give an importance matrix with --imatrix FILE, or take q3_k_m or larger"
            )
        return found

    def _mixed(self, role: Role, name: str, width: int) -> str:
        if role == "output" or (role == "embeddings" and self._is_tied):
            return self._output(width)
        if role == "embeddings":
            return self._embeddings()
        if self._preset in _TINY:
            return self._tiny(role)
        if role in ("qkv", "kv_b", "v"):
            return self._value(role)
        if role == "k" and self._facts.num_experts == 8:
            return "Q8_0"
        if role in ("k", "q"):
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self._preset, self._base)
        if role == "down":
            return self._down(self._place(role, name))
        if role == "attention output":
            return self._attention_output()
        if role in ("gate", "up"):
            layer = self._place(role, name)
            eighth, num = self._facts.num_layers // 8, self._facts.num_layers
            is_inner = eighth <= layer < 7 * num // 8
            return "IQ3_XXS" if self._preset == "IQ3_XS" and is_inner else self._base
        return self._base

    def _output(self, width: int) -> str:
        if self._facts.architecture == "falcon" or width % GGML_TYPES_BY_NAME[self._base].block:
            return "Q8_0"
        if self._preset in (*_TINY, "IQ3_XXS"):
            return "Q5_K"
        return "Q8_0" if self._base == "Q8_0" else "Q6_K"

    def _embeddings(self) -> str:
        if self._preset in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if self._preset in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if self._preset in ("TQ1_0", "TQ2_0") else self._base

    def _tiny(self, role: Role) -> str:
        facts, is_larger = self._facts, self._preset in ("IQ2_S", "IQ2_M")
        if role in ("qkv", "kv_b", "v"):
            self._seen["v"] += 1
            if facts.heads_per_kv >= 4 or facts.num_experts >= 4:
                return "Q4_K"
            return "IQ3_S" if is_larger else "Q2_K"
        if role == "k" and facts.num_experts == 8:
            return "Q4_K"
        if role == "down":
            self._seen["down"] += 1
            is_early = self._seen["down"] - 1 < facts.num_layers // 8
            return ("IQ3_S" if is_larger else "Q2_K") if is_early else self._base
        if role == "attention output":
            if facts.num_experts == 8:
                return "Q5_K"
            if self._preset in ("IQ1_S", "IQ1_M"):
                return "IQ2_XXS"
            return "IQ3_S" if is_larger else self._base
        return self._base

    def _value(self, role: Role) -> str:
        preset, facts = self._preset, self._facts
        place, shared = self._seen["v"], facts.heads_per_kv >= 4
        self._seen["v"] += 1
        found = self._base
        if preset == "Q2_K":
            found = "Q4_K" if shared else "Q3_K"
        elif preset == "Q2_K_S" and shared:
            found = "Q4_K"
        elif preset == "IQ3_XXS":
            found = "Q4_K" if shared else ("IQ3_XXS" if self._has_imatrix else "IQ3_S")
        elif (preset in ("IQ3_XS", "IQ3_S") and shared) or preset == "IQ3_M":
            found = "Q4_K"
        elif preset == "Q3_K_M":
            found = "Q5_K" if place < 2 else "Q4_K"
        elif preset == "Q3_K_L" or (preset in ("IQ4_NL", "IQ4_XS") and shared):
            found = "Q5_K"
        elif preset in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(place, self._num_v):
            found = "Q6_K"
        elif preset == "Q4_K_S" and place < 4:
            found = "Q5_K"
        is_70b = facts.architecture == "llama" and facts.num_layers == 80 and facts.heads_per_kv != 1
        if is_70b and found in ("Q3_K", "Q4_K"):
            found = "Q5_K"
        return "Q8_0" if facts.num_experts == 8 else found

    def _down(self, layer: int) -> str:
        preset, num = self._preset, self._facts.num_layers
        is_falcon = self._facts.architecture == "falcon"
        early, more = layer < num // 8, _gets_more_bits(layer, num)
        if preset == "Q2_K":
            return "Q3_K"
        if preset == "Q2_K_S":
            return "Q4_K" if early else self._base
        if preset == "IQ3_XXS" and not self._has_imatrix:
            return "Q4_K" if early else "Q3_K"
        if preset == "Q3_K_M":
            if layer < num // 16:
                return "Q5_K"
            return "Q4_K" if not is_falcon or more else "Q3_K"
        if preset == "IQ3_M" and (early or (self._facts.num_experts == 8 and more)):
            return "Q4_K"
        if preset == "Q3_K_L":
            return "Q4_K" if is_falcon else "Q5_K"
        if preset == "Q4_K_M" and is_falcon:
            return "Q6_K" if layer < num // 16 else ("Q5_K" if more else "Q4_K")
        if preset in ("Q4_K_M", "Q5_K_M") and more:
            return "Q6_K"
        if preset in ("IQ4_NL", "IQ4_XS") and early and not self._has_imatrix:
            return "Q5_K"
        if preset == "Q4_K_S" and early and not is_falcon:
            return "Q5_K"
        if preset in ("Q4_0", "Q5_0") and early and self._has_imatrix:
            return "Q4_1" if preset == "Q4_0" else "Q5_1"
        return self._base

    def _attention_output(self) -> str:
        preset, facts = self._preset, self._facts
        if facts.architecture == "falcon":
            return "Q4_K" if preset == "Q3_K_L" else self._base
        if facts.num_experts == 8:
            raised = (
                "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S",
                "IQ3_M", "IQ4_XS",
            )  # fmt: skip
            return "Q5_K" if preset in raised else self._base
        other = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return other.get(preset, self._base)

    def _place(self, role: Literal["down", "gate", "up"], name: str) -> int:
        """Its layer: by counting, but for experts, of which there may be several tensors."""
        self._seen[role] += 1
        return _layer_of(name) if self._facts.num_experts > 1 else self._seen[role] - 1


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    num_dims = len(shape)
    while num_dims > 1 and shape[len(shape) - num_dims] == 1:  # ggml does not count those
        num_dims -= 1
    return (
        num_dims >= 2
        and name.endswith("weight")
        and name not in _NOT_MATRICES
        and not any(part in name for part in _KEPT)
    )


def _role(name: str) -> Role:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embeddings"
    return next((role for part, role in _ROLES if part in name), "other")


def _layer_of(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _gets_more_bits(place: int, count: int) -> bool:
    """The first and the last eighth, and every third between."""
    return place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2


def _fitting(kind: str, width: int) -> str:
    """A type whose blocks make up rows of this width."""
    if width % GGML_TYPES_BY_NAME[kind].block == 0:
        return kind
    smaller = _FALLBACKS.get(kind, "F16")
    return smaller if width % GGML_TYPES_BY_NAME[smaller].block == 0 else "F16"
