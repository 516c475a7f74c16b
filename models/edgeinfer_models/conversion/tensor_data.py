"""Tensors' data on their way into a file: made part by part by several threads, written in order.

A part is read, turned into float32, checked and rounded by one thread, while others do the next ones and
the file takes those before. Only a few parts exist at a time, so memory does not grow with the model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# Of F32 numbers in a part: what a core's cache holds, so that its steps do not wait for memory.
PART_BYTES = 2**20
Part = Callable[[], "Array"]
Progress = Callable[[float], None]


class Encode(Protocol):
    """What makes rows into the blocks of a type."""

    def __call__(
        self, name: str, type_name: str, rows: npt.NDArray[np.float32], first_row: int
    ) -> npt.NDArray[np.uint8]:
        """rows: (n, width), finite: those of the tensor called `name` in GGUF from `first_row` on,
        counted through all matrices where it is a stack of them (experts); a part may end in another
        matrix than it began in. Returns (n, bytes of a row). Called by several threads,
        for parts in any order."""
        ...


@dataclass(frozen=True)
class TensorData:
    """num_bytes: of all parts together. parts: each makes the next of its bytes."""

    num_bytes: int
    parts: Iterable[Part]


def write_tensors(
    file: IO[bytes],
    tensors: Iterable[TensorData],
    alignment: int,
    *,
    threads: int = 0,
    progress: Progress = lambda _: None,
) -> None:
    """Each tensor padded so that the next begins aligned. threads: 0: one for each core."""
    import numpy as np

    tensors = list(tensors)
    total, done = sum(tensor.num_bytes for tensor in tensors), 0
    made = _in_order(chain.from_iterable(tensor.parts for tensor in tensors), threads)
    try:
        for tensor in tensors:
            written = 0
            while written < tensor.num_bytes:
                data = np.ascontiguousarray(next(made))
                file.write(data.data)
                written += data.nbytes
                done += data.nbytes
                progress(done / total)
            assert written == tensor.num_bytes
            file.write(bytes(-written % alignment))
    finally:
        made.close()


def _in_order(parts: Iterable[Part], threads: int) -> Generator[Array, None, None]:
    """What they make. Closed early, it drops those that nobody began and waits for the others."""
    threads = threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads, "edgeinfer-tensors")
    pending: deque[Future[Array]] = deque()
    try:
        for part in parts:
            pending.append(pool.submit(part))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
