"""The types that lose least within so many bytes: for each tensor the one whose next byte buys most.

choose_within(losses, sizes, budget): of each tensor's types those on the lower edge of loss against
bytes are taken, and from the smallest on whichever step buys most loss for a byte, while there are
bytes. What tensors lose adds up to second order, and on convex edges this is the best there is, but
for the last few bytes (Everett, 1963: Lagrange multipliers).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping

from edgeinfer.errors import UsageError

_BITS = re.compile(r"\s*([0-9]{1,2}(?:\.[0-9]{1,4})?)\s*bpw\s*", re.IGNORECASE)


def bits_per_weight_of(text: str) -> float | None:
    """ "4.5bpw" -> 4.5; None: it is a size."""
    found = _BITS.fullmatch(text)
    return float(found[1]) if found else None


def choose_within(
    losses: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], budget: int
) -> dict[str, str]:
    """losses: of each tensor in each type, in nats a token. sizes: in bytes, likewise. budget: bytes of
    all of them. Raises UsageError where the smallest are too large."""
    edges = {name: _edge(losses[name], sizes[name]) for name in losses}
    chosen = dict.fromkeys(edges, 0)
    left = budget - sum(sizes[name][edge[0]] for name, edge in edges.items())
    if left < 0:
        raise UsageError(f"the smallest types are {-left:,} bytes larger")
    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        edge, at = edges[name], chosen[name]
        if at + 1 < len(edge):
            now, then = edge[at], edge[at + 1]
            gain = losses[name][now] - losses[name][then]
            heapq.heappush(steps, (-gain / (sizes[name][then] - sizes[name][now]), name))

    for name in edges:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        edge, at = edges[name], chosen[name]
        more = sizes[name][edge[at + 1]] - sizes[name][edge[at]]
        if more > left:
            continue  # smaller tensors may still fit
        left -= more
        chosen[name] += 1
        offer(name)
    return {name: edges[name][at] for name, at in chosen.items()}


def _edge(losses: Mapping[str, float], sizes: Mapping[str, int]) -> list[str]:
    """Types by growing size, each step buying less for a byte than the one before."""
    found: list[str] = []
    for kind in sorted(losses, key=lambda kind: (sizes[kind], losses[kind])):
        if found and (sizes[kind] == sizes[found[-1]] or losses[kind] >= losses[found[-1]]):
            continue
        while len(found) >= 2 and _slope(found[-2], kind, losses, sizes) <= _slope(
            found[-2], found[-1], losses, sizes
        ):
            found.pop()
        found.append(kind)
    return found


def _slope(one: str, other: str, losses: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    return (losses[other] - losses[one]) / (sizes[other] - sizes[one])
