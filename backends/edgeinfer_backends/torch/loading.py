"""From a model's files to a runtime."""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from edgeinfer.backend import LoadAs, Progress, RuntimeSettings
from edgeinfer.errors import EdgeInferError, LoadFailed
from edgeinfer_backends.torch.devices import (
    chosen_device,
    describe_build,
    is_fast_at_bf16,
    switches,
)
from edgeinfer_backends.torch.number_types import NumberTypes, choose
from edgeinfer_backends.torch.runtime import TorchRuntime
from edgeinfer_backends.torch.weights import load_decoder
from edgeinfer_models.config import config_from_gguf, config_from_hf
from edgeinfer_models.conversion.model import SourceModel, source_of_folder, source_of_gguf
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.hf_tokenizer import HfTokenizer, read_hf_tokenizer
from edgeinfer_models.model_files import ModelFiles

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def source_of(files: ModelFiles) -> SourceModel:
    """Raises LoadFailed, UnsupportedModel, ModelError's of the files."""
    if not files.paths:
        raise LoadFailed(f"{files.name}: no weights are named")
    is_gguf = files.format == "gguf"
    return source_of_gguf(files.paths[0]) if is_gguf else source_of_folder(files.paths[0].parent)


def load_runtime(files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> TorchRuntime:
    """Raises LoadFailed, UnsupportedModel, ModelError's of the files; ValueError for settings that
    cannot be."""
    for setting in ("context", "sequences", "step_tokens", "logit_rows"):
        if getattr(settings, setting) < 1:
            raise ValueError(f"{setting} must be at least 1, not {getattr(settings, setting)}")
    with mapped(files.name):
        model = source_of(files)
        device = chosen_device(settings)
        types = number_types(model, settings.load_as, device)
        _check_kernels(settings, types, device)
        tokenizer = tokenizer_of(model)
        dtype = DTYPES[types.computed]
        decoder = load_decoder(model, dtype, device, types.held, progress, as_stored=types.as_stored)
        identity = {
            **_identity(files, model),
            "numbers": f"{types.computed}/{types.held}",
            "adapters": "",
            "backend": "torch",
            "build": describe_build(),
            "device": str(device),
            "switches": switches(),
        }
        _give_back_memory()
        runtime = TorchRuntime(decoder, tokenizer, settings, device, dtype, types, identity)
    if not progress(1.0):
        runtime.close()
        raise LoadFailed(f"loading {files.name} was cancelled")
    return runtime


def _give_back_memory() -> None:
    """What tensors took on their way in lies about in pieces, which glibc keeps (150 MB of a 135M model
    that was loaded as int8)."""
    if platform.libc_ver()[0] == "glibc":
        # int malloc_trim(size_t pad)
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def number_types(model: SourceModel, load_as: LoadAs, device: torch.device) -> NumberTypes:
    origin = model.origin
    if isinstance(origin, GgufHeader):
        config = config_from_gguf(origin)
    else:
        config = config_from_hf(origin.folder)
    return choose(
        load_as,
        config.quantization,
        fast_bf16=is_fast_at_bf16(device),
        device=device.type,
        family=model.family.name,
        has_kernels=device.type == "cpu"
        or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)),
    )


def _check_kernels(settings: RuntimeSettings, types: NumberTypes, device: torch.device) -> None:
    """What torch has no kernels for there. Raises LoadFailed."""
    if (
        device.type == "cuda"
        and types.held == "int4"
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        raise LoadFailed("torch's int4 products need an Ampere GPU or a newer one; take --load-as int8")
    if device.type != "mps":
        return
    if types.held != "plain":
        raise LoadFailed(f"torch has no {types.held} products for Apple's GPU; add --gpu-layers 0")
    if "fp8" in (settings.kv_type_k, settings.kv_type_v):
        raise LoadFailed("torch has no fp8 numbers on Apple's GPU; take --kv-type int8")


def tokenizer_of(model: SourceModel) -> HfTokenizer:
    """A GGUF file's vocabulary is written as tokenizer.json first: there is one reader of it."""
    origin = model.origin
    if not isinstance(origin, GgufHeader):
        return read_hf_tokenizer(origin.folder, model.shape.vocab_size)
    with tempfile.TemporaryDirectory(prefix="edgeinfer-torch-") as name:
        folder = Path(name)
        for file, text in model.hf_files().items():
            (folder / file).write_text(text, encoding="utf-8")
        return read_hf_tokenizer(folder, model.shape.vocab_size)


def _identity(files: ModelFiles, model: SourceModel) -> Mapping[str, str]:
    origin = model.origin
    if isinstance(origin, GgufHeader):
        paths = list(origin.shards)
    else:
        paths = [shard.path for shard in origin.shards]
    shape = json.dumps(asdict(model.shape), sort_keys=True)
    return {
        "weights": files.digest or ";".join(_stamp(path) for path in paths),
        "config": hashlib.sha256(shape.encode()).hexdigest(),  # RoPE among it
    }


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


@contextmanager
def mapped(name: str) -> Iterator[None]:
    try:
        yield
    except EdgeInferError:
        raise
    except torch.OutOfMemoryError as error:
        raise LoadFailed(f"{name}: does not fit into the memory of the GPU ({error})") from error
    except Exception as error:
        raise LoadFailed(f"{name}: torch refused the model ({type(error).__name__}: {error})") from error
