"""Prefill over a quantized KV cache at the speed it has over f16.

On the processor llama.cpp's flash attention works in tiles only where keys and values are f16 or f32
(ggml_compute_forward_flash_attn_ext_f16, ggml-cpu/ops.cpp, 0.3.36); over any other type it goes row by
row, and a prompt takes four to seven times as long. Here a step of a tile of rows or more reads keys and
values unpacked to f32, of one layer at a time: in the step's graph the view of the cache that attention
reads becomes a copy of that view, which all threads make on their way. What is stored does not change,
so snapshots, forks, shifts and small steps are those of llama.cpp, and so are the numbers: this is
attention over the same quantized keys and values, with queries that are not rounded.

llama.cpp asks `cb_eval` about each node of a graph that it has built, before any is computed: there the
graph is changed. A callback into Python for each of some 900 nodes would be felt in a small step, so it
is set for the steps that gain by it and unset for the others, in the context's own parameters
(llama_context::get_cparams). All that is taken for granted about llama.cpp's memory is checked when a
model is loaded; where anything is otherwise, the runtime says that prefill is slow.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from edgeinfer_backends.llamacpp.library import ggml, library
from edgeinfer_backends.llamacpp.prediction import TILE

_MAX_DIMS, _MAX_SRC, _MAX_NAME, _OP_PARAMS = 4, 10, 64, 64  # ggml.h, 0.3.36
_OBJECT_BYTES = 32  # struct ggml_object (ggml.c)
_FLAG_COMPUTE = 16  # enum ggml_tensor_flag
_F32 = 0  # enum ggml_type
_OPS = ("NONE", "CPY", "VIEW", "PERMUTE", "FLASH_ATTN_EXT")
_NUM_OPS = 96  # enum ggml_op has a few more
_WORDS = 48  # of a context's parameters that are searched for the callback
_PERMUTATION = (0, 2, 1, 3)


class _Tensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h, 0.3.36); pointers as numbers."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _MAX_DIMS),
        ("nb", ctypes.c_size_t * _MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * (_OP_PARAMS // 4)),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _MAX_NAME),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


_OP_OFFSET = _Tensor.op.offset


class _OtherGraph(Exception):
    pass


class UnpackedKv:
    """The switch, and the copy: one for each context, made before it. `with` it, a step of a tile of
    rows or more is run."""

    def __init__(self) -> None:
        prototype = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
        self.callback = prototype(self._is_asked)
        # The callback's user data: with its address, what its place in a context is known by.
        self.mark = ctypes.cast(ctypes.create_string_buffer(8), ctypes.c_void_p)
        self._ops = _operations()
        self._attention = self._ops.get("FLASH_ATTN_EXT", -1)
        self._switch: Any = None
        self._memory: mmap.mmap | None = None
        self._starts = (0, 0)
        self._sizes = (0, 0)
        # The views of the graph that is there, as they were.
        self._sources: list[_Tensor] = []
        self._num_used = 0
        self._row_bytes = [0, 0]  # of keys and of values, unpacked, of the layer where they are most
        self.num_unpacked = 0  # attention nodes of the last step
        self.num_refused = 0  # those whose keys and values are not where they were looked for

    def take_hold(self, context: Any) -> bool:
        """Find the callback in the parameters of a new context, and unset it. False: not there."""
        function = _context_parameters()
        if function is None or not self._ops:
            return False
        # const llama_cparams & llama_context::get_cparams() const (llama-context.h, 0.3.36)
        address = function(ctypes.cast(context, ctypes.c_void_p))
        words = (ctypes.c_void_p * _WORDS).from_address(address)
        own = (self._address, self.mark.value)
        for index in range(_WORDS - 1):
            if (words[index], words[index + 1]) == own:
                self._switch = ctypes.c_void_p.from_address(
                    address + index * ctypes.sizeof(ctypes.c_void_p)
                )
                self._switch.value = None
                return True
        return False

    @property
    def _address(self) -> int | None:
        return ctypes.cast(self.callback, ctypes.c_void_p).value

    def reserve(self, cells: int) -> int:
        """After a step that was only begun: memory for as many cells as a row can see; its bytes. 0: the
        graph is not the one that is known here."""
        if self.num_refused or not all(self._row_bytes):
            return 0
        self._sizes = (self._row_bytes[0] * cells, self._row_bytes[1] * cells)
        # Pages that nobody has written to are not there: it grows with what is in the cache.
        self._memory = mmap.mmap(-1, sum(self._sizes))
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._starts = (start, start + self._sizes[0])
        return sum(self._sizes)

    def __enter__(self) -> None:
        self._num_used = self.num_unpacked = self.num_refused = 0
        self._switch.value = self._address

    def __exit__(self, *_error: object) -> None:
        self._switch.value = None

    # -- in the middle of llama_decode -----------------------------------------------------------

    def _is_asked(self, address: int, _ask: bool, _data: int) -> bool:
        """About a node: never wants to look at one, so all of the graph is computed in one go, after it
        was asked about. Must not raise."""
        if ctypes.c_int.from_address(address + _OP_OFFSET).value == self._attention:
            try:
                self._unpack_for(_Tensor.from_address(address))
            except Exception:
                self.num_refused += 1
        return False

    def _unpack_for(self, attention: _Tensor) -> None:
        if _Tensor.from_address(attention.src[0]).ne[1] < TILE:
            return  # few rows of each sequence: not in tiles, whatever the type
        pairs = [self._cache_view(attention.src[place]) for place in (1, 2)]
        if all(view.type == _F32 for _, view in pairs):
            self.num_unpacked += 1  # a graph that llama.cpp uses again
            return
        if self._memory is None:  # a step that is only begun
            for index, (_, view) in enumerate(pairs):
                row = 4 * view.ne[0] * view.ne[1]
                self._row_bytes[index] = max(self._row_bytes[index], row)
            return
        for (_, view), size in zip(pairs, self._sizes, strict=True):
            if 4 * view.ne[0] * view.ne[1] * view.ne[2] > size:
                raise _OtherGraph
        for (permuted, view), start in zip(pairs, self._starts, strict=True):
            self._unpack(permuted, view, start)
        self.num_unpacked += 1

    def _cache_view(self, address: int) -> tuple[_Tensor, _Tensor]:
        """(as attention reads it, the view of the cache), of one stream of cells, as they are made in
        build_attn_mha (llama-graph.cpp, 0.3.36): ggml_permute(view, 0, 2, 1, 3). Raises _OtherGraph."""
        permuted = _Tensor.from_address(address)
        if permuted.op != self._ops["PERMUTE"] or not permuted.src[0]:
            raise _OtherGraph
        view = _Tensor.from_address(permuted.src[0])
        as_expected = (
            view.op in (self._ops["VIEW"], self._ops["CPY"])
            and view.ne[3] == 1
            and list(permuted.ne) == [view.ne[i] for i in _PERMUTATION]
            and list(permuted.nb) == [view.nb[i] for i in _PERMUTATION]
            and permuted.data == view.data
        )
        if not as_expected:
            raise _OtherGraph
        return permuted, view

    def _unpack(self, permuted: _Tensor, view: _Tensor, start: int) -> None:
        """Make `view` a copy, in f32 at `start`, of what it was a view of."""
        if self._num_used == len(self._sources):
            self._sources.append(_Tensor())
        source = self._sources[self._num_used]
        self._num_used += 1
        ctypes.memmove(ctypes.addressof(source), ctypes.addressof(view), ctypes.sizeof(_Tensor))
        source.op = self._ops["NONE"]
        size = 4
        for index in range(_MAX_DIMS):
            view.nb[index] = size
            size *= view.ne[index]
        for index, place in enumerate(_PERMUTATION):
            permuted.nb[index] = view.nb[place]
        for tensor in (view, permuted):
            tensor.type = _F32
            tensor.data = start
        # As ggml_cast makes it (ggml.c): the copy is its own second source.
        view.op = self._ops["CPY"]
        view.src[0], view.src[1] = ctypes.addressof(source), ctypes.addressof(view)
        view.view_src, view.view_offs = None, 0
        view.flags |= _FLAG_COMPUTE
        permuted.view_src, permuted.view_offs = ctypes.addressof(view), 0


def can_unpack() -> bool:
    """Whether this build shows what unpacking needs; a model's graph may still be another."""
    return bool(_operations()) and _context_parameters() is not None


def _operations() -> dict[str, int]:
    """Numbers of the operations met here, by name; empty where tensors have another form than known."""
    lib = ggml()
    # GGML_API size_t ggml_tensor_overhead(void): an object's head and a tensor (ggml.h, 0.3.36)
    lib.ggml_tensor_overhead.restype = ctypes.c_size_t
    if lib.ggml_tensor_overhead() != _OBJECT_BYTES + ctypes.sizeof(_Tensor):
        return {}
    # GGML_API const char * ggml_op_name(enum ggml_op op)
    lib.ggml_op_name.restype = ctypes.c_char_p
    lib.ggml_op_name.argtypes = [ctypes.c_int]
    found: dict[str, int] = {}
    for number in range(_NUM_OPS):
        name = (lib.ggml_op_name(number) or b"").decode("ascii", "replace")
        if name in _OPS:
            found[name] = number
    return found if len(found) == len(_OPS) else {}


def _context_parameters() -> Any:
    """`llama_context::get_cparams`, where the library shows it (with the names of GCC and Clang)."""
    try:
        function = library()._lib["_ZNK13llama_context11get_cparamsEv"]
    except AttributeError:
        return None
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_void_p
    return function
