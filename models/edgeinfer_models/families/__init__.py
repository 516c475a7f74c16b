"""Model families, one file each, found by name: what a model computes, what its tensors are called in
Hugging Face's folders and in GGUF, and what they go through in between.

    family = family_of_config(config, where)     # of a config.json
    shape = family.shape_from_hf(config, where)
    for rule in family.rules(shape): ...

A new family is a file with a FAMILY, its name in NAMES, and its tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import UnsupportedModel
from edgeinfer_models.families.family import Family

if TYPE_CHECKING:
    from edgeinfer_models.gguf_header import GgufHeader

NAMES: tuple[str, ...] = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "granite",
)


@cache
def family(name: str) -> Family:
    """name: of NAMES."""
    found: Family = import_module(f"{__name__}.{name}").FAMILY
    return found


def is_known(model_type: object) -> bool:
    """Of a config.json."""
    return isinstance(model_type, str) and any(model_type in family(name).model_types for name in NAMES)


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """Raises UnsupportedModel, which says what is supported."""
    kind = config.get("model_type")
    for name in NAMES if is_known(kind) else ():
        if kind in family(name).model_types:
            return family(name)
    raise _unsupported(where, f"the type '{str(kind)[:40]}'")


def family_of_gguf(header: GgufHeader) -> Family:
    """Raises UnsupportedModel, which says what is supported."""
    for name in NAMES:
        found = family(name)
        if found.arch == header.architecture and found.is_of(header):
            return found
    raise _unsupported(header.path.name, f"the architecture {header.architecture[:40]}")


def _unsupported(where: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{where}: {what} cannot be converted yet; supported: {', '.join(NAMES)}")
