"""A model folder as far as mlx-lm will see it: every value of its configuration checked, no code.

mlx-lm builds what config.json asks for, and can import a Python file that it names. So it never sees the
folder: it gets one of our own, with a config.json of known keys and links to the weights whose headers
were checked (`staged`).
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import LoadFailed, ModelFileInvalid, UnsupportedModel
from edgeinfer_models.architectures import MLX_MODEL_TYPES
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.safetensors_header import SafetensorsFolder, read_safetensors_folder

_MAX_LAYERS = 1024
# key: (smallest, largest) of the whole numbers that mlx-lm's classes read
_INTEGERS = {
    "hidden_size": (1, 2**17),
    "num_hidden_layers": (1, _MAX_LAYERS),
    "intermediate_size": (1, 2**20),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (2, 2**12),
    "vocab_size": (1, 2**22),
    "max_position_embeddings": (1, 2**31),
    "sliding_window": (1, 2**31),
}
_NUMBERS = {"rms_norm_eps": (0.0, 1.0), "rope_theta": (1e-3, 1e12)}
_FLAGS = ("attention_bias", "mlp_bias", "rope_traditional", "tie_word_embeddings")
_REQUIRED = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps",
    "vocab_size",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_QUANTIZED = {"group_size": (16, 32, 64, 128), "bits": (2, 3, 4, 5, 6, 8)}
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class CheckedFolder:
    files: ModelFiles
    folder: Path
    config: Mapping[str, Any]  # only keys that were checked
    shards: Sequence[Path]
    warnings: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def context_trained(self) -> int:
        return int(self.config.get("max_position_embeddings", 0))

    def identity(self) -> Mapping[str, str]:
        """What the folder contributes to the identity of a KV snapshot."""
        stamps = ";".join(_stamp(path) for path in self.shards)
        text = json.dumps(self.config, sort_keys=True)
        return {
            "weights": self.files.digest or stamps,
            "config": hashlib.sha256(text.encode()).hexdigest(),  # RoPE among it
        }

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A folder with the checked configuration and links to the weights, gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="edgeinfer-mlx-") as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(self.config))
            for index, shard in enumerate(self.shards):
                (folder / f"model-{index:05}.safetensors").symlink_to(shard.resolve())
            yield folder


def check_folder(files: ModelFiles) -> CheckedFolder:
    """Raises LoadFailed (no weights named), UnsupportedModel, and ModelError's for a damaged folder."""
    if not files.paths:
        raise LoadFailed(f"{files.name}: no weights are named")
    folder = files.paths[0].parent
    found = read_safetensors_folder(folder)
    config, warnings = _checked_config(found)
    _check_tensors(found, config)
    return CheckedFolder(files, folder, config, [shard.path for shard in found.shards], warnings)


def _checked_config(found: SafetensorsFolder) -> tuple[dict[str, Any], tuple[str, ...]]:
    given = found.config
    if given.get("model_file") is not None:
        raise UnsupportedModel(
            "config.json: 'model_file' names Python code, and code from a model folder is never run;"
            " use a .gguf of this model"
        )
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in MLX_MODEL_TYPES:
        known = ", ".join(sorted(MLX_MODEL_TYPES))
        raise UnsupportedModel(
            f"config.json: the model type {kind!r} is not one that the mlx backend runs ({known});"
            " use a .gguf of this model"
        )
    if given.get("quantization") is None and given.get("quantization_config") is not None:
        raise UnsupportedModel(
            "config.json: the weights were quantized by another tool than MLX; use the unquantized model"
        )
    config: dict[str, Any] = {"model_type": kind}
    for key, (low, high) in _INTEGERS.items():
        _take(config, given, key, lambda v, low=low, high=high: type(v) is int and low <= v <= high)
    for key, (least, most) in _NUMBERS.items():
        _take(config, given, key, lambda v, a=least, b=most: _is_number(v) and a <= v <= b)
    for key in _FLAGS:
        _take(config, given, key, lambda v: isinstance(v, bool))
    for key in ("rope_scaling", "rope_parameters"):
        _take(config, given, key, _is_rope)
    _take(config, given, "layer_types", lambda v: _are_layer_types(v, config.get("num_hidden_layers")))
    _take(config, given, "quantization", _is_quantization)
    _fill_in(config)
    for key in _REQUIRED:
        if key not in config:
            raise _bad(f"'{key}' is missing")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise _bad("its heads cannot be divided among its KV heads")
    return config, _what_is_lost(given, config)


