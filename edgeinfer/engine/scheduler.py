"""Which sequence gets how many tokens of the next step. Integers only; knows no model.

There are no phases: a step maps sequences to token counts out of one budget (as in vLLM v1), so the
rest of a prompt in chunks, one token to decode and a draft to verify are the same thing.

One rule is there for exactness. A backend may compute steps of `stable_chunk` tokens or more with
another kernel than smaller ones (llama.cpp's flash attention on the CPU does, from 64), whose results
differ in the last bits. So small pieces (tokens to decode, drafts, short ends of prompts) share steps,
a large one (a prefill chunk) has a step to itself, and each request is computed as it would be alone.
Where the backend looks at each sequence's tokens for that choice, and not at the step's, small pieces
share steps of any size.
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
    stable_chunk: int  # steps of fewer tokens and steps of at least as many may differ in last bits
    small_step: int  # most tokens of a step of small pieces, at least 1
    prefill_beside_decode: int  # most prompt tokens of a step while somebody waits for a token


@dataclass(frozen=True)
class Plan:
    """The next step: (key, tokens) for each that takes part. `is_large`: it prefills a prompt."""

    parts: tuple[tuple[int, int], ...]
    is_large: bool = False


def plan(demands: Sequence[Demand], limits: Limits, last_was_large: bool = False) -> Plan:
    """The next step, `demands` in order of precedence: whoever was left out of a step comes first in
    the next, or a piece that just does not fit beside others might never have its turn.

    Small and large pieces take turns, so that nobody who waits for a token waits for more than one
    prefill chunk, and every prompt moves every other step. A prompt is never cut so that a piece of
    fewer than `stable_chunk` tokens comes about. A step with a demand always moves somebody, unless
    a draft is larger than a step.
    """
    if limits.stable_chunk <= 1:
        return _mixed(demands, limits)
    small = [d for d in demands if d.decode or d.prompt < limits.stable_chunk]
    large = [d for d in demands if not d.decode and d.prompt >= limits.stable_chunk]
    if large and (last_was_large is False or not small):
        waiting = any(d.decode for d in small)
        return Plan(tuple(_large(large, limits, waiting)), True)
    return Plan(tuple(_small(small, limits)))


def _mixed(demands: Sequence[Demand], limits: Limits) -> Plan:
    """Without classes: who decodes comes first, prompts share what is left."""
    budget = limits.step_tokens
    parts: list[tuple[int, int]] = []
    for demand in demands:
        if demand.decode and demand.decode <= budget:
            parts.append((demand.key, demand.decode))
            budget -= demand.decode
    if parts:
        budget = min(budget, max(limits.prefill_beside_decode, 1))
    prompts = [d for d in demands if not d.decode]
    for index, demand in enumerate(prompts):
        tokens = min(demand.prompt, max(budget // (len(prompts) - index), min(1, budget)))
        if tokens:
            parts.append((demand.key, tokens))
            budget -= tokens
    return Plan(tuple(parts), bool(prompts))


def _small(demands: Sequence[Demand], limits: Limits) -> list[tuple[int, int]]:
    """Whole pieces as far as they fit; a lone piece above the class limit (a long draft) goes alone."""
    budget = min(limits.step_tokens, limits.small_step)
    if any(d.decode for d in demands):
        budget = min(budget, max(limits.prefill_beside_decode, limits.stable_chunk - 1))
    parts: list[tuple[int, int]] = []
    for demand in demands:
        tokens = demand.decode or demand.prompt
        if tokens <= budget:
            parts.append((demand.key, tokens))
            budget -= tokens
    if not parts and demands:
        first = demands[0]
        tokens = first.decode or first.prompt
        if tokens <= limits.step_tokens:
            parts.append((first.key, tokens))
    return parts


def _large(demands: Sequence[Demand], limits: Limits, waiting: bool) -> list[tuple[int, int]]:
    """One prompt has the step: where a second one lies in it would change its last bits."""
    first, budget = demands[0], limits.step_tokens
    if waiting:
        # What is too short for two pieces is taken whole.
        least = limits.stable_chunk if first.prompt >= 2 * limits.stable_chunk else first.prompt
        budget = min(budget, max(limits.prefill_beside_decode, least))
    return [(first.key, chunk(first.prompt, budget, limits.stable_chunk))]


def chunk(remaining: int, budget: int, stable: int) -> int:
    """Tokens to take of a prompt: as many as the budget allows without leaving a piece below `stable`.
    budget: at least `stable`, and 2 x stable - 1 where less than 2 x stable remain."""
    if remaining <= budget:
        return remaining
    return min(budget, remaining - stable)
