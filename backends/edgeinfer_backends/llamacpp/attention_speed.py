"""How fast steps are over a KV cache of one type, against f16's: estimated from measured parts.

Before a model is loaded, on the operations that its graph will have: ggml's flash attention over caches
of the model's own shape, for one row as decoding has them and for a tile of rows as a prompt has, where
other types than f16 are unpacked first (unpacked_kv.py); and products with a matrix of the type that
most of the model's weights have, which the steps of both types share. The parts take turns, so each
finds its memory as a step does: not in the processor's cache; and the fastest run of each counts, for
what a neighbour takes from one run it does not take from all.

What a type does to attention depends on the shape: on one processor, over q8_0 it was 2.5 times as fast
as over f16 with heads of 64, and 0.6 times with heads of 256, so no table could say it. How near the
estimate comes: benchmarks/bars/05_kv_auto.py.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from edgeinfer.backend import KvSpeed, RuntimeSettings
from edgeinfer_backends.llamacpp.library import ggml, library, rotation_switch
from edgeinfer_backends.llamacpp.native import QUANTIZED_KV
from edgeinfer_backends.llamacpp.prediction import TILE
from edgeinfer_backends.llamacpp.unpacked_kv import can_unpack
from edgeinfer_models.config import INPUT, OUTPUT, ModelConfig
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME, MATRIX_TYPES, row_bytes

CELLS = 2048  # of context, at which types are compared
# Of each part's memory; together more than most processors keep of what they have read.
PART_BYTES = 24 * 2**20
MOST_BYTES = 2**28  # of a layer, for a model of any size; more is a header that is wrong
LEAST_ROUNDS, ROUNDS, MOST_S = 2, 6, 0.2
ROTATED = 64  # llama.cpp rotates keys and values of heads of whole multiples of this
_WIDTH = 2048  # of a product's matrix
_F32, _F16 = 0, 1  # enum ggml_type
_GRAPH_BYTES = 2**20  # of tensors' heads, and a graph of the default size
# Each byte of a cache: halves of 0.065, blocks of that scale. Pages of zeros would all be one page.
_FILLING = 0x2C

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)

Run = Callable[[], float]  # seconds of a layer; of a product: for a byte of the matrix


@dataclass(frozen=True)
class Shape:
    """Of attention in one layer."""

    heads: int
    kv_heads: int
    head_dim_k: int
    head_dim_v: int

    def cache_bytes(self, kv_type: str) -> int:
        row = row_bytes(kv_type, self.kv_heads * self.head_dim_k)
        return CELLS * (row + row_bytes(kv_type, self.kv_heads * self.head_dim_v))


def measure_kv_speed(config: ModelConfig, settings: RuntimeSettings, kv_type: str) -> KvSpeed | None:
    """None where it cannot be known: on a GPU, in a build that hides what this needs, and for a type
    over which this model's prompts would be read slowly or whose keys could not be shifted."""
    on_gpu = settings.gpu_layers != 0 and bool(library().llama_supports_gpu_offload())
    shape = _shape(config)
    if on_gpu or not settings.flash_attention or shape is None or kv_type not in QUANTIZED_KV:
        return None
    # Quantized without a rotation keys lose more, and cannot be shifted (create_context).
    if rotation_switch() not in ("", "0") or not can_unpack() or not _can_compute():
        return None
    try:
        decode = _ratio(shape, config, kv_type, 1, max(1, settings.threads))
        return KvSpeed(decode, _ratio(shape, config, kv_type, TILE, max(1, settings.threads_batch)))
    except (OSError, MemoryError):  # no memory to measure in: no reason not to load
        return None


def _ratio(shape: Shape, config: ModelConfig, kv_type: str, rows: int, threads: int) -> float:
    """A step's seconds over f16's cache over those over the type's."""
    weight_type, num_bytes = _weights(config, rows)
    f16, other, product = _fastest(
        _attending(shape, "f16", rows, threads),
        _attending(shape, kv_type, rows, threads),
        _multiplying(weight_type, rows, threads),
    )
    layers = sum(heads > 0 for heads in config.num_kv_heads)
    shared = product * num_bytes
    return (shared + layers * f16) / (shared + layers * other)


