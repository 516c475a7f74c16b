"""What a reply says about fields that had no effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgeinfer.errors import one_line


class _HasUnknown(Protocol):
    @property
    def unknown(self) -> Sequence[str]: ...


def ignored_fields(body: _HasUnknown) -> list[str]:
    names = [one_line(name, 40) for name in body.unknown]
    return [f"fields that mean nothing here were ignored: {', '.join(names)}"] if names else []
