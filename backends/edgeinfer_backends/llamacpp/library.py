"""The native library: imported once, its log sent to Python logging, its last complaint remembered.

Only the ctypes layer of llama-cpp-python is imported. Its package `__init__` pulls in the `Llama`
class with numpy, jinja2 and diskcache; measured, skipping it saves 0.15 s and 10 MB in the worker.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections import deque
from functools import cache
from types import ModuleType
from typing import Any

from edgeinfer.backend import Device
from edgeinfer.errors import BackendUnavailable

log = logging.getLogger("edgeinfer.llamacpp")

# enum ggml_log_level (ggml.h, llama-cpp-python 0.3.36)
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUATION = 5
# Said of every step that `abort` ended: GGML_STATUS_ABORTED = 1 (llama-context.cpp, 0.3.36)
_ABORTED = (
    "graph_compute_async failed with error 1",
    "failed to compute graph, compute status: 1",
    "failed to decode, ret = 2",
)

_device_kinds: dict[int, Any] = {0: "cpu", 1: "gpu", 2: "gpu", 3: "npu"}  # enum ggml_backend_dev_type


class NativeLog:
    """Receives every line llama.cpp and ggml print. Keeps the last errors, to explain a failure, and
    what was said about memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: deque[str] = deque(maxlen=8)
        self._sizes: deque[str] = deque(maxlen=64)
        self._rotations: list[bool] = []
        self._level = logging.DEBUG
        self._partial = ""

    def receive(self, level: int, text: bytes | None, _data: Any) -> None:
        """Called from native threads; must not raise."""
        try:
            decoded = (text or b"").decode("utf-8", "replace")
            with self._lock:
                if level != _CONTINUATION:
                    self._level = _LEVELS.get(level, logging.DEBUG)
                self._partial += decoded
                *lines, self._partial = self._partial.split("\n")
                for line in filter(None, (line.strip() for line in lines)):
                    if "buffer size" in line:
                        self._sizes.append(line)
                    elif "attn_rot_k = " in line:
                        self._rotations.append("attn_rot_k = 1" in line)
                    level_of_line = logging.DEBUG if line.endswith(_ABORTED) else self._level
                    if level_of_line >= logging.ERROR:
                        self._errors.append(line)
                    log.log(level_of_line, "%s", line)
        except Exception:
            return

    def clear(self) -> None:
        with self._lock:
            self._errors.clear()
            self._sizes.clear()
            self._rotations.clear()

    def reason(self) -> str:
        """The most telling of the last error lines; "" if there was none."""
        with self._lock:
            errors = list(self._errors)
        for line in errors:
            # llama.cpp reports "error loading model: REASON" and then repeats itself less exactly
            if "error loading model" in line or "exception" in line:
                return line.split(": ", 2)[-1] if ": " in line else line
        return errors[0] if errors else ""

    def size_lines(self) -> list[str]:
        """What llama.cpp said it allocated since `clear`: its API does not tell."""
        with self._lock:
            return list(self._sizes)

    def rotates_keys(self) -> bool:
        """Whether llama.cpp said since `clear` that it rotates keys, in every cache it made."""
        with self._lock:
            return bool(self._rotations) and all(self._rotations)


native_log = NativeLog()


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


@cache
def library() -> Any:
    """`llama_cpp.llama_cpp`, initialised. Raises BackendUnavailable."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort must not start a debugger
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("llama-cpp-python is not installed; `pip install llama-cpp-python`")
    if "llama_cpp" not in sys.modules:
        package = ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["llama_cpp"] = package
    try:
        lib: Any = importlib.import_module("llama_cpp.llama_cpp")
    except Exception as error:
        raise BackendUnavailable(
            f"llama-cpp-python is installed but does not load: {error}; reinstall it with `make setup`"
        ) from error
    # typedef void (*ggml_log_callback)(enum ggml_log_level level, const char * text, void * user_data)
    # The reference lives on the module: a collected callback crashes the process at the next line.
    lib.edgeinfer_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        native_log.receive
    )
    # LLAMA_API void llama_log_set(ggml_log_callback log_callback, void * user_data)  (0.3.36)
    lib.llama_log_set(
        ctypes.cast(lib.edgeinfer_log_callback, lib.llama_log_callback), ctypes.c_void_p(0)
    )
    lib.llama_backend_init()
    return lib


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("llama-cpp-python")
    except PackageNotFoundError:
        return "unknown"


def build_description() -> str:
    """Version and every compile-time switch that llama.cpp reports (SIMD, OpenMP, repack, …)."""
    lib = library()
    info = lib.llama_print_system_info().decode("utf-8", "replace").strip()
    return f"llama-cpp-python {version()}; {info}"


def rotation_switch() -> str:
    """llama.cpp rotates quantized K and V unless this is set: same types, other contents."""
    return os.environ.get("LLAMA_ATTN_ROT_DISABLE", "0")


@cache
def ggml() -> Any:
    """The symbols of ggml."""
    lib = library()
    handle = lib._lib  # dlsym through libllama also finds the symbols of the ggml it links
    handle.ggml_backend_dev_count.restype = ctypes.c_size_t
    handle.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    handle.ggml_backend_dev_get.restype = ctypes.c_void_p
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        function = getattr(handle, name)
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_char_p
    handle.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    handle.ggml_backend_dev_type.restype = ctypes.c_int
    handle.ggml_backend_dev_memory.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    handle.ggml_backend_dev_memory.restype = None
    return handle


def devices() -> tuple[Device, ...]:
    """What this build can place work on, as ggml lists it."""
    try:
        symbols = ggml()
        found = []
        for index in range(symbols.ggml_backend_dev_count()):
            device = symbols.ggml_backend_dev_get(index)
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            # void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total)
            symbols.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append(
                Device(
                    name=(symbols.ggml_backend_dev_description(device) or b"?").decode(
                        "utf-8", "replace"
                    ),
                    kind=_device_kinds.get(symbols.ggml_backend_dev_type(device), "cpu"),
                    total_bytes=total.value,
                    free_bytes=free.value,
                )
            )
        return tuple(found)
    except (AttributeError, OSError):  # a build that hides ggml's symbols
        return (Device("CPU", "cpu"),)


def abort_flag() -> tuple[Any, Any]:
    """(callback, flag): native code stops the step it is in once `flag[0]` is not 0.

    The callback is libc's `strlen` over a two-byte buffer: "" has length 0 (go on), "\\1" length 1
    (stop). A Python callback would take the interpreter lock some 500 times a step (measured: 5 ms
    steps became over a second beside a busy thread); this one never enters Python.
    """
    lib = library()
    flag = ctypes.create_string_buffer(2)
    c_library = ctypes.CDLL("msvcrt") if sys.platform == "win32" else ctypes.CDLL(None)
    callback = ctypes.cast(c_library.strlen, lib.ggml_abort_callback)
    return callback, flag
