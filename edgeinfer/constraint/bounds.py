"""Bounds of numbers as llguidance may see them: it keeps doubles, and so do most who read JSON."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

MAX_EXACT = 2**53  # integers beyond are not all doubles
MAX_BOUND = 10**18  # below 2^63, and exact as a double
_MOST_DIGITS = 15  # decimals of so many are told apart as doubles
_MOST_POWER = 22  # of ten, that is a double

_EXACTLY = Context(prec=400)


def is_exact(value: int | float) -> bool:
    """Whether a double is this number, and llguidance's 64-bit integers hold it."""
    if isinstance(value, int):
        return abs(value) <= MAX_EXACT or (abs(value) < 2**62 and int(float(value)) == value)
    return math.isfinite(value) and (abs(value) < 2**62 or not value.is_integer())


def is_read_exactly(value: int | float) -> bool:
    """Whether llguidance reads its text as the same double: it multiplies digits with a power of ten,
    which rounds once if both are doubles, and twice else (0.9120685437784987 becomes another one)."""
    if isinstance(value, int) or value.is_integer():
        return True
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    return int("".join(map(str, digits))) <= MAX_EXACT and abs(int(exponent)) <= _MOST_POWER


def within(bound: int | float, *, above: bool) -> int | float:
    """The nearest number on this side of `bound`, or that itself, that is read exactly."""
    if is_read_exactly(bound):
        return bound
    exact = Decimal(repr(bound))
    return float(exact.quantize(_step(exact), ROUND_CEILING if above else ROUND_FLOOR, _EXACTLY))


def next_to(bound: int | float, *, above: bool, whole: bool) -> int | float | None:
    """The number that is included where `bound` is not. None if it is beyond what is exact.

    For numbers with a fraction: of at most 15 digits. Each text up to it reads as what is truly beyond
    the bound; 0.29999999999999999 is 0.3 to who reads it, and not below that.
    """
    if whole:
        nearest = math.floor(bound) + 1 if above else math.ceil(bound) - 1
        return nearest if abs(nearest) <= MAX_EXACT else None
    if abs(bound) > MAX_EXACT:
        return None
    exact = Decimal(repr(bound))
    step = _step(exact)
    rounding = ROUND_FLOOR if above else ROUND_CEILING
    nearest_decimal = exact.quantize(step, rounding, _EXACTLY) + (step if above else -step)
    if abs(nearest_decimal) > MAX_EXACT:
        return None
    if nearest_decimal == nearest_decimal.to_integral_value():
        return int(nearest_decimal)
    found = float(nearest_decimal)
    return found if (found > bound if above else found < bound) else None


def _step(exact: Decimal) -> Decimal:
    """That of the last of 15 digits; never smaller than if there was a digit before the point."""
    digits_before = max(1, exact.adjusted() + 1) if exact else 1
    return Decimal((0, (1,), -max(0, _MOST_DIGITS - digits_before)))
