"""The texts that a model wrote, as a file that is checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.errors import ModelFileInvalid
from edgeinfer.exits import ANSWERED, FORCED
from edgeinfer_models.conversion.new_file import NewFile

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.exits import Floats, Kinds, Tokens

_FORMAT = "edgeinfer-texts-1"


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
    from safetensors.numpy import save

    metadata = {"format": _FORMAT, "model": model_digest}
    content = save(
        {
            "tokens": np.ascontiguousarray(texts.tokens, dtype=np.int32),
            "kinds": np.ascontiguousarray(texts.kinds, dtype=np.uint8),
            "groups": np.ascontiguousarray(texts.groups, dtype=np.uint8),
            "temperatures": np.ascontiguousarray(texts.temperatures, dtype=np.float32),
        },
        metadata,
    )
    with NewFile(path, force=True) as new:
        new.file.write(content)


def load_texts(path: Path, model_digest: str, vocab_size: int) -> Texts:
    """Raises ModelFileInvalid: damaged, or of another model; OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = path.read_bytes()
    again = "remove it, and the texts are written anew"
    try:
        found = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        tokens, kinds = found["tokens"], found["kinds"]
        groups, temperatures = found["groups"], found["temperatures"]
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ModelFileInvalid(
            f"{path}: is no file of texts, or is damaged ({error}); {again}"
        ) from None
    if metadata.get("format") != _FORMAT or metadata.get("model") != model_digest:
        raise ModelFileInvalid(f"{path}: its texts are another model's; {again}")
    fits = tokens.ndim == 2 and tokens.shape == kinds.shape and groups.shape == temperatures.shape
    fits = fits and groups.shape == tokens.shape[:1] and tokens.size > 0
    types = (tokens.dtype, kinds.dtype, groups.dtype, temperatures.dtype)
    if not fits or types != (np.int32, np.uint8, np.uint8, np.float32):
        raise ModelFileInvalid(f"{path}: its parts do not fit together; {again}")
    if tokens.min() < 0 or tokens.max() >= vocab_size or kinds.max() > ANSWERED:
        raise ModelFileInvalid(f"{path}: it has tokens that the model does not have; {again}")
    return Texts(tokens, kinds, groups, temperatures)
