"""Running llguidance's compiler where its recursion cannot end the process.

It recurses over a schema and along its references, 4 kB and more for each level: 2,000 definitions that
refer to one another overflow an ordinary stack of 8 MB (1.9.1), which no exception can say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from edgeinfer.errors import ConstraintInvalid

_STACK_BYTES = 256 * 2**20  # address space; a page is used when it is reached

T = TypeVar("T")
_starting = threading.Lock()  # the size is a setting of the whole process


def call_with_deep_stack(function: Callable[[], T]) -> T:
    """Its result or its exception. A panic of the native code becomes ConstraintInvalid."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # a panic is no Exception
            failures.append(error)

    thread = threading.Thread(target=run, name="compile-constraint", daemon=True)
    with _starting:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        except RuntimeError as error:
            raise ConstraintInvalid(f"the constraint cannot be compiled: {error}") from error
        finally:
            threading.stack_size(before)
    thread.join()
    if not failures:
        return results[0]
    if isinstance(failures[0], Exception):
        raise failures[0]
    raise ConstraintInvalid(f"the constraint cannot be compiled: {failures[0]}") from failures[0]
