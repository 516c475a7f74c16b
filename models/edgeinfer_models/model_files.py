"""A model on disk, checked and ready for a backend to open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ModelFormat = Literal["gguf", "safetensors", "scripted"]


@dataclass(frozen=True)
class ModelFiles:
    name: str  # as the user knows it
    paths: tuple[Path, ...]  # the weights, shards in order; a safetensors model's other files are beside
    format: ModelFormat
    digest: str = ""  # of the weights; "" until somebody needed it
    weight_types: tuple[tuple[str, int], ...] = ()  # (tensor type, bytes); empty where not known
