"""`--type auto`: which weight type, from what each costs in time, memory and error.

    chosen = choose_type(rows, max_kl=0.05, room_bytes=8 << 30, measure_kl=measure)

Pure: speeds are measured by type_speeds.py, the error by whoever is asked for it here. It is the dearest
figure (a whole file is written and read), so the fastest types are asked first, and those that cannot
win any more never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgeinfer.errors import UsageError

# A typical answer, by whose time types are compared: a question with some text, and an answer to it.
PROMPT_TOKENS, ANSWER_TOKENS = 500, 200
# Types whose answers take no more than this longer than the fastest one's are as fast: no measurement
# beside other programs tells them apart, and what is given up stays below the 5 % that are promised.
AS_FAST = 1.03
# Nats a token: perplexity grows by some 5 % at the most. Q4_K_M costs a model of 8 billion weights 0.03
# and Q4_0 0.07; a model of 135 million loses ten times as much, and gets a larger type for that.
DEFAULT_MAX_KL = 0.05

MeasureKl = Callable[[str], float]


@dataclass(frozen=True)
class TypeRow:
    """What a model in one type costs on this machine. num_bytes: of its weights; memory_bytes: of
    running it. spread: of an answer's time between rounds, as a share. kl: from the model as it is, in
    nats a token; None: not measured. is_original: the model as it is, of which nothing is written.
    """

    type_name: str
    num_bytes: int
    bits_per_weight: float
    prefill_tok_s: float
    decode_tok_s: float
    spread: float = 0.0
    memory_bytes: int = 0
    kl: float | None = None
    is_original: bool = False
    verdict: str = ""

    @property
    def answer_s(self) -> float:
        return PROMPT_TOKENS / self.prefill_tok_s + ANSWER_TOKENS / self.decode_tok_s


@dataclass(frozen=True)
class TypeChoice:
    """table: all rows, the fastest first, each with its verdict."""

    chosen: TypeRow
    table: tuple[TypeRow, ...]
    reason: str


class NoTypeFits(UsageError):
    """No type is good enough, or small enough. `table` says what there was."""

    def __init__(self, message: str, table: Sequence[TypeRow]) -> None:
        super().__init__(message)
        self.table = tuple(table)


def choose_type(
    rows: Sequence[TypeRow],
    max_kl: float | None,
    room_bytes: int | None,
    measure_kl: MeasureKl,
) -> TypeChoice:
    """The fastest type that loses at most `max_kl` (None: DEFAULT_MAX_KL) and runs in `room_bytes`
    (None: any); of those that are as fast, the one that loses least. measure_kl: of a type without a
    `kl`. Raises NoTypeFits, and what measure_kl raises."""
    limit = DEFAULT_MAX_KL if max_kl is None else max_kl
    table = sorted(rows, key=lambda row: row.answer_s)
    passing: list[int] = []
    for index, row in enumerate(table):
        if room_bytes is not None and row.memory_bytes > room_bytes:
            table[index] = replace(row, verdict=f"takes {_gb(row.memory_bytes)} GB of memory")
            continue
        if passing and row.answer_s > AS_FAST * table[passing[0]].answer_s:
            table[index] = replace(row, verdict="slower")
            continue
        kl = measure_kl(row.type_name) if row.kl is None else row.kl
        row = replace(row, kl=kl)
        if kl <= limit:
            passing.append(index)
            table[index] = replace(row, verdict="as fast, but loses more")
        else:
            table[index] = replace(row, verdict=f"loses more than {limit:g}")
    if not passing:
        raise _none_fits(table, limit, room_bytes)
    best = min(passing, key=lambda index: (_kl(table[index]), table[index].num_bytes))
    table[best] = replace(table[best], verdict="taken")
    return TypeChoice(table[best], tuple(table), _reason(table, best, limit, len(passing)))


def _kl(row: TypeRow) -> float:
    return float("inf") if row.kl is None else row.kl


def _reason(table: Sequence[TypeRow], best: int, limit: float, num_passing: int) -> str:
    row = table[best]
    told = (
        f"{row.type_name}: {PROMPT_TOKENS} tokens read and {ANSWER_TOKENS} answered take"
        f" {row.answer_s:.2f} s, and it loses {_kl(row):.4f} nats a token (at most {limit:g})"
    )
    if num_passing > 1:
        return f"{told}; of {num_passing} types that are as fast it loses least"
    faster = [other for other in table[:best] if other.kl is not None]
    if faster:
        names = ", ".join(f"{other.type_name} ({_kl(other):.3f})" for other in faster)
        return f"{told}; what is faster loses more: {names}"
    return f"{told}; no type is faster"


def _none_fits(table: Sequence[TypeRow], limit: float, room_bytes: int | None) -> NoTypeFits:
    measured = [row for row in table if row.kl is not None]
    if not measured:
        least = min(table, key=lambda row: row.memory_bytes)
        return NoTypeFits(
            f"--type auto: {_gb(room_bytes or 0)} GB of memory are free, and even"
            f" {least.type_name} takes {_gb(least.memory_bytes)}; close other programs, or name a type",
            table,
        )
    best = min(measured, key=_kl)
    return NoTypeFits(
        f"--type auto: no type loses at most {limit:g} nats a token; {best.type_name} loses least"
        f" ({_kl(best):.4f}): give a larger --max-kl, or name the type",
        table,
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}"
