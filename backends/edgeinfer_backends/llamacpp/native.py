"""Model and context creation: arguments checked here, errors of llama.cpp mapped once."""

from __future__ import annotations

import ctypes
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from edgeinfer.backend import KvLayout, MemoryForm, MemoryItem, Progress, RuntimeSettings
from edgeinfer.errors import LoadFailed
from edgeinfer_backends.llamacpp.library import abort_flag, library, native_log
from edgeinfer_backends.llamacpp.prediction import (
    is_read_in_tiles,
    may_map,
    native_sequences,
    num_cells,
    num_logit_rows,
    sequence_handles,
    wants_private,
)
from edgeinfer_backends.llamacpp.unpacked_kv import UnpackedKv
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

ROPE_TYPE_MROPE = 8  # enum llama_rope_type: the M-RoPE kinds have this bit (llama.h, 0.3.36)

_BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB")
_BUFFER_NAMES = {"model": "weights", "KV": "kv cache", "compute": "compute", "output": "logits"}


@dataclass
class NativeContext:
    """The handles of a loaded model. `close` frees them in reverse order, once."""

    model: Any
    vocab: Any
    context: Any
    memory: Any
    abort_flag: Any
    items: list[MemoryItem]
    layout: KvLayout
    sequences: int  # handles
    can_shift: bool
    unpacked: UnpackedKv | None  # for steps that would not be read in tiles otherwise
    _stack: ExitStack

    def close(self) -> None:
        self._stack.close()


def create_context(files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> NativeContext:
    """Load the weights and make a context. Raises LoadFailed."""
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
        layout = _layout(lib, model, settings)
        sequences = settings.sequences if layout == "private" else sequence_handles(settings.sequences)
        params, flag = _context_params(lib, settings, layout)
        unpacked = UnpackedKv() if is_slow_to_read(lib, settings) else None
        context = _new_context(lib, model, params, files, settings, unpacked)
        if unpacked is not None and not unpacked.take_hold(context):
            # Where it cannot be switched off, it would slow every step.
            lib.llama_free(context)
            unpacked = None
            context = _new_context(lib, model, params, files, settings, None)
        stack.callback(lib.llama_free, context)
        memory = lib.llama_get_memory(context)
        if not memory:
            raise LoadFailed(f"{files.name} keeps no KV cache; it cannot generate text")
        if lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model):
            raise LoadFailed(
                f"{files.name} has recurrent layers, whose state cannot be rewound; not supported yet"
            )
        items = _memory_items(native_log.size_lines())
        # Where quantized keys are not rotated (heads not of whole 64s, LLAMA_ATTN_ROT_DISABLE), the
        # graph that shifts them reads a rotation that is not there, and the process ends
        # (llama_kv_cache::build_rope_shift, 0.3.36).
        is_safe = settings.kv_type_k not in QUANTIZED_KV or native_log.rotates_keys()
        can_shift = bool(lib.llama_memory_can_shift(memory)) and is_safe
        return NativeContext(
            model,
            vocab,
            context,
            memory,
            flag,
            items,
            layout,
            sequences,
            can_shift,
            unpacked,
            stack.pop_all(),
        )


def is_slow_to_read(lib: Any, settings: RuntimeSettings) -> bool:
    """Whether a step of many rows takes llama.cpp's slow way through this cache."""
    on_gpu = settings.gpu_layers != 0 and bool(lib.llama_supports_gpu_offload())
    return settings.flash_attention and not on_gpu and not is_read_in_tiles(settings)


