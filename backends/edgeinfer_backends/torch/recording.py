"""Which models' steps can be recorded as a CUDA graph."""

from __future__ import annotations

from edgeinfer_backends.torch.kv_types import is_plain
from edgeinfer_backends.torch.number_types import Held


def obstacle(kinds: tuple[str, str], held: Held, *, has_experts: bool, weighs: bool) -> str:
    """Why not; "": they can. kinds: of keys and values, names of kv_types.py."""
    if has_experts:
        return "which experts are computed is known only when a step has begun"
    if held == "int8":
        return "which inputs are outliers is known only when a step has begun"
    if not (is_plain(kinds[0]) and is_plain(kinds[1])):
        return "its KV cache is quantized"
    return "attention is counted" if weighs else ""
