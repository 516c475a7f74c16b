"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways they are stretched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeinfer_models.families.rope import (
    frequencies,
    llama3_factors,
    longrope_attention_factor,
    yarn_attention_factor,
)
from edgeinfer_models.families.shape import Rope, RopeScaling


class Rotary:
    """cos and sin of every position up to `context`, shape (context, dim), float32.

    context: LongRoPE takes its long factors where it is larger than the original one, at every position,
    as llama.cpp does: what is in a KV cache must not change its meaning when one more token comes.
    trained: the context the model was trained for.
    """

    def __init__(self, rope: Rope, context: int, trained: int, device: torch.device) -> None:
        per_position, factor = _stretched(rope, context, trained)
        positions = torch.arange(context, dtype=torch.float64)
        angles = torch.outer(positions, torch.tensor(per_position, dtype=torch.float64))
        both = torch.cat((angles, angles), dim=-1)
        self.dim = rope.dim
        self._factor = factor
        self._cos = (both.cos() * factor).to(device, torch.float32)
        self._sin = (both.sin() * factor).to(device, torch.float32)

    def turn(self, heads: Tensor, positions: Tensor) -> Tensor:
        """heads: (n, heads, head_dim); positions: (n,). Entry i goes with entry i + dim / 2; those past
        `dim` stay."""
        cos, sin = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        return self._rotated(heads, cos, sin)

    def turn_back(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys that were turned for positions p, as those at p - by have them. keys: (kv_heads, n,
        head_dim); by: (n,) or (kv_heads, n). What cos and sin are multiplied by, keys have already."""
        cos, sin = self._cos[by] / self._factor, -self._sin[by] / self._factor
        return self._rotated(keys, cos, sin)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., : self.dim].float(), x[..., self.dim :]
        half = self.dim // 2
        crossed = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
        found = (turned * cos + crossed * sin).to(x.dtype)
        return torch.cat((found, rest), dim=-1) if rest.shape[-1] else found


def _stretched(rope: Rope, context: int, trained: int) -> tuple[list[float], float]:
    """Radians per position of each pair, and what cos and sin are multiplied by."""
    plain, scaling = frequencies(rope), rope.scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return [each / scaling.factor for each in plain], 1.0
    if scaling.kind == "llama3":
        return [each / by for each, by in zip(plain, llama3_factors(rope), strict=True)], 1.0
    if scaling.kind == "longrope":
        is_long = context > scaling.original_context
        factors = scaling.long_factors if is_long else scaling.short_factors
        factor = scaling.attention_factor or longrope_attention_factor(trained, scaling.original_context)
        return [each / by for each, by in zip(plain, factors, strict=True)], factor
    return _yarn(rope, scaling, plain)


def _yarn(rope: Rope, scaling: RopeScaling, plain: list[float]) -> tuple[list[float], float]:
    """Frequencies that turn often within the original context stay, those that turn little are slowed by
    the factor, and between them is a ramp."""

    def pair_that_turns(times: float) -> float:
        wave = scaling.original_context / (times * 2.0 * math.pi)
        return rope.dim * math.log(wave) / (2.0 * math.log(rope.base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), rope.dim - 1)
    found = []
    for pair, each in enumerate(plain):
        slowed = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        found.append(each * (1.0 - slowed) + each / scaling.factor * slowed)
    factor = scaling.attention_factor or yarn_attention_factor(scaling.factor)
    return found, factor
