"""Backends by name, through the entry points `edgeinfer.backends`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from edgeinfer.backend import Backend
from edgeinfer.errors import BackendUnavailable

GROUP = "edgeinfer.backends"


@cache
def backend_names() -> tuple[str, ...]:
    """Every registered backend, usable here or not."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


@cache
def get_backend(name: str) -> Backend:
    """The backend of that name, its module imported (its framework is not, until it probes or loads).
    Raises BackendUnavailable."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                backend = entry.load()()
            except ImportError as error:
                raise BackendUnavailable(f"backend {name} cannot be imported: {error}") from error
            assert isinstance(backend, Backend)  # noqa: S101
            return backend
    known = ", ".join(backend_names()) or "none"
    raise BackendUnavailable(f"there is no backend {name!r}; installed: {known}")
