"""A config.json's values, each asked for as what it must be. One line for whatever else is there."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader

MOST_SIZE = 2**31
MOST_LAYERS = 4096


class HfValues:
    """where: the file, for messages. Every method raises ModelFileInvalid for a value of another kind,
    and without a default for one that is not there."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def invalid(self, what: str) -> ModelFileInvalid:
        return ModelFileInvalid(f"{self._where}: {what}; check the file, or download it again")

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of something."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise self.invalid(f"'{key}' is missing")
            return default
        if type(value) is not int or not least <= value < MOST_SIZE:
            raise self.invalid(f"'{key}' is {_shown(value)}, not a number from {least} on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise self.invalid(f"'{key}' is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.invalid(f"'{key}' is {_shown(value)}, not a number")
        return float(value)

    def switch(self, key: str, default: float) -> float:
        """A number that null switches off: 0 then."""
        return 0.0 if key in self._values and self._values[key] is None else self.number(key, default)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(f"'{key}' is {_shown(value)}, not true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.invalid(f"'{key}' is {_shown(value)}, not a text")
        return value

    def table(self, key: str) -> HfValues:
        """A nested object; an empty one where there is none."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.invalid(f"'{key}' is {_shown(value)}, not an object")
        return HfValues(value, f"{self._where}: {key}")

    def list_of(self, key: str, kind: type) -> list[Any] | None:
        """None where there is none. Numbers may be whole where fractions are asked for."""
        value = self._values.get(key)
        if value is None:
            return None
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, list) or not all(
            isinstance(each, kinds) and not (isinstance(each, bool) and kind is not bool)
            for each in value
        ):
            raise self.invalid(f"'{key}' is not a list of {kind.__name__}")
        return value

    def layers(self) -> int:
        count = self.size("num_hidden_layers")
        if count > MOST_LAYERS:
            raise self.invalid(f"'num_hidden_layers' is {count:,}")
        return count


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def gguf_float(header: GgufHeader, key: str, default: float = 0.0) -> float:
    """A number of GGUF metadata, which are float32, as it was meant: 1e-05, not 9.9999997e-06."""
    value = header.get_float(key, default)
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
