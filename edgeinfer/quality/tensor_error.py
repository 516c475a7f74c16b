"""How far a quantized tensor lies from what it was, and that by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"(?:^|\.)(?:blk|layers)\.([0-9]{1,6})\.")


@dataclass(frozen=True)
class TensorError:
    """relative_error: |Wx - Qx|² / |Wx|² over what calibration had the tensor multiply, where that is
    known; else |W - Q|² / |W|². type_name: that it has now."""

    name: str
    type_name: str
    relative_error: float

    @property
    def layer(self) -> int | None:
        """By the names of GGUF and of Hugging Face; None: it belongs to none (embeddings, output)."""
        match = _LAYER.search(self.name)
        return int(match[1]) if match else None

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.type_name, "relative_error": self.relative_error}


def errors_by_layer(errors: Iterable[TensorError]) -> dict[int, float]:
    """The mean of each layer's tensors, in order. Those of no layer are left out."""
    found: dict[int, list[float]] = {}
    for error in errors:
        if error.layer is not None:
            found.setdefault(error.layer, []).append(error.relative_error)
    return {layer: sum(found[layer]) / len(found[layer]) for layer in sorted(found)}
