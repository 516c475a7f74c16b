"""Samplers in numpy: the readable reference that every backend's own samplers are tested against.

`distribution` says what may be drawn and how likely it is; `ReferenceSampler` draws from it. The order
is that of `SamplingParams`: mask, logit bias, penalties, DRY, top-k, typical-p, top-p, min-p and
temperature. A token that cannot be drawn has the logit -inf. Every cut keeps at least one token.

Two backends agree on the distribution, not on the random stream: the same seed repeats within one
backend only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeinfer.sampling import SamplingParams

Array = npt.NDArray[np.float64]

_MAX_LOG = 88.7228391  # log of float32's largest number: where DRY's exponent stops growing


def distribution(
    logits: npt.ArrayLike,
    params: SamplingParams,
    history: Sequence[int] = (),
    mask: bytes | None = None,
) -> Array:
    """The probability of each token to be drawn next; shape (vocab_size,), sums to 1.

    logits: shape (vocab_size,), not changed. history: prompt and answer so far, oldest first.
    Raises ValueError if the mask allows nothing or is too short.
    """
    scores = np.array(logits, dtype=np.float64)
    if mask is not None:
        scores[~allowed_tokens(mask, len(scores))] = -np.inf
    add_logit_bias(scores, params.logit_bias)
    subtract_penalties(scores, history, params)
    subtract_dry(scores, history, params)
    if params.is_greedy:
        picked = np.zeros_like(scores)
        picked[int(np.argmax(scores))] = 1.0
        return picked
    keep_top_k(scores, params.top_k)
    keep_typical(scores, params.typical_p)
    keep_top_p(scores, params.top_p)
    keep_min_p(scores, params.min_p)
    return softmax(scores / params.temperature)


class ReferenceSampler:
    """One sequence's sampler state. Implements the contract's `Sampler`."""

    def __init__(self, params: SamplingParams, seed: int, vocab_size: int) -> None:
        for token, _ in params.logit_bias:
            if token >= vocab_size:
                raise ValueError(f"logit_bias names token {token}; the vocabulary has {vocab_size}")
        self._params = params
        self._seed = seed
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(seed)
        self._history: deque[int] = deque(maxlen=max(params.penalty_last_n, params.dry_last_n))

    @property
    def seed(self) -> int:
        return self._seed

    def accept(self, token: int) -> None:
        if not 0 <= token < self._vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self._vocab_size}")
        self._history.append(token)

    def draw(self, logits: npt.ArrayLike, mask: bytes | None = None) -> int:
        """Draw a token and count it. A failed draw leaves history and random stream as they were."""
        probabilities = distribution(logits, self._params, self._history, mask)
        token = int(probabilities.argmax()) if self._params.is_greedy else self._pick(probabilities)
        self._history.append(token)
        return token

    def checked(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits that somebody kept. Raises ValueError if they are of another vocabulary."""
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits of shape {logits.shape} for a vocabulary of {self._vocab_size}")
        return logits

    def _pick(self, probabilities: Array) -> int:
        candidates = np.flatnonzero(probabilities)
        running = np.cumsum(probabilities[candidates])
        at = np.searchsorted(running, self._random.random() * running[-1], side="right")
        return int(candidates[min(int(at), len(candidates) - 1)])

    def close(self) -> None:
        self._history.clear()


def allowed_tokens(mask: bytes, vocab_size: int) -> npt.NDArray[np.bool_]:
    """The mask's bits as booleans. Raises ValueError for a short mask or one that allows nothing."""
    if len(mask) * 8 < vocab_size:
        raise ValueError(f"a mask of {len(mask)} bytes does not cover {vocab_size} tokens")
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[:vocab_size]
    allowed = bits.astype(np.bool_)
    if not allowed.any():
        raise ValueError("the mask allows no token")
    return allowed


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    normalized: Array = weights / weights.sum()
    return normalized


def add_logit_bias(scores: Array, logit_bias: Sequence[tuple[int, float]]) -> None:
    for token, bias in logit_bias:
        scores[token] += bias


