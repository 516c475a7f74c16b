"""A model to be converted: its family, its numbers, its tensors and its vocabulary, from either form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.packed import Packing, packing_of
from edgeinfer_models.conversion.packed_rows import RowPacking, mlx_packing
from edgeinfer_models.conversion.sources import GgufSource, SafetensorsSource, TensorSource
from edgeinfer_models.conversion.vocabulary import (
    vocabulary_notes,
    vocabulary_to_gguf,
    vocabulary_to_hf,
)
from edgeinfer_models.families import family_of_config, family_of_gguf
from edgeinfer_models.families.family import Factors, Family
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.safetensors_header import SafetensorsFolder, read_safetensors_folder

Form = Literal["safetensors", "gguf"]
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MOST_FACTORS = 4096


@dataclass(frozen=True)
class SourceModel:
    form: Form
    family: Family
    shape: DecoderShape
    source: TensorSource
    origin: SafetensorsFolder | GgufHeader
    name: str
    licence: str

    @property
    def num_bytes(self) -> int:
        origin = self.origin
        if isinstance(origin, GgufHeader):
            return origin.file_bytes
        return sum(shard.file_bytes for shard in origin.shards)

    @property
    def model_type(self) -> str:
        """Of the config.json that it has, or that it would get. Raises UnsupportedModel."""
        return str(self.family.shape_to_hf(self.shape)["model_type"])

    def notes(self) -> list[str]:
        """What the other form will do otherwise, a line each. Raises ModelFileInvalid,
        UnsupportedModel."""
        origin = self.origin
        if isinstance(origin, GgufHeader):
            return vocabulary_notes(origin)
        return [*self.family.notes_on_gguf(self.shape), *vocabulary_notes(origin.folder)]

    def gguf_metadata(self) -> dict[str, Any]:
        """Of a folder: beside the architecture's. Raises UnsupportedModel, ModelFileInvalid."""
        origin = self.origin
        assert isinstance(origin, SafetensorsFolder)
        found: dict[str, Any] = {"general.name": self.name}
        if self.licence:
            found["general.license"] = self.licence
        return {**found, **vocabulary_to_gguf(origin.folder, self.shape.vocab_size)}

    def hf_files(self) -> dict[str, str]:
        """Of a GGUF file: all but the weights, by name. Raises UnsupportedModel, ModelFileInvalid."""
        import json

        origin = self.origin
        assert isinstance(origin, GgufHeader)
        config = self.family.shape_to_hf(self.shape)
        for name in ("bos", "eos"):
            token = origin.get_int(f"tokenizer.ggml.{name}_token_id", -1)
            if token >= 0:
                config[f"{name}_token_id"] = token
        return {
            "config.json": json.dumps(config, indent=2),
            **vocabulary_to_hf(origin, self.shape.vocab_size),
        }


def source_of_folder(folder: Path, licence: str = "") -> SourceModel:
    """A Hugging Face folder. Raises ModelFileInvalid, ModelNotFound, UnsupportedModel."""
    found = read_safetensors_folder(folder)
    where = f"{folder.name}/config.json"
    config = dict(found.config)
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {**config, **inner}
    packing: Packing | RowPacking | None = None
    if isinstance(config.get("quantization"), dict):  # MLX's; its `quantization_config` says the same
        packing = mlx_packing(config["quantization"], where)
    elif isinstance(config.get("quantization_config"), dict):
        packing = packing_of(config["quantization_config"], where)
    family = family_of_config(config, where)
    shape = family.shape_from_hf(config, where)
    source = SafetensorsSource(found, packing)
    return SourceModel("safetensors", family, shape, source, found, folder.resolve().name, licence)


def source_of_gguf(path: Path) -> SourceModel:
    """Raises ModelFileInvalid, ModelNotFound, UnsupportedModel."""
    header = read_gguf_model(path)
    family = family_of_gguf(header)
    shape = family.shape_from_gguf(header, _factors(header))
    source = GgufSource(header, family.rules(shape))
    name = header.get_str("general.name") or path.stem
    return SourceModel("gguf", family, shape, source, header, name, header.get_str("general.license"))


def _factors(header: GgufHeader) -> Factors:
    """The RoPE tensors of a GGUF file."""
    import numpy as np

    found: dict[str, Sequence[float]] = {}
    for name in _FACTORS:
        tensor = header.tensor(name)
        if tensor is None:
            continue
        if tensor.type_name != "F32" or tensor.elements > _MOST_FACTORS or len(header.shards) > 1:
            raise UnsupportedModel(
                f"{header.path.name}: its RoPE factors '{name}' cannot be read ({tensor.type_name})"
            )
        offset = header.data_offset + tensor.offset
        values = np.fromfile(header.path, "<f4", tensor.elements, offset=offset)
        if values.size != tensor.elements or not np.isfinite(values).all() or (values <= 0).any():
            raise ModelFileInvalid(
                f"{header.path.name}: its RoPE factors '{name}' are not positive numbers; the file is"
                " damaged, download it again"
            )
        found[name] = [float(value) for value in values]
    return found