def _weights(config: ModelConfig, rows: int) -> tuple[str, float]:
    """(the type of most, bytes) of the weights that a step multiplies with: not the embeddings, not the
    output for a prompt, and of experts those in use. llama.cpp repacks some types, and is faster then
    than this takes it to be, most of all with many rows."""
    behind = OUTPUT if rows == 1 else 0
    groups = [g for g in config.weights if g.layer >= 0 or g.layer == behind]
    if rows == 1 and config.is_tied:
        groups += [g for g in config.weights if g.layer == INPUT]
    sizes: dict[str, int] = {}
    for group in groups:
        name = group.type_name.upper()
        sizes[name] = sizes.get(name, 0) + group.num_bytes
    share = config.num_experts_used / config.num_experts if config.num_experts else 1.0
    most = max(sizes, key=lambda name: sizes[name], default="Q8_0")
    num_bytes = sum(sizes.values()) or config.weights_bytes
    return most if most in MATRIX_TYPES else "Q8_0", num_bytes * share


def _shape(config: ModelConfig) -> Shape | None:
    kv_heads = max(config.num_kv_heads, default=0)
    dims = config.head_dim_k, config.head_dim_v
    if not kv_heads or not config.caches_values or config.num_heads % kv_heads:
        return None
    if any(dim <= 0 or dim % ROTATED for dim in dims):
        return None
    shape = Shape(config.num_heads, kv_heads, *dims)
    queries = 4 * TILE * config.num_heads * sum(dims)
    return shape if queries + shape.cache_bytes("f32") <= MOST_BYTES else None


def _fastest(*parts: AbstractContextManager[Run]) -> list[float]:
    """Of the runs of each part, in turns."""
    with ExitStack() as stack:
        runs = [stack.enter_context(part) for part in parts]
        for run in runs:
            run()  # the first time pays for page faults
        fastest = [float("inf")] * len(runs)
        end = time.perf_counter() + MOST_S
        for number in range(1, ROUNDS + 1):
            fastest = [min(least, run()) for least, run in zip(fastest, runs, strict=True)]
            if number >= LEAST_ROUNDS and time.perf_counter() > end:
                break
    return fastest


@contextmanager
def _attending(shape: Shape, kv_type: str, rows: int, threads: int) -> Iterator[Run]:
    """Attention over caches of one type. Of a tile of rows over a quantized cache: with the copies that
    unpack it."""
    lib = _functions()
    is_unpacked = rows >= TILE and kv_type in QUANTIZED_KV
    layers = 1 if rows >= TILE else max(2, PART_BYTES // shape.cache_bytes(kv_type))
    rows_bytes = 4 * rows * shape.heads * (shape.head_dim_k + 2 * shape.head_dim_v) + 2 * rows * CELLS
    layer_bytes = shape.cache_bytes(kv_type) + rows_bytes
    layer_bytes += shape.cache_bytes("f32") if is_unpacked else 0
    with _context(layers * layer_bytes) as context:
        mask = _filled(context, _F16, (CELLS, rows, 1), 0)
        graph = lib.ggml_new_graph(context)
        for _ in range(layers):
            queries = _filled(context, _F32, (shape.head_dim_k, rows, shape.heads), _FILLING)
            pair = []
            for dim in (shape.head_dim_k, shape.head_dim_v):
                # As a cache has them, a cell's heads side by side, and as attention reads them.
                stored = _filled(context, _type_id(kv_type), (dim, shape.kv_heads, CELLS), _FILLING)
                stored = lib.ggml_cast(context, stored, _F32) if is_unpacked else stored
                pair.append(lib.ggml_permute(context, stored, 0, 2, 1, 3))
            scale = shape.head_dim_k**-0.5
            attended = lib.ggml_flash_attn_ext(context, queries, *pair, mask, scale, 0.0, 0.0)
            lib.ggml_build_forward_expand(graph, attended)
        yield _run(graph, threads, layers)


@contextmanager
def _multiplying(weight_type: str, rows: int, threads: int) -> Iterator[Run]:
    """The product of a matrix with as many vectors as a step has rows; of many rows a smaller one."""
    lib = _functions()
    size = PART_BYTES if rows == 1 else PART_BYTES // 8
    outputs = size // row_bytes(weight_type, _WIDTH)
    with _context(size + 4 * rows * (outputs + _WIDTH)) as context:
        matrix = _filled(context, _type_id(weight_type), (_WIDTH, outputs, 1), _FILLING)
        vectors = _filled(context, _F32, (_WIDTH, rows, 1), _FILLING)
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, lib.ggml_mul_mat(context, matrix, vectors))
        yield _run(graph, threads, size)


