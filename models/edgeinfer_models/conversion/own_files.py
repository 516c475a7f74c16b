"""What lies beside a model's weights, and the type its floats keep, for a folder made of either form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.safetensors_header import MAX_JSON_BYTES, SafetensorsFolder

_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
# Of a config.json: code that a program might fetch and run, how the original was packed, where it lay.
_LEFT_OUT = ("auto_map", "model_file", "quantization", "quantization_config", "_name_or_path")
_TORCH_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
TORCH_NAMES = {dtype: name for name, dtype in _TORCH_NAMES.items()}


def config_and_files(model: SourceModel) -> tuple[dict[str, Any], dict[str, bytes]]:
    """config.json without what was left out above, and the other files by name. Raises
    UnsupportedModel, ModelFileInvalid."""
    origin = model.origin
    if isinstance(origin, GgufHeader):
        texts = model.hf_files()
        config: dict[str, Any] = json.loads(texts.pop("config.json"))
        return config, {name: text.encode() for name, text in texts.items()}
    given = dict(origin.config)
    if isinstance(given.get("text_config"), dict):  # of a model that sees: here is only what it says
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")
        given = {**given, **given["text_config"]}
        given = {
            **{key: given[key] for key in kept if key in given},
            **model.family.shape_to_hf(model.shape),
        }
    config = {key: value for key, value in given.items() if key not in _LEFT_OUT}
    return config, _copied(origin)


def kept_as(model: SourceModel) -> str | None:
    """F32, F16 or BF16 for all of a folder's floats; None: each as it is. As mlx-lm has it, a folder's
    config.json decides; what is no plain float gets one type for all (see `kept_dtype`)."""
    from edgeinfer_models.conversion.conversion import kept_dtype

    origin = model.origin
    kinds = list(stored_types(model))
    if isinstance(origin, SafetensorsFolder) and all(kind in TORCH_NAMES for kind, _ in kinds):
        said = origin.config.get("torch_dtype")
        return _TORCH_NAMES.get(said) if isinstance(said, str) else None
    return kept_dtype(kinds)


def stored_types(model: SourceModel) -> Iterable[tuple[str, int]]:
    """(type, bytes) of each tensor."""
    origin = model.origin
    if isinstance(origin, GgufHeader):
        return [(tensor.type_name, tensor.num_bytes) for tensor in origin.tensors]
    return [(tensor.dtype, tensor.num_bytes) for tensor in origin.tensors]


def config_text(config: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(sorted(config.items())), indent=4).encode()


def _copied(origin: SafetensorsFolder) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in _COPIED:
        path = origin.folder / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise ModelFileInvalid(f"{name}: has more than {MAX_JSON_BYTES:,} bytes; check the file")
            found[name] = path.read_bytes()
        except OSError as error:
            raise ModelFileInvalid(
                f"{name}: cannot be read ({error.strerror}); check the file"
            ) from None
    return found
