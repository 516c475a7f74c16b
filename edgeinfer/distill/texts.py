"""The texts that a model wrote, as a file that is checked when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.distill.checked_file import load_arrays, save_arrays
from edgeinfer.errors import ModelFileInvalid
from edgeinfer.exits import ANSWERED, FORCED

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.distill.checked_file import Array
    from edgeinfer.exits import Floats, Kinds, Tokens

_FORMAT = "edgeinfer-texts-1"
_AGAIN = "remove it, and the texts are written anew"


@dataclass(frozen=True)
class Texts:
    """tokens, kinds: (texts, length); kinds are those of edgeinfer/exits.py. groups: (texts,), indices
    of `openings.GROUPS`. temperatures: (texts,), of the answers."""

    tokens: Tokens
    kinds: Kinds
    groups: npt.NDArray[np.uint8]
    temperatures: Floats

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def written_tokens(self) -> int:
        """Those that the model wrote itself."""
        return int((self.kinds != FORCED).sum())

    def part(self, start: int, stop: int) -> Texts:
        rows = slice(start, stop)
        return Texts(self.tokens[rows], self.kinds[rows], self.groups[rows], self.temperatures[rows])

    def cut(self, length: int) -> Texts:
        """As many texts, of at most so many tokens."""
        return Texts(self.tokens[:, :length], self.kinds[:, :length], self.groups, self.temperatures)

    def __len__(self) -> int:
        return len(self.tokens)


def joined(parts: Sequence[Texts]) -> Texts:
    return Texts(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.kinds for part in parts]),
        np.concatenate([part.groups for part in parts]),
        np.concatenate([part.temperatures for part in parts]),
    )


def save_texts(path: Path, texts: Texts, model_digest: str) -> None:
    """Raises OSError."""
    arrays: dict[str, Array] = {
        "tokens": texts.tokens.astype(np.int32),
        "kinds": texts.kinds.astype(np.uint8),
        "groups": texts.groups.astype(np.uint8),
        "temperatures": texts.temperatures.astype(np.float32),
    }
    save_arrays(path, arrays, {"format": _FORMAT, "model": model_digest})


def load_texts(path: Path, model_digest: str, vocab_size: int) -> Texts:
    """Raises ModelFileInvalid: damaged, or of another model; OSError."""
    heading = {"format": _FORMAT, "model": model_digest}
    found, _ = load_arrays(path, heading, "texts", _AGAIN)
    try:
        tokens, kinds = found["tokens"], found["kinds"]
        groups, temperatures = found["groups"], found["temperatures"]
    except KeyError as error:
        raise ModelFileInvalid(f"{path}: its texts lack {error}; {_AGAIN}") from None
    fits = tokens.ndim == 2 and tokens.shape == kinds.shape and groups.shape == temperatures.shape
    fits = fits and groups.shape == tokens.shape[:1] and tokens.size > 0
    types = [each.dtype.name for each in (tokens, kinds, groups, temperatures)]
    if not fits or types != ["int32", "uint8", "uint8", "float32"]:
        raise ModelFileInvalid(f"{path}: the parts of its texts do not fit together; {_AGAIN}")
    if tokens.min() < 0 or tokens.max() >= vocab_size or kinds.max() > ANSWERED:
        raise ModelFileInvalid(f"{path}: its texts have tokens that the model does not have; {_AGAIN}")
    return Texts(tokens, kinds, groups, temperatures)
