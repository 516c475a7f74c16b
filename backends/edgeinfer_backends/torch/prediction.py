"""What torch will allocate, worked out from a model's configuration before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeinfer.backend import Device, MemoryItem, RuntimeSettings
from edgeinfer_backends.private_sequences import IDLE_SEQUENCES
from edgeinfer_backends.torch.kv_types import head_bytes, nearest
from edgeinfer_backends.torch.number_types import choose, processor_is_fast_at_bf16
from edgeinfer_backends.torch.recording import obstacle
from edgeinfer_models.config import ModelConfig

GROWTH = 256  # positions by which a sequence's buffers grow

_FLOAT = 4
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
# A weight of a matrix and its share of the scales.
_HELD_BYTES = {"int8": 1.0, "int4": 0.5 + 4 / 32}
# Interpreter and torch; measured on Linux, x86-64, Python 3.11, torch 2.13 for the CPU.
_PROCESS = 330 * 2**20
_TOKEN = 300  # tokenizers keeps every piece in two maps, merges besides; estimated


def predict_memory(
    config: ModelConfig, settings: RuntimeSettings, devices: Sequence[Device]
) -> list[MemoryItem]:
    """As `Backend.predict_memory`. Layers are not divided: all is on one device."""
    on_gpu = any(device.kind == "gpu" for device in devices) and settings.gpu_layers != 0
    device = "gpu" if on_gpu else "cpu"
    types = choose(
        settings.load_as,
        config.quantization,
        fast_bf16=processor_is_fast_at_bf16(),
        device=device,
        family="",  # what a GPU takes for a Gemma is as wide
    )
    in_matrices = 0
    if types.held != "plain":
        heads = 1 if config.is_tied else 2
        in_matrices = max(config.parameters - heads * config.vocab_size * config.hidden_size, 0)
    weights = (config.parameters - in_matrices) * _BYTES[types.computed]
    weights += int(in_matrices * _HELD_BYTES.get(types.held, 0))
    kinds = (nearest(settings.kv_type_k)[0], nearest(settings.kv_type_v)[0])
    cell = sum(
        heads * head_bytes(kind, size)
        for heads in config.num_kv_heads
        for kind, size in zip(kinds, (config.head_dim_k, config.head_dim_v), strict=True)
    )
    if settings.heavy_hitters:
        cell += sum(config.num_kv_heads) * _FLOAT
    holds_scores = settings.heavy_hitters or "gemma2" in config.architecture.lower()
    sizes = Sizes(
        cell,
        config.vocab_size,
        config.hidden_size,
        max(config.intermediate_size, 1),
        config.num_heads if holds_scores else 0,
    )
    is_fixed = on_gpu and not obstacle(
        kinds, types.held, has_experts=config.num_experts > 0, weighs=settings.heavy_hitters
    )
    return [
        MemoryItem("weights", weights, device),
        *runtime_items(sizes, settings, device, has_fixed_buffers=is_fixed),
        MemoryItem("tables", config.vocab_size * _TOKEN),
        MemoryItem("process", _PROCESS),
    ]


@dataclass(frozen=True)
class Sizes:
    """heads_with_scores: where attention's scores are held whole (0: nowhere)."""

    cell_bytes: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads_with_scores: int


def runtime_items(
    sizes: Sizes, settings: RuntimeSettings, device: str, *, has_fixed_buffers: bool
) -> list[MemoryItem]:
    """The KV cache as if it were full (it is allocated as it fills), what a step takes, and the cache of
    one sequence once more, while it grows or loses positions."""
    cells = settings.context * (settings.sequences + has_fixed_buffers)
    rounding = (settings.sequences + IDLE_SEQUENCES) * GROWTH
    rows = min(settings.logit_rows, settings.step_tokens) * sizes.vocab_size * _FLOAT
    states = settings.step_tokens * (8 * sizes.hidden_size + 3 * sizes.intermediate_size) * _FLOAT
    scores = 2 * sizes.heads_with_scores * settings.step_tokens * settings.context * _FLOAT
    return [
        MemoryItem("kv cache", (cells + rounding) * sizes.cell_bytes, device),
        MemoryItem("copies", settings.context * sizes.cell_bytes, device),
        MemoryItem("compute", rows + states + scores, device),
    ]