def subtract_penalties(scores: Array, history: Sequence[int], params: SamplingParams) -> None:
    """Repetition, then frequency and presence, over the last `penalty_last_n` tokens.

    A negative logit is multiplied by the repetition penalty, since dividing it would make the token
    more likely. Sources: Keskar et al. 2019 (CTRL), as corrected by Hugging Face and llama.cpp;
    frequency and presence as OpenAI defines them.
    """
    tokens, counts = np.unique(_last(history, params.penalty_last_n), return_counts=True)
    if not len(tokens):
        return
    seen = scores[tokens]
    seen = np.where(seen <= 0, seen * params.repeat_penalty, seen / params.repeat_penalty)
    scores[tokens] = seen - counts * params.frequency_penalty - params.presence_penalty


def subtract_dry(scores: Array, history: Sequence[int], params: SamplingParams) -> None:
    """Don't Repeat Yourself: a token that would lengthen a repetition costs
    multiplier * base ** (length - allowed_length), the longest repetition counting. No breakers.

    Source: p-e-w, text-generation-webui #5677; llama.cpp's `llama_sampler_dry_apply`.
    """
    if params.dry_multiplier == 0.0:
        return
    last = _last(history, params.dry_last_n)
    lengths = _suffix_lengths(last)
    repeats = np.flatnonzero(lengths >= params.dry_allowed_length)
    longest = np.zeros(len(scores), dtype=np.int64)
    np.maximum.at(longest, last[repeats + 1], lengths[repeats])
    tokens = np.flatnonzero(longest)
    exponents = (longest[tokens] - params.dry_allowed_length).astype(np.float64)
    if params.dry_base > 1.000001:
        exponents = np.minimum(exponents, np.floor(_MAX_LOG / np.log(params.dry_base)))
    scores[tokens] -= params.dry_multiplier * params.dry_base**exponents


def _suffix_lengths(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each index but the last: how many tokens ending there equal the last ones of the whole."""
    size = len(tokens)
    lengths = np.zeros(max(size - 1, 0), dtype=np.int64)
    alive = np.arange(size - 1)
    for back in range(size):
        alive = alive[alive >= back]
        alive = alive[tokens[alive - back] == tokens[size - 1 - back]]
        if not len(alive):
            break
        lengths[alive] += 1
    return lengths


def _last(history: Sequence[int], count: int) -> npt.NDArray[np.int64]:
    tokens = np.fromiter(history, dtype=np.int64, count=len(history))
    return tokens[len(tokens) - min(count, len(tokens)) :]


def keep_top_k(scores: Array, top_k: int) -> None:
    if 0 < top_k < len(scores):
        scores[_likeliest_first(scores)[top_k:]] = -np.inf


def keep_typical(scores: Array, typical_p: float) -> None:
    """Keep the tokens whose surprise is nearest to the entropy, until they hold more than `typical_p`.
    Source: Meister et al. 2022, Locally Typical Sampling."""
    if typical_p >= 1.0:
        return
    candidates = np.flatnonzero(np.isfinite(scores))
    probabilities = softmax(scores[candidates])
    surprise = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    entropy = float(np.sum(probabilities * surprise))
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    held = np.cumsum(probabilities[order])
    num_kept = int(np.searchsorted(held, typical_p, side="right")) + 1
    scores[candidates[order[num_kept:]]] = -np.inf


def keep_top_p(scores: Array, top_p: float) -> None:
    """Keep the likeliest tokens until they hold at least `top_p`. Source: Holtzman et al. 2020."""
    if top_p >= 1.0:
        return
    order = _likeliest_first(scores)
    held = np.cumsum(softmax(scores)[order])
    num_kept = int(np.searchsorted(held, top_p, side="left")) + 1
    scores[order[num_kept:]] = -np.inf


def keep_min_p(scores: Array, min_p: float) -> None:
    """Keep tokens at least `min_p` times as likely as the likeliest. Source: Nguyen et al. 2024."""
    if min_p > 0.0:
        scores[scores < scores.max() + np.log(min_p)] = -np.inf


def _likeliest_first(scores: Array) -> npt.NDArray[np.intp]:
    return np.argsort(-scores, kind="stable")
