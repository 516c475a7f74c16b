"""The text that tells what a model's layers are really given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.errors import UsageError
from edgeinfer_models.tokenizer import Tokenizer

TEXT_TOKENS = 512
DEFAULT_TOKENS = 32_768  # more bought nothing, with correlations shrunk as they are
LEAST_TOKENS = 2048  # below, a matrix's inputs are known in fewer directions than it has columns
# At its beginning models are measured (measure/texts.py): what they were fitted to would flatter them.
MEASURED_CHARACTERS = 100_000
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Calibration:
    """texts: of equal length. origin: for the user. notes: a line each."""

    texts: tuple[tuple[int, ...], ...]
    origin: str
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def digest(self) -> str:
        found = hashlib.sha256(repr(self.texts).encode())
        return found.hexdigest()[:32]


def read_calibration(
    path: Path | None, tokenizer: Tokenizer, tokens: int = DEFAULT_TOKENS
) -> Calibration:
    """The user's text, or Python's documentation of its language. tokens: at most so many, taken evenly
    from all of it. Raises UsageError."""
    text, origin = (
        (_own_text(), "Python's documentation") if path is None else (read_text(path), path.name)
    )
    found = tokenizer.encode(text, add_special=False, parse_special=False)
    if len(found) < LEAST_TOKENS:
        raise UsageError(
            f"--calibration {path}: has {len(found)} tokens; {LEAST_TOKENS} are needed at least, some"
            f" {DEFAULT_TOKENS} are good. Without --calibration a text of edgeinfer's own is taken"
        )
    notes: list[str] = []
    if len(found) < DEFAULT_TOKENS // 4:
        notes.append(f"{origin} has only {len(found)} tokens: the result is fitted to little text")
    texts = spread(found, TEXT_TOKENS, tokens, tokenizer.bos if tokenizer.adds_bos else None)
    return Calibration(texts, origin, tuple(notes))


def spread(
    tokens: Sequence[int], length: int, most: int, bos: int | None
) -> tuple[tuple[int, ...], ...]:
    """Texts of `length` tokens from all over; each begins with bos where the model expects it."""
    own = length - (bos is not None)
    count = max(min(len(tokens), most) // length, 1)
    length = min(own, len(tokens))
    last = len(tokens) - length
    starts = [last * index // max(count - 1, 1) for index in range(count)]
    head = () if bos is None else (bos,)
    return tuple((*head, *tokens[start : start + length]) for start in starts)


def _own_text() -> str:
    from pydoc_data import topics  # every installation of Python has it (PSF licence)

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return text[MEASURED_CHARACTERS:]


def read_text(path: Path) -> str:
    """Raises UsageError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--calibration {path}: cannot be read ({error.strerror or error})") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"--calibration {path}: is longer than {MAX_BYTES // 2**20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--calibration {path}: is not valid UTF-8 (byte at offset {error.start}); give plain text"
        ) from None
    if not text.strip():
        raise UsageError(f"--calibration {path}: is empty; give a text, or leave the option out")
    return text
