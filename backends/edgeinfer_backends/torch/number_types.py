"""In what a model's weights are held and its sums computed."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from edgeinfer.backend import LoadAs
from edgeinfer.errors import LoadFailed

Held = Literal["plain", "int8", "int4"]  # plain: as they are computed with
# Their hidden states grow past what f16 holds.
_NOT_IN_F16 = ("gemma2", "gemma3")
# What packed files are called (`ModelConfig.quantization`), and what their matrices are held as.
_HELD_AS: dict[str, Held] = {"INT8": "int8", "INT4": "int4", "MLX-4BIT": "int4"}
_AS_STORED = {
    "int8": "matrices stay in the file's int8, inputs are rounded to it; --load-as f32 unpacks them",
    "int4": "matrices stay in the file's 4 bits; --load-as f32 unpacks them",
}
_BF16_FLAGS = frozenset(("amx_bf16", "avx512_bf16", "bf16"))


@dataclass(frozen=True)
class NumberTypes:
    """computed: "f32", "bf16" or "f16". held: what the layers' matrices are. note: what it costs, a line
    for the user. as_stored: those are held so that the file has packed so, with its own codes, and no
    others."""

    computed: str
    held: Held
    note: str = ""
    as_stored: bool = False


def choose(
    load_as: LoadAs,
    stored: str,
    *,
    fast_bf16: bool,
    device: str,
    family: str,
    has_kernels: bool = True,
) -> NumberTypes:
    """stored: what most of the file's weights are ("F32", "F16", "Q4_K_M", "INT8" …).
    fast_bf16: of that device. device: torch's name of its kind. has_kernels: for matrices of 4 and 8
    bits. Raises LoadFailed.

    Nothing that is stored as F32 is rounded unless that was asked for.
    """
    if load_as == "f16" and family in _NOT_IN_F16:
        raise LoadFailed(f"a {family} does not work in f16: its numbers are too large; use bf16 or f32")
    if load_as == "f32" or load_as == "bf16" or load_as == "f16":
        return NumberTypes(load_as, "plain", _note(load_as, stored))
    computed = _computed(stored, fast_bf16, device, family)
    packed = _HELD_AS.get(stored)
    # int8's products round their inputs: only where that was asked for.
    if packed is not None and has_kernels and load_as in (packed, "auto" if packed == "int4" else ""):
        return NumberTypes(computed, packed, _AS_STORED[packed], as_stored=True)
    if load_as == "auto":
        return NumberTypes(computed, "plain", _note(computed, stored))
    held: Held = "int8" if load_as == "int8" else "int4"
    return NumberTypes(computed, held, f"weights are rounded to {held}; --load-as auto keeps them")


def _computed(stored: str, fast_bf16: bool, device: str, family: str) -> str:
    if stored == "F32":
        return "f32"
    if device == "cpu":
        return "bf16" if fast_bf16 else "f32"
    if family in _NOT_IN_F16:
        return "bf16"
    return "f16" if stored == "F16" or not fast_bf16 else "bf16"


def _note(computed: str, stored: str) -> str:
    if computed == "f32" or stored.upper() == computed.upper():
        return ""
    return f"weights stored as {stored} are computed with as {computed}; --load-as f32 keeps all digits"


@cache
def processor_is_fast_at_bf16() -> bool:
    """Whether this processor multiplies matrices of bf16 in instructions of its own: without, torch's
    are slower than those of f32 (with AMX, 512 rows on a matrix of a 1B shape: 3 to 7 times faster)."""
    if platform.system() == "Darwin":
        return False  # not measured
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return bool(_BF16_FLAGS.intersection(flags.split()))
    return False