def _take(config: dict[str, Any], given: Mapping[str, Any], key: str, is_good: Any) -> None:
    value = given.get(key)
    if value is None:
        return
    if not is_good(value):
        raise _bad(f"'{key}' has a value that cannot be")
    config[key] = value


def _fill_in(config: dict[str, Any]) -> None:
    """What transformers takes where a file says nothing, and some of mlx-lm's classes insist on."""
    nested = config.get("rope_parameters") or {}
    if "rope_theta" not in config:
        theta = nested.get("rope_theta", 10000.0)
        if not _is_number(theta) or not 1e-3 <= theta <= 1e12:
            raise _bad("'rope_theta' has a value that cannot be")
        config["rope_theta"] = theta
    if config.get("rope_scaling") is None and nested.get("rope_type", "default") != "default":
        config["rope_scaling"] = nested  # the older classes look there only
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads and width:
        config.setdefault("num_key_value_heads", heads)
        if "head_dim" not in config:
            if width % heads:
                raise _bad("its hidden size cannot be divided among its heads")
            config["head_dim"] = width // heads
    config.setdefault("tie_word_embeddings", False)
    config.setdefault("max_position_embeddings", 4096)


def _what_is_lost(given: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...]:
    window = given.get("sliding_window")
    layers = config.get("layer_types") or ()
    is_used = given.get("use_sliding_window") is not False and type(window) is int
    if is_used and not (config["model_type"] in ("llama", "mistral") and "sliding_attention" in layers):
        return (f"the model's sliding window of {window} tokens is not applied; all tokens are seen",)
    return ()


def _check_tensors(found: SafetensorsFolder, config: Mapping[str, Any]) -> None:
    """Sizes in config.json are those of the tensors that are there, before anything has such a size.
    (mlx-lm compares every shape; it does so when it has built the model, lazily.)"""
    shapes = {tensor.name: tensor.shape for tensor in found.tensors}
    embedding = shapes.get(_EMBEDDING)
    if embedding is None:
        raise ModelFileInvalid(
            f"model.safetensors: tensor '{_EMBEDDING}' is missing; is the shard index incomplete?"
        )
    is_packed = f"{_EMBEDDING.removesuffix('.weight')}.scales" in shapes
    expected = (config["vocab_size"], config["hidden_size"])
    if (
        len(embedding) != 2
        or embedding[0] != expected[0]
        or (embedding[1] != expected[1] and not is_packed)
    ):
        raise _bad(f"promises embeddings of shape {list(expected)}, the weights have {list(embedding)}")
    parts = (name.split(".") for name in shapes if name.startswith("model.layers."))
    layers = {int(part[2]) for part in parts if part[2].isdecimal() and len(part[2]) <= 6}
    if layers != set(range(config["num_hidden_layers"])):
        raise _bad(f"promises {config['num_hidden_layers']} layers, the weights have {len(layers)}")


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63  # beyond, it may be no float
    return type(value) is float and math.isfinite(value)


def _is_rope(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    kind = value.get("rope_type") or value.get("type") or "default"
    if kind not in _ROPE_TYPES:
        return False
    factor = value.get("factor")
    if kind != "default" and factor is not None and not (_is_number(factor) and factor > 0):
        return False
    return all(isinstance(key, str) and _is_rope_value(each) for key, each in value.items())


def _is_rope_value(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 2**12 and all(_is_number(each) and each > 0 for each in value)
    return value is None or isinstance(value, bool | str) or (_is_number(value) and value >= 0)


def _are_layer_types(value: Any, num_layers: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == num_layers
        and all(each in ("full_attention", "sliding_attention") for each in value)
        and "full_attention" in value
    )


def _is_quantization(value: Any) -> bool:
    """MLX's own: group size and bits for all, and for single layers under their names."""
    if not isinstance(value, dict):
        return False
    own = {key: each for key, each in value.items() if not isinstance(each, bool | dict)}
    inner = [each for each in value.values() if isinstance(each, dict)]
    return _is_packing(own) and all(_is_packing(each) for each in inner)


def _is_packing(value: Mapping[str, Any]) -> bool:
    known = all(value.get(key) in allowed for key, allowed in _QUANTIZED.items())
    return known and value.get("mode", "affine") in _MODES


def _bad(what: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"config.json: {what}; check the file or download the model again")


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
