"""Which sequence gets how many tokens of the next step. Integers only; knows no model.

There are no phases: a step maps sequences to token counts out of one budget (as in vLLM v1), so the
rest of a prompt in chunks, one token to decode and a draft to verify are the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    """What a running request could use.

    decode: tokens to run at once (1, or 1 + a draft), or 0 while the prompt is not in the cache.
    prompt: prompt tokens still to prefill.
    """

    key: int
    decode: int
    prompt: int


@dataclass(frozen=True)
class Limits:
    step_tokens: int  # most tokens of a step
    stable_chunk: int  # prefill chunks below this many tokens may change results
    prefill_beside_decode: int  # most prompt tokens of a step while somebody waits for a token


def plan(demands: Sequence[Demand], limits: Limits) -> list[tuple[int, int]]:
    """(key, tokens) for the next step, `demands` in order of arrival.

    Whoever decodes comes first and always gets its tokens; prompts share what is left evenly, oldest
    first. A prompt is never cut so that a piece of fewer than `stable_chunk` tokens comes about, and
    every step with a demand moves somebody.
    """
    budget = limits.step_tokens
    allotted: list[tuple[int, int]] = []
    for demand in demands:
        if demand.decode and demand.decode <= budget:
            allotted.append((demand.key, demand.decode))
            budget -= demand.decode
    prompts = [demand for demand in demands if demand.prompt and not demand.decode]
    if allotted and prompts:
        budget = min(budget, max(limits.prefill_beside_decode, limits.stable_chunk))
    for index, demand in enumerate(prompts):
        share = max(budget // (len(prompts) - index), min(limits.stable_chunk, budget))
        tokens = chunk(demand.prompt, share, budget, limits.stable_chunk)
        if tokens:
            allotted.append((demand.key, tokens))
            budget -= tokens
    return allotted


def chunk(remaining: int, share: int, budget: int, stable: int) -> int:
    """Tokens to take of a prompt: about `share`, at most `budget`, leaving no piece below `stable`.

    0 when only a piece that small would fit: the next step has room.
    """
    if remaining <= share:
        return remaining
    take = share
    if remaining - take < stable:
        take = remaining - stable
    if take >= stable:
        return take
    # Too short to be cut in two: all of it or nothing.
    return remaining if remaining <= budget else 0
