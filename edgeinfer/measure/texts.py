"""Text to measure a model on."""

from __future__ import annotations

from pathlib import Path

from edgeinfer.errors import UsageError

MAX_BYTES = 256 * 2**20
DEFAULT = "the topics of Python's own documentation"  # that every installation carries (PSF licence)


def measured_text(path: str | None) -> str:
    """The user's file, or Python's documentation of its language: 465,000 characters of prose, tables
    and code. Raises UsageError."""
    if path is None:
        from pydoc_data import topics

        return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read ({error.strerror or error})") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"--text {path}: is longer than {MAX_BYTES // 2**20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: is not valid UTF-8 (byte at offset {error.start})") from None
