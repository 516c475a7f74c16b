"""Arrays with a heading, as a safetensors file that is whole or not there and is checked when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.conversion.new_file import NewFile

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def save_arrays(path: Path, arrays: Mapping[str, Array], heading: Mapping[str, str]) -> None:
    """Raises OSError."""
    from safetensors.numpy import save

    # (ascontiguousarray would make an array of a single number one-dimensional)
    content = save({name: np.array(each, order="C") for name, each in arrays.items()}, dict(heading))
    with NewFile(path, force=True) as new:
        new.file.write(content)


def load_arrays(
    path: Path, heading: Mapping[str, str], what: str, again: str
) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays, and the whole heading, which must agree with `heading`. what, again: for the error:
    what the file should be, and what to do. Raises ModelFileInvalid, OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = path.read_bytes()
    try:
        arrays = load(content)
        length = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise ModelFileInvalid(
            f"{path}: is no file of {what}, or is damaged ({error}); {again}"
        ) from None
    for name, value in heading.items():
        if found.get(name) != value:
            raise ModelFileInvalid(
                f"{path}: is not of this model ({name} is '{str(found.get(name))[:40]}'); {again}"
            )
    return arrays, found
