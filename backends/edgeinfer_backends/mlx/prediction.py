"""What MLX will allocate, worked out from a model's configuration before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from edgeinfer.backend import Device, MemoryItem, RuntimeSettings
from edgeinfer_backends.mlx.sequence_cache import GROWTH
from edgeinfer_backends.private_sequences import IDLE_SEQUENCES
from edgeinfer_models.config import ModelConfig

_FLOAT = 4
_UNQUANTIZED = ("f32", "f16", "bf16")
# Interpreter, mlx, mlx-lm and the transformers it imports; measured on Linux, x86-64, Python 3.11.
_PROCESS = 84 * 2**20
_TOKEN = 300  # tokenizers keeps every piece in two maps, merges besides; estimated


def predict_memory(
    config: ModelConfig, settings: RuntimeSettings, devices: Sequence[Device]
) -> list[MemoryItem]:
    """As `Backend.predict_memory`. MLX divides no layers: all is on its one device."""
    has_gpu = any(device.kind == "gpu" for device in devices) and settings.gpu_layers != 0
    device = "gpu" if has_gpu else "cpu"
    type_k, type_v = (
        kind if kind in _UNQUANTIZED else "f16" for kind in (settings.kv_type_k, settings.kv_type_v)
    )
    cell = config.kv_bytes_per_token(type_k, type_v)
    return [
        MemoryItem("weights", config.weights_bytes, device),
        *runtime_items(cell, config.vocab_size, config.hidden_size, settings, device),
        MemoryItem("tables", config.vocab_size * _TOKEN),
        MemoryItem("process", _PROCESS),
    ]


def runtime_items(
    cell_bytes: int, vocab_size: int, hidden_size: int, settings: RuntimeSettings, device: str
) -> list[MemoryItem]:
    """The KV cache as if it were full (it is allocated as it fills), and what a step takes."""
    cells = settings.context * settings.sequences
    rounding = (settings.sequences + IDLE_SEQUENCES) * GROWTH
    rows = min(settings.logit_rows, settings.step_tokens) * vocab_size * _FLOAT
    states = settings.step_tokens * hidden_size * _FLOAT * 8  # a layer's widest, about
    return [
        MemoryItem("kv cache", (cells + rounding) * cell_bytes, device),
        MemoryItem("compute", rows + states, device),
    ]
