"""Model and context creation: arguments checked here, errors of llama.cpp mapped once."""

from __future__ import annotations

import ctypes
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from edgeinfer.backend import MemoryItem, Progress, RuntimeSettings
from edgeinfer.errors import LoadFailed
from edgeinfer_backends.llamacpp.library import abort_flag, library, native_log
from edgeinfer_models.model_files import ModelFiles

# enum ggml_type, the ones llama.cpp takes for a KV cache (ggml.h, 0.3.36)
KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
QUANTIZED_KV = frozenset(KV_TYPES) - {"f32", "f16", "bf16"}

# Cells beyond every sequence's context, so that sequences can be aligned to tiles (see cells.py).
TILE_SLACK = 128

# Sequences of our own beside the caller's: see runtime.py.
RESERVED_SEQUENCES = 3
MAX_NATIVE_SEQUENCES = 256  # LLAMA_MAX_SEQ (llama-cparams.h)

# Repacked on x86 with AVX2 and on Arm with dot products (ggml-cpu/repack.cpp, 0.3.36).
_REPACKED = frozenset({"q4_0", "q4_k", "iq4_nl"})

_COMPUTE_BUFFER = re.compile(r"(\S+)\s+compute buffer size\s*=\s*([\d.]+) MiB")
_KV_BUFFER = re.compile(r"(\S+)\s+KV buffer size\s*=\s*([\d.]+) MiB")
_WEIGHTS = re.compile(r"(\S+) model buffer size\s*=\s*([\d.]+) MiB")


@dataclass
class NativeContext:
    """The handles of a loaded model. `close` frees them in reverse order, once."""

    model: Any
    vocab: Any
    context: Any
    memory: Any
    abort_flag: Any
    items: list[MemoryItem]
    _stack: ExitStack

    def close(self) -> None:
        self._stack.close()


def create_context(
    files: ModelFiles, settings: RuntimeSettings, sequences: int, progress: Progress
) -> NativeContext:
    """Load the weights and make a context with room for `sequences` handles. Raises LoadFailed."""
    lib = library()
    native_log.clear()
    with ExitStack() as stack:
        model, cancelled = _load_model(lib, files, settings, progress, stack)
        if model is None:
            if cancelled:
                raise LoadFailed(f"loading {files.name} was cancelled")
            reason = native_log.reason() or "llama.cpp gave no reason"
            raise LoadFailed(f"{files.name}: llama.cpp cannot load it: {reason}")
        vocab = lib.llama_model_get_vocab(model)
        if lib.llama_vocab_n_tokens(vocab) < 1:
            raise LoadFailed(f"{files.name} has no vocabulary; edgeinfer needs a text model")
        if lib.llama_model_has_encoder(model):
            raise LoadFailed(f"{files.name} is an encoder-decoder model; only decoders can be run")
        params, flag = _context_params(lib, settings, sequences)
        # LLAMA_API struct llama_context * llama_init_from_model(struct llama_model * model,
        #     struct llama_context_params params)
        context = lib.llama_init_from_model(model, params)
        if not context:
            reason = native_log.reason() or "llama.cpp gave no reason"
            raise LoadFailed(f"{files.name}: no context of {settings.context} tokens: {reason}")
        stack.callback(lib.llama_free, context)
        memory = lib.llama_get_memory(context)
        if not memory:
            raise LoadFailed(f"{files.name} keeps no KV cache; it cannot generate text")
        if lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model):
            raise LoadFailed(
                f"{files.name} has recurrent layers, whose state cannot be rewound; not supported yet"
            )
        items = _memory_items(native_log.size_lines())
        return NativeContext(model, vocab, context, memory, flag, items, stack.pop_all())


def _load_model(
    lib: Any, files: ModelFiles, settings: RuntimeSettings, progress: Progress, stack: ExitStack
) -> tuple[Any, bool]:
    cancelled = False

    def report(fraction: float, _data: Any) -> bool:
        nonlocal cancelled
        try:
            go_on = progress(fraction)
        except Exception:  # an exception must not unwind through C frames
            go_on = False
        cancelled = cancelled or not go_on
        return go_on

    params = lib.llama_model_default_params()
    params.n_gpu_layers = settings.gpu_layers
    # enum llama_load_mode: NONE = 0, MMAP = 1 (llama.h, 0.3.36)
    params.load_mode = 1 if settings.mmap and _may_map(lib, files) else 0
    callback = lib.llama_progress_callback(report)  # alive until the load returns
    params.progress_callback = callback
    paths = [str(path).encode("utf-8", "surrogateescape") for path in files.paths]
    # LLAMA_API struct llama_model * llama_model_load_from_splits(const char ** paths, size_t n_paths,
    #     struct llama_model_params params)
    array = (ctypes.c_char_p * len(paths))(*paths)
    model = lib.llama_model_load_from_splits(array, len(paths), params)
    if not model:
        return None, cancelled
    stack.callback(lib.llama_model_free, model)
    return model, False


def _may_map(lib: Any, files: ModelFiles) -> bool:
    """Whether to map the file. The CPU's repacked types are copied into another layout, and the mapped
    original stays resident beside the copy: reading instead saves it (57 of 258 MB on SmolLM2 Q4_0)."""
    repacked = sum(size for kind, size in files.weight_types if kind.lower() in _REPACKED)
    total = sum(size for _, size in files.weight_types)
    return bool(lib.llama_supports_mmap()) and repacked * 4 <= total


def _context_params(lib: Any, settings: RuntimeSettings, sequences: int) -> tuple[Any, Any]:
    for name in (settings.kv_type_k, settings.kv_type_v):
        if name not in KV_TYPES:
            raise LoadFailed(f"--kv-type {name} is not known to llama.cpp; one of {', '.join(KV_TYPES)}")
    if settings.kv_type_v in QUANTIZED_KV and not settings.flash_attention:
        raise LoadFailed(f"a {settings.kv_type_v} V cache needs flash attention, which is off")
    params = lib.llama_context_default_params()
    params.n_ctx = settings.context * settings.sequences
    if settings.sequences > 1:
        params.n_ctx += TILE_SLACK * settings.sequences
    params.n_batch = params.n_ubatch = min(settings.step_tokens, params.n_ctx)
    params.n_seq_max = sequences + RESERVED_SEQUENCES
    params.n_outputs_max = settings.logit_rows
    if settings.threads:
        params.n_threads = settings.threads
    if settings.threads_batch:
        params.n_threads_batch = settings.threads_batch
    # enum llama_flash_attn_type: DISABLED = 0, ENABLED = 1
    params.flash_attn_type = 1 if settings.flash_attention else 0
    params.type_k = KV_TYPES[settings.kv_type_k]
    params.type_v = KV_TYPES[settings.kv_type_v]
    params.kv_unified = True  # sequences share cells: a fork copies nothing
    params.swa_full = True  # a sliding-window cache that forgets cannot be rewound or shared
    params.no_perf = True
    callback, flag = abort_flag()
    params.abort_callback = callback
    params.abort_callback_data = ctypes.cast(flag, ctypes.c_void_p)
    return params, flag


def _memory_items(lines: list[str]) -> list[MemoryItem]:
    items = []
    for pattern, name in ((_WEIGHTS, "weights"), (_KV_BUFFER, "kv cache"), (_COMPUTE_BUFFER, "compute")):
        for line in lines:
            match = pattern.search(line)
            if match:
                items.append(MemoryItem(name, int(float(match[2]) * 2**20), match[1]))
    return items