@contextmanager
def _context(num_bytes: int) -> Iterator[Any]:
    """Tensors' memory: for so many bytes of them. Not of malloc's, which would keep some of it."""
    lib = _functions()
    size = num_bytes + _GRAPH_BYTES
    with mmap.mmap(-1, size, **_PRIVATE) as memory:
        if _HUGE_PAGES is not None:
            with suppress(OSError):  # as the worker has them for its caches (engine/process.py)
                memory.madvise(_HUGE_PAGES)
        start = ctypes.c_char.from_buffer(memory)
        # struct ggml_context * ggml_init(struct ggml_init_params params)
        context = lib.ggml_init(_InitParams(size, ctypes.addressof(start), False))
        try:
            yield context
        finally:
            lib.ggml_free(context)
            del start  # or the memory could not be given back


def _run(graph: Any, threads: int, divisor: int) -> Run:
    lib = _functions()
    plan = lib.ggml_graph_plan(graph, threads, None)
    work = ctypes.create_string_buffer(plan.work_size + 1)
    plan.work_data = ctypes.addressof(work)

    def run(_kept: Any = work) -> float:
        begin = time.perf_counter()
        lib.ggml_graph_compute(graph, ctypes.byref(plan))
        return (time.perf_counter() - begin) / divisor

    return run


def _type_id(name: str) -> int:
    return GGML_TYPES_BY_NAME[name.upper()].id


def _filled(context: Any, kind: int, extent: tuple[int, int, int], byte: int) -> Any:
    lib = _functions()
    tensor = lib.ggml_new_tensor_3d(context, kind, *extent)
    ctypes.memset(lib.ggml_get_data(tensor), byte, lib.ggml_nbytes(tensor))
    return tensor


class _InitParams(ctypes.Structure):
    """struct ggml_init_params (ggml.h, 0.3.36)."""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class _Plan(ctypes.Structure):
    """struct ggml_cplan (ggml-cpu.h, 0.3.36)."""

    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]


@cache
def _functions() -> Any:
    """Raises AttributeError where this build does not show one of them."""
    lib = ggml()
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    whole, real = ctypes.c_int, ctypes.c_float
    for name, result, arguments in (
        # ggml.h, 0.3.36
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_3d", pointer, [pointer, whole, number, number, number]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_cast", pointer, [pointer, pointer, whole]),
        ("ggml_permute", pointer, [pointer, pointer, whole, whole, whole, whole]),
        ("ggml_flash_attn_ext", pointer, [pointer] * 5 + [real, real, real]),
        ("ggml_mul_mat", pointer, [pointer] * 3),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        # ggml-cpu.h, 0.3.36
        ("ggml_graph_plan", _Plan, [pointer, whole, pointer]),
        ("ggml_graph_compute", whole, [pointer, ctypes.POINTER(_Plan)]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _can_compute() -> bool:
    try:
        _functions()
    except AttributeError:
        return False
    return True
