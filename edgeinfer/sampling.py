"""How the next token is chosen: the settings, shared by every backend and every surface."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from edgeinfer.errors import UsageError

MAX_SEED = 2**32 - 2  # the value above means "random" to llama.cpp


@dataclass(frozen=True)
class SamplingParams:
    """Sampler settings in the order they are applied.

    Logit bias, penalties (repetition, frequency, presence) and DRY change logits; top-k, typical-p,
    top-p and min-p cut candidates; temperature scales; a seeded draw picks. Temperature 0 is greedy:
    the most likely token after bias and penalties.

    Sources: top-p (Holtzman et al. 2020), locally typical (Meister et al. 2022), min-p (Nguyen et al.
    2024), repetition penalty (Keskar et al. 2019), DRY (p-e-w, text-generation-webui #5677).
    """

    temperature: float = 0.7
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    typical_p: float = 1.0  # 1: off
    repeat_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 256  # tokens the three penalties look back on
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = 1024
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added logit)
    seed: int | None = None  # None: a fresh one is drawn and reported

    def __post_init__(self) -> None:
        """Raises UsageError naming the option and the range it must lie in."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{_option(field.name)} must be a finite number, not {value}")
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_k", self.top_k, 0, 2**31 - 1)
        _between("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("typical_p", self.typical_p, 0.0, 1.0, low_open=True)
        _between("repeat_penalty", self.repeat_penalty, 0.0, 10.0, low_open=True)
        _between("presence_penalty", self.presence_penalty, -10.0, 10.0)
        _between("frequency_penalty", self.frequency_penalty, -10.0, 10.0)
        _between("penalty_last_n", self.penalty_last_n, 0, 2**20)
        _between("dry_multiplier", self.dry_multiplier, 0.0, 100.0)
        _between("dry_base", self.dry_base, 1.0, 10.0)
        _between("dry_allowed_length", self.dry_allowed_length, 1, 2**20)
        _between("dry_last_n", self.dry_last_n, 0, 2**20)
        if self.seed is not None:
            _between("seed", self.seed, 0, MAX_SEED)
        if len(self.logit_bias) > 1024:
            raise UsageError(f"logit_bias has {len(self.logit_bias)} entries; at most 1024 are taken")
        for token, bias in self.logit_bias:
            if token < 0 or not -100.0 <= bias <= 100.0:
                raise UsageError(f"logit_bias {token}: {bias} is outside [-100, 100] or not a token id")

    def for_choice(self, index: int) -> SamplingParams:
        """The settings of the index-th answer to one prompt: with a seed, each has its own."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + index) % (MAX_SEED + 1))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.repeat_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.dry_multiplier != 0.0
        )


_OPTIONS = {"temperature": "temp"}


def _option(name: str) -> str:
    return _OPTIONS.get(name, name).replace("_", "-")


def _between(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if not low <= value <= high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise UsageError(f"--{_option(name)} {value} is outside {bracket}{low:g}, {high:g}]")