def _new_context(
    lib: Any,
    model: Any,
    params: Any,
    files: ModelFiles,
    settings: RuntimeSettings,
    unpacked: UnpackedKv | None,
) -> Any:
    callback_type = lib.ggml_backend_sched_eval_callback
    if unpacked is None:
        params.cb_eval, params.cb_eval_user_data = callback_type(), None
    else:
        params.cb_eval = ctypes.cast(unpacked.callback, callback_type)
        params.cb_eval_user_data = unpacked.mark
    # LLAMA_API struct llama_context * llama_init_from_model(struct llama_model * model,
    #     struct llama_context_params params)
    context = lib.llama_init_from_model(model, params)
    if not context:
        reason = native_log.reason() or "llama.cpp gave no reason"
        raise LoadFailed(f"{files.name}: no context of {settings.context} tokens: {reason}")
    return context


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
    is_mapped = settings.mmap and lib.llama_supports_mmap() and may_map(files.weight_types)
    params.load_mode = 1 if is_mapped else 0
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


def _layout(lib: Any, model: Any, settings: RuntimeSettings) -> KvLayout:
    has_gpu = settings.gpu_layers != 0 and bool(lib.llama_supports_gpu_offload())
    has_window = lib.llama_model_n_swa(model) > 0
    # M-RoPE's cells have an extension, which sequence_state.py does not know.
    has_plain_cells = lib.llama_model_rope_type(model) < ROPE_TYPE_MROPE
    private = wants_private(settings, has_window=has_window, has_gpu=has_gpu) and has_plain_cells
    return "private" if private else "shared"


def _context_params(lib: Any, settings: RuntimeSettings, layout: KvLayout) -> tuple[Any, Any]:
    for name in (settings.kv_type_k, settings.kv_type_v):
        if name not in KV_TYPES:
            raise LoadFailed(f"--kv-type {name} is not known to llama.cpp; one of {', '.join(KV_TYPES)}")
    if settings.kv_type_v in QUANTIZED_KV and not settings.flash_attention:
        raise LoadFailed(f"a {settings.kv_type_v} V cache needs flash attention, which is off")
    params = lib.llama_context_default_params()
    is_private = layout == "private"
    params.n_ctx = num_cells(settings, is_private)
    params.n_batch = params.n_ubatch = min(settings.step_tokens, params.n_ctx)
    params.n_seq_max = native_sequences(settings, is_private)
    params.n_outputs_max = num_logit_rows(settings)
    if settings.threads:
        params.n_threads = settings.threads
    if settings.threads_batch:
        params.n_threads_batch = settings.threads_batch
    # enum llama_flash_attn_type: DISABLED = 0, ENABLED = 1
    params.flash_attn_type = 1 if settings.flash_attention else 0
    params.type_k = KV_TYPES[settings.kv_type_k]
    params.type_v = KV_TYPES[settings.kv_type_v]
    # Sequences share cells: a fork copies nothing. A lone one shares them with its copies.
    params.kv_unified = not is_private or settings.sequences == 1
    params.swa_full = True  # a sliding-window cache that forgets cannot be rewound or shared
    params.no_perf = True
    callback, flag = abort_flag()
    params.abort_callback = callback
    params.abort_callback_data = ctypes.cast(flag, ctypes.c_void_p)
    return params, flag


def _memory_items(lines: list[str]) -> list[MemoryItem]:
    """What llama.cpp said it allocated, added up by name, device and form. Figures of 10 KiB."""
    sizes: dict[MemoryItem, float] = {}  # by an item without its size
    for line in lines:
        match = _BUFFER.search(line)
        if match:
            device, form = _place(match[1])
            item = MemoryItem(_BUFFER_NAMES[match[2]], 0, device, form)
            sizes[item] = sizes.get(item, 0.0) + float(match[3])
    return [replace(item, num_bytes=int(mib * 2**20)) for item, mib in sizes.items() if mib]


def _place(buffer: str) -> tuple[str, MemoryForm]:
    """Device and form of a buffer by llama.cpp's name: CPU, CPU_Mapped, CPU_REPACK, CUDA0, CUDA_Host."""
    if buffer == "CPU_REPACK":
        return "cpu", "repacked"
    if buffer.endswith("_Mapped"):
        return "cpu", "mapped"
    return ("cpu" if buffer == "CPU" or buffer.endswith("_Host") else "gpu"), ""
