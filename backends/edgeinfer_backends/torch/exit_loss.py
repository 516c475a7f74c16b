"""How far an exit's distribution is from the model's, and the slope of that.

A head of 16,000 tokens makes 16,000 numbers of each row, and automatic differentiation would keep
several such tensors alive. The slope of a cross-entropy is known, so here a few thousand rows at a time
are taken through the head and back, and only the slope with respect to the hidden states stays."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 16384


def cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, shares: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted mean over rows of -sum(shares * log softmax(hidden @ head.T)[targets]), and its slope
    with respect to `hidden`.

    hidden: (n, size); head: (kept, size); targets: (n, k) int64; shares: (n, k) float32, each row's sum
    1 (or 0, where the row says nothing); weight: (n,). All that is not hidden has no slope."""
    total = weight.sum().clamp_min(1e-6)
    slope = torch.empty_like(hidden)
    loss = torch.zeros((), device=hidden.device)
    for start in range(0, hidden.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        logits = functional.linear(hidden[rows], head).float()
        heaviness = (weight[rows] / total).unsqueeze(1)
        own = shares[rows] * heaviness
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        loss = loss + ((normalizer - logits.gather(1, targets[rows])) * own).sum()
        # (p - q) of each row, times how much the row counts
        difference = logits.sub_(normalizer).exp_().mul_(own.sum(dim=-1, keepdim=True))
        difference.scatter_add_(1, targets[rows], -own)
        slope[rows] = difference.to(head.dtype) @ head
    return loss, slope
