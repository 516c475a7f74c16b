"""What llama.cpp will allocate, worked out from a model's header before anything is loaded.

Each term says where it was read (llama.cpp as packaged in llama-cpp-python 0.3.36) or how it was
measured. `tests/backends/test_llamacpp_memory.py` compares it with llama.cpp's own figures.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace

from edgeinfer.backend import BLOCK_TOKENS, Device, MemoryItem, RuntimeSettings
from edgeinfer_models.config import INPUT, OUTPUT, ModelConfig
from edgeinfer_models.ggml_types import row_bytes

# Cells beyond every sequence's context, so that sequences can be aligned to tiles (see cells.py).
TILE_SLACK = 128
CELL_ROUNDING = 256  # cparams.n_ctx = GGML_PAD(cparams.n_ctx, 256) (llama-context.cpp)

# Sequences of our own beside the caller's: see runtime.py.
RESERVED_SEQUENCES = 3
MAX_NATIVE_SEQUENCES = 256  # LLAMA_MAX_SEQ (llama-cparams.h)

# Repacked on x86 with AVX2 and on Arm with dot products (ggml_repack_get_optimal_repack_type,
# ggml-cpu/repack.cpp). The second set was read there, not run.
_REPACKED = frozenset({"q4_0", "q4_k", "iq4_nl", "mxfp4"})
_REPACKED_ON_ARM = _REPACKED | {"q5_k", "q6_k", "q8_0"}

_REPACKED_ROWS = 8  # a matrix of another number of rows stays as it is; only vocabularies are so odd

_FLOAT = 4

# Measured on Linux, x86-64, Python 3.11, a worker with a model of 300 tokens and 0.5 MB: interpreter and
# our modules 23 MiB, numpy 12, llama.cpp and OpenMP 5, its first model, graphs and steps 9.
_PROCESS = 49 * 2**20
# llama_vocab: token_data (40), a node and bucket of token_to_id (72), cache_token_to_piece (32), the
# context's list of all ids (4), and now and then a text too long for a std::string's own 15 bytes (6).
_TOKEN = 154
# A node of bpe_ranks: two strings (64), rank, hash, links and malloc's head, and the bucket. Measured.
_MERGE = 117
# llama_kv_cells: position, extension, shift and 256 owner bits (52); cells.py: a pointer (8).
_CELL = 60
_TILED_PRODUCT = 512 * 1024  # TILED_WS_SLOT of each thread (ggml-cpu/tiled)
# llama.cpp's flash attention takes its tiled kernel from this many rows on, and its tiles are as many
# cells wide (ggml_fa_tile_config::Q and ::KV, ggml-cpu/ops.cpp).
TILE = 64


def sequence_handles(sequences: int) -> int:
    """Running sequences, and as many again for forks and chats that stay live between turns."""
    return min(2 * sequences + 8, MAX_NATIVE_SEQUENCES - RESERVED_SEQUENCES)


def wants_private(settings: RuntimeSettings, *, has_window: bool, has_gpu: bool) -> bool:
    """Whether each sequence gets a stream of cells of its own (see streams.py)."""
    if settings.kv_layout != "auto":
        return settings.kv_layout == "private"
    return settings.flash_attention and not has_window and not has_gpu


def native_sequences(settings: RuntimeSettings, is_private: bool) -> int:
    """llama.cpp's, ours included. A lone sequence has another beside it (lone_stream.py)."""
    if not is_private:
        return sequence_handles(settings.sequences) + RESERVED_SEQUENCES
    return settings.sequences + (settings.sequences == 1)


def is_read_in_tiles(settings: RuntimeSettings) -> bool:
    """Whether llama.cpp's tiled kernel takes the cache as it is: unquantized keys and values of one type
    (ggml_compute_forward_flash_attn_ext_f16, ggml-cpu/ops.cpp)."""
    one_type = settings.kv_type_k == settings.kv_type_v
    return settings.flash_attention and one_type and settings.kv_type_k in ("f16", "f32")


