"""Moving cached keys to other positions: RoPE turns by an angle proportional to the position, so a key
that was turned for position p is turned for p - d by turning it back by d.

Source: Su et al. 2021, RoFormer; re-rotation of kept keys as in StreamingLLM (Xiao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

Rotation = Callable[["mx.array", int], "mx.array"]  # (keys, positions to move by) -> keys

_TOLERANCE = 1e-3


def rotation_of(rope: Any, head_size: int) -> Rotation | None:
    """The rotation that belongs to a model's RoPE module, or None where positions cannot be moved: the
    angle depends on the length (dynamic NTK), or the module is one this was not made for. Whether it is
    right is tried on numbers, not taken from the module's name."""
    arguments = _arguments(rope)
    if arguments is None:
        return None

    def rotate(keys: mx.array, by: int) -> mx.array:
        """keys: shape (1, KV heads, n, head size), all moved by the same number of positions."""
        import mlx.core as mx

        shape = keys.shape
        # Each position a batch of its own: fast.rope counts positions up along the last axis but one.
        alone = keys.astype(mx.float32).reshape(-1, 1, 1, shape[3])
        turned = mx.fast.rope(alone, offset=by, **arguments)
        return turned.reshape(shape).astype(keys.dtype)

    return rotate if _is_right(rope, rotate, head_size) else None


def _arguments(rope: Any) -> dict[str, Any] | None:
    """Of mx.fast.rope. The modules that scale keys (YaRN, LongRoPE) do so once, when a key is made, so
    their scale is not among them."""
    frequencies = getattr(rope, "_freqs", None)
    size = getattr(rope, "dims", None) or getattr(rope, "dim", None)
    if not isinstance(size, int):
        return None
    traditional = bool(getattr(rope, "traditional", False))
    if frequencies is not None:
        return {
            "dims": size,
            "traditional": traditional,
            "base": None,
            "scale": 1.0,
            "freqs": frequencies,
        }
    base, scale = getattr(rope, "base", None), getattr(rope, "scale", None)
    if not isinstance(base, int | float) or not isinstance(scale, int | float):
        return None
    return {"dims": size, "traditional": traditional, "base": base, "scale": scale}


def _is_right(rope: Any, rotate: Rotation, head_size: int) -> bool:
    import mlx.core as mx
    import numpy as np

    key = mx.array(np.random.default_rng(0).standard_normal((1, 1, 1, head_size), dtype=np.float32))
    for start, by in ((200, -150), (5000, -4999)):
        moved = rotate(rope(key, offset=start), by)
        expected = rope(key, offset=start + by)
        # NaN compares as wrong
        if not bool(mx.all(mx.abs(moved - expected) < _TOLERANCE * (1 + mx.abs(expected)))):
            return False
    return True
