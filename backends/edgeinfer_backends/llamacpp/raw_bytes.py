"""Bytes that native code fills in: megabytes of KV cache, neither zeroed nor copied on the way.

Python's `bytes` never change once anybody else has seen them; until then they are written through their
address, by whoever made them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# int madvise(void addr[.size], size_t size, int advice); these are Linux's
_HUGE_PAGE = 2 * 2**20
_HUGE_PAGES, _NO_HUGE_PAGES = 14, 15
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


def unfilled_bytes(size: int, *, is_passing: bool = False) -> bytes:
    """Bytes to be filled by native code before anybody sees them: neither zeroed nor copied.
    is_passing: they are of no use a moment later."""
    # PyObject *PyBytes_FromStringAndSize(const char *v, Py_ssize_t len), v = NULL: not initialized
    data: bytes = _new_bytes(None, size)
    if _madvise is not None and size >= _HUGE_PAGE:
        # The worker asks for huge pages, which pay for what is read at every step. What is written once
        # and kept does better with pages that were used before (4 MB took 4 ms, in huge ones 2 to 12);
        # what passes comes from the system and goes back (65 MB took 45 ms to fill, in huge ones 22).
        page = mmap.PAGESIZE
        start = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        first, last = -(-start // page) * page, (start + size) // page * page
        advice = _HUGE_PAGES if is_passing else _NO_HUGE_PAGES
        _madvise(first, last - first, advice)  # whether it is taken does not matter
    return data


def writable(data: bytes, offset: int) -> npt.NDArray[np.uint8]:
    """uint8 array of what lies behind `offset` in bytes that nobody else has seen yet."""
    import numpy as np

    return np.ctypeslib.as_array(address_of(data, offset), (len(data) - offset,))


def address_of(data: bytes, offset: int) -> Any:
    base = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    assert base is not None
    return ctypes.cast(base + offset, ctypes.POINTER(ctypes.c_uint8))


def overwrite(data: bytes, offset: int, part: bytes) -> None:
    """Fill in bytes that nobody else has seen yet."""
    assert offset + len(part) <= len(data)
    ctypes.memmove(address_of(data, offset), part, len(part))