def num_cells(settings: RuntimeSettings, is_private: bool = False) -> int:
    """Cells asked of llama.cpp."""
    if is_private:
        return -(-settings.context // CELL_ROUNDING) * CELL_ROUNDING * settings.sequences
    slack = TILE_SLACK * settings.sequences if settings.sequences > 1 else 0
    return settings.context * settings.sequences + slack


def num_logit_rows(settings: RuntimeSettings) -> int:
    """llama.cpp makes its output buffer for a row of each sequence there may be and aborts the process
    where that is more than the most rows of a step (output_reserve, llama-context.cpp)."""
    return max(settings.logit_rows, sequence_handles(settings.sequences) + RESERVED_SEQUENCES)


def is_repacked(type_name: str) -> bool:
    on_arm = platform.machine().lower() in ("arm64", "aarch64")
    return type_name.lower() in (_REPACKED_ON_ARM if on_arm else _REPACKED)


def may_map(weight_types: Sequence[tuple[str, int]]) -> bool:
    """Whether to map the file. The CPU's repacked types are copied into another layout, and the mapped
    original stays resident beside the copy: reading instead saves it (57 of 258 MB on SmolLM2 Q4_0)."""
    repacked = sum(size for kind, size in weight_types if is_repacked(kind))
    return repacked * 4 <= sum(size for _, size in weight_types)


def predict_memory(
    weight_types: Sequence[tuple[str, int]],
    config: ModelConfig,
    settings: RuntimeSettings,
    devices: Sequence[Device],
) -> list[MemoryItem]:
    """As `Backend.predict_memory`. Several GPUs count as one, "gpu"."""
    has_gpu = any(device.kind == "gpu" for device in devices)
    layers = config.num_layers
    # The last layers go first, and the output is one more (llama_model_base::load_tensors).
    wanted = layers + 1 if settings.gpu_layers < 0 else min(settings.gpu_layers, layers + 1)
    on_gpu = wanted if has_gpu else 0
    first_on_gpu = max(0, layers + 1 - on_gpu)
    is_mapped = settings.mmap and may_map(weight_types)
    is_private = wants_private(settings, has_window=bool(config.sliding_window), has_gpu=on_gpu > 0)
    settings = replace(settings, kv_layout="private" if is_private else "shared")
    cells = -(-num_cells(settings, is_private) // CELL_ROUNDING) * CELL_ROUNDING
    seen = cells // settings.sequences if is_private else cells  # by a row
    items = _weights(config, first_on_gpu, is_mapped)
    kv_cache = _kv_cache(config, settings, cells, first_on_gpu)
    items += kv_cache
    kv_bytes = sum(item.num_bytes for item in kv_cache)
    items.append(MemoryItem("copies", _copied_cells(settings, is_private) * kv_bytes // cells))
    compute = _compute_bytes(config, settings, seen)
    if on_gpu:
        items.append(MemoryItem("compute", compute, "gpu"))
    # With every layer on a GPU the processor still gathers embeddings and masks; a layer left to it
    # takes the whole.
    at_home = _inputs_bytes(config, settings, seen) if first_on_gpu == 0 else compute
    items.append(MemoryItem("compute", at_home))
    items.append(MemoryItem("logits", num_logit_rows(settings) * config.vocab_size * _FLOAT))
    items.append(MemoryItem("work", _work_bytes(config, settings, seen)))
    if not is_read_in_tiles(settings) and settings.flash_attention and on_gpu == 0:
        items.append(MemoryItem("unpacked", _unpacked_bytes(config, seen)))
    tables = (
        config.vocab_size * _TOKEN + config.num_merges * _MERGE + _num_caches(config) * cells * _CELL
    )
    items.append(MemoryItem("tables", tables))
    items.append(MemoryItem("process", _PROCESS))
    return [item for item in items if item.num_bytes]


def _weights(config: ModelConfig, first_on_gpu: int, is_mapped: bool) -> list[MemoryItem]:
    """first_on_gpu: of the layers, the output counting as one behind the last."""
    plain = repacked = gpu = 0
    tiles_output = config.vocab_size % _REPACKED_ROWS == 0
    for group in config.weights:
        layer = config.num_layers if group.layer == OUTPUT else group.layer
        if layer >= first_on_gpu:  # never the embeddings
            gpu += group.num_bytes
        elif (
            group.layer != INPUT
            and is_repacked(group.type_name)
            and (group.layer != OUTPUT or tiles_output)
        ):
            repacked += group.num_bytes
            plain += group.num_bytes if is_mapped else 0  # the file's pages stay beside the copy
        else:
            plain += group.num_bytes
        if group.layer == INPUT and config.is_tied:
            # As the output they are a matrix, and a second copy where that lies elsewhere.
            if first_on_gpu <= config.num_layers:
                gpu += group.num_bytes
            elif is_repacked(group.type_name) and tiles_output:
                repacked += group.num_bytes
    if not config.weights:
        plain = config.weights_bytes
    return [
        MemoryItem("weights", plain, form="mapped" if is_mapped else ""),
        MemoryItem("weights", repacked, form="repacked"),
        MemoryItem("weights", gpu, "gpu"),
    ]


def _kv_cache(
    config: ModelConfig, settings: RuntimeSettings, cells: int, first_on_gpu: int
) -> list[MemoryItem]:
    """All layers are full-size, those with a sliding window too (swa_full)."""
    home = gpu = 0
    for layer, heads in enumerate(config.num_kv_heads):
        cell = row_bytes(settings.kv_type_k, heads * config.head_dim_k)
        if config.caches_values:
            cell += row_bytes(settings.kv_type_v, heads * config.head_dim_v)
        if layer >= first_on_gpu:
            gpu += cell * cells
        else:
            home += cell * cells
    return [MemoryItem("kv cache", home), MemoryItem("kv cache", gpu, "gpu")]


def _copied_cells(settings: RuntimeSettings, is_private: bool) -> int:
    """Of which there is a copy on their way from or to host memory: of a sequence, or of a lone one as
    its rows and as llama.cpp's state of a block."""
    is_lone = is_private and settings.sequences == 1
    return min(2 * BLOCK_TOKENS, settings.context) if is_lone else settings.context


def _unpacked_bytes(config: ModelConfig, cells: int) -> int:
    """The keys and values of a layer in f32, for as many cells as a row sees (unpacked_kv.py)."""
    heads = max(config.num_kv_heads, default=0)
    return heads * (config.head_dim_k + config.head_dim_v) * _FLOAT * cells


def _num_caches(config: ModelConfig) -> int:
    """A model with a sliding window has a second cache, and a second mask, for its other layers."""
    return 2 if config.sliding_window else 1


def _step_tokens(settings: RuntimeSettings, cells: int) -> int:
    """Rows of the graph that is reserved: a multiple of the sequences (graph_reserve)."""
    sequences = native_sequences(settings, settings.kv_layout == "private")
    return -(-min(settings.step_tokens, cells) // sequences) * sequences


def _inputs_bytes(config: ModelConfig, settings: RuntimeSettings, cells: int) -> int:
    """Masks, one half (a float without flash attention) for each row and cell, and embeddings."""
    tokens = _step_tokens(settings, cells)
    masks = _num_caches(config) * cells * tokens * (2 if settings.flash_attention else 4)
    return masks + tokens * config.hidden_size * _FLOAT


def _compute_bytes(config: ModelConfig, settings: RuntimeSettings, cells: int) -> int:
    """The fullest moment of a step. ggml plans where each tensor of the graph lies and reuses what is
    no longer needed; what is alive at once, in floats for each row of the step:

    - in the feed-forward: gate, up and their product (for each expert in use); with flash attention
      the residual, its norm and holes that ggml's best fit leaves: three hidden sizes and the heads;
    - in attention without the flash kernel: a score for each head and cell, and the queries, keys and
      values besides;
    - at the end: all logits, above the holes that the layers left.
    The masks lie there until the last layer has read them.
    """
    tokens = _step_tokens(settings, cells)
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim_k
    keys = max(config.num_kv_heads, default=0) * config.head_dim_k
    experts = max(1, config.num_experts_used)
    masks = _num_caches(config) * cells * tokens * (2 if settings.flash_attention else 4)
    feed_forward = 3 * config.intermediate_size * experts + 3 * hidden + queries
    attention = 0
    if not settings.flash_attention:
        attention = config.num_heads * cells + 3 * hidden + 2 * queries + 2 * keys
    layers = masks + tokens * _FLOAT * max(feed_forward, attention)
    rows = min(num_logit_rows(settings), tokens)
    logits = rows * config.vocab_size * _FLOAT + tokens * 3 * hidden * _FLOAT
    return max(layers, logits)


def _work_bytes(config: ModelConfig, settings: RuntimeSettings, cells: int) -> int:
    """The threads' own (ggml_graph_plan): the widest rows of a step, quantized for the product with
    quantized weights, and each thread's tile of attention; without the flash kernel all scores as
    halves, for the product with the values."""
    widest = max(config.intermediate_size, config.hidden_size)
    rows = row_bytes("q8_0", widest)
    if not settings.flash_attention:
        rows = max(rows, config.num_heads * cells * 2)
    rows *= settings.step_tokens
    tile = TILE
    dims = 2 * (config.head_dim_k + config.head_dim_v) * tile + 2 * tile * tile
    threads = max(settings.threads, settings.threads_batch, 1)
    return rows + threads * (_TILED_PRODUCT + dims * _FLOAT)
