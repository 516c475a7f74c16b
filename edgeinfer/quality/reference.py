"""A reference's predictions in a file, so that two models never have to be in memory at once.

Of each prediction there is: the TOP likeliest tokens with their log-probabilities; the probability that
all others, the tail, have together; DRAWN tokens of the tail, drawn in proportion to their probability;
and the log-probability of the token that came. Some 2.5 kB a token whatever the vocabulary: 50 MB for
20,000.

The divergence from such a prediction is that over the likeliest tokens and the tail as one event, which
is a lower bound (data-processing inequality), plus the divergence within the tail, estimated from the
tokens drawn without bias and never negative: the mean of r - 1 - log r, where r is the model's
probability over the reference's, both within the tail. Source: J. Schulman, "Approximating KL
Divergence" (2020).

On SmolLM2 in Q4_0 against F16, with 49,152 tokens, the lower bound with 256 of them misses 7 % of the
mean KL, with 2,048 still 1.2 %; with 64 drawn the mean, the median and the 99th percentile come out
within 1 %, and so they do where the divergence is a hundred-thousandth (F16 in other steps).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeinfer.backend import Runtime
from edgeinfer.errors import MeasureFailed
from edgeinfer.quality.agreement import Agreement
from edgeinfer.quality.predictions import Progress, chunk_of, nothing
from edgeinfer.quality.windows import Windows, predictions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer.quality.predictions import Floats, Logits

    Ids = npt.NDArray[np.uint32]
    Singles = npt.NDArray[np.float32]

TOP = 256
DRAWN = 64
_MAGIC = b"edgeinfer predictions 1\n"
_SIZE = struct.Struct("<I")
_MAX_HEADER_BYTES = 65_536
_LEAST = 1e-45  # of a float32 above 0: what a probability that vanished counts as


@dataclass(frozen=True)
class Page:
    """A window's predictions. ids, log_probs: (n, top + drawn), the likeliest first. tail: the log of
    what is not among the first `top` (-inf: nothing). following: of the tokens that came; (n,)."""

    ids: Ids
    log_probs: Singles
    tail: Singles
    following: Singles


class Reference:
    """A file of predictions that was checked whole. `windows_digest`, `vocab_size` and `source` say what
    of."""

    def __init__(self, file: IO[bytes], begin: int, header: dict[str, Any]) -> None:
        self._file = file
        self._begin = begin
        self.source: str = header["source"]
        self.windows_digest: str = header["windows"]
        self.vocab_size: int = header["vocab_size"]
        self.counts: list[int] = header["counts"]
        self.top: int = header["top"]
        self.drawn: int = header["drawn"]

    @classmethod
    def read(cls, file: IO[bytes], name: str = "the reference's predictions") -> Reference:
        """Raises MeasureFailed for one that is damaged, or none at all."""
        damaged = MeasureFailed(f"{name}: damaged, or cut off; measure the reference again")
        try:
            file.seek(0)
            if file.read(len(_MAGIC)) != _MAGIC:
                raise damaged
            header = json.loads(_checked(file, _MAX_HEADER_BYTES))
            found = cls(file, file.tell(), _checked_header(header))
            for _ in found.pages():
                pass
            if file.read(1):
                raise damaged
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            raise damaged from None
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def pages(self) -> Iterator[Page]:
        """In the order of the windows. Raises ValueError, OSError if the file was damaged since."""
        import numpy as np

        self._file.seek(self._begin)
        width = self.top + self.drawn
        for count in self.counts:
            size = count * (8 * width + 8)
            data = _checked(self._file, size)
            if len(data) != size:
                raise ValueError("a page of another size")
            ids, log_probs, tail, following = np.split(
                np.frombuffer(data, np.uint32), np.cumsum([count * width, count * width, count])
            )
            if ids.size and ids.max() >= self.vocab_size:
                raise ValueError("a token outside the vocabulary")
            yield Page(
                ids.reshape(count, width),
                log_probs.view(np.float32).reshape(count, width),
                tail.view(np.float32),
                following.view(np.float32),
            )


def write_reference(
    file: IO[bytes], runtime: Runtime, windows: Windows, source: str = "", progress: Progress = nothing
) -> Reference:
    """Read all windows with a model and store what it predicts. file: empty, for reading and writing.
    source: what it is of, for `kept_reference`. Raises OSError, BackendError."""
    import numpy as np

    vocab_size = runtime.facts.vocab_size
    top = min(TOP, vocab_size)
    drawn = DRAWN if top < vocab_size else 0
    counts = windows.counts
    header = {
        "source": source,
        "windows": windows.digest,
        "vocab_size": vocab_size,
        "counts": counts,
        "top": top,
        "drawn": drawn,
    }
    file.write(_MAGIC)
    _write(file, json.dumps(header).encode())
    begin = file.tell()
    chunk = chunk_of(runtime)
    done = 0
    for number, window in enumerate(windows):
        random = np.random.default_rng(number)  # the same file again, if it is made again
        noted = [
            _noted(logits, following, top, drawn, random)
            for logits, following in predictions(runtime, window, windows.first, chunk)
        ]
        page = [np.concatenate(part) for part in zip(*noted, strict=True)]
        _write(file, b"".join(part.tobytes() for part in page))
        done += counts[number]
        progress(done / sum(counts))
    file.flush()
    return Reference(file, begin, header)


def kept_reference(path: Path, windows: Windows, vocab_size: int, source: str) -> Reference | None:
    """What a file holds, if it is whole and of these; None: it has to be made (again). The file stays
    open as long as what is returned."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    try:
        found = Reference.read(file, path.name)
    except MeasureFailed:
        file.close()
        return None
    wanted = (windows.digest, vocab_size, source, min(TOP, vocab_size))
    if (found.windows_digest, found.vocab_size, found.source, found.top) != wanted:
        file.close()
        return None
    return found


def agreement_with(
    reference: Reference,
    runtime: Runtime,
    windows: Windows,
    progress: Progress = nothing,
    chunk: int | None = None,
) -> Agreement:
    """Read the same windows with another model, or with the same in other steps (`chunk` tokens each).
    windows: those of the reference, or their beginning. Raises MeasureFailed if they are not of one
    vocabulary, or the file was damaged meanwhile."""
    import numpy as np

    if runtime.facts.vocab_size != reference.vocab_size:
        raise MeasureFailed(
            f"the two models have different vocabularies, of {runtime.facts.vocab_size:,} and"
            f" {reference.vocab_size:,} tokens: their predictions cannot be compared"
        )
    counts = windows.counts
    assert counts == reference.counts[: len(counts)]  # noqa: S101 (the caller's windows)
    step = min(chunk or chunk_of(runtime), chunk_of(runtime))
    kl: list[Floats] = []
    nll: list[Floats] = []
    reference_nll: list[Floats] = []
    same = 0
    done = 0
    pages = reference.pages()
    for window in windows:
        page = _next(pages)
        at = 0
        for logits, following in predictions(runtime, window, windows.first, step):
            rows = slice(at, at + len(following))
            at += len(following)
            found = _Found(logits)
            kl.append(_kl(found, page, rows, reference.top))
            same += int((logits.argmax(axis=-1) == page.ids[rows, 0]).sum())
            nll.append(-found.log_probs(np.asarray(following)[:, None])[:, 0].astype(np.float64))
        reference_nll.append(-page.following.astype(np.float64))
        done += at
        progress(done / sum(counts))
    return Agreement(np.concatenate(kl), same / done, np.concatenate(nll), np.concatenate(reference_nll))


class _Found:
    """Rows of logits as probabilities. Both sides go through this: of equal logits come equal figures,
    and a divergence that is exactly 0."""

    def __init__(self, logits: Logits) -> None:
        import numpy as np

        self._logits = logits
        most = logits.max(axis=-1, keepdims=True)
        self.weights = np.exp(logits - most)  # (n, vocabulary) float32
        self.sums = self.weights.sum(axis=-1, dtype=np.float64)
        self._log_sums = most[:, 0].astype(np.float64) + np.log(self.sums)

    def log_probs(self, ids: npt.NDArray[Any]) -> Singles:
        """ids: (n, any)."""
        import numpy as np

        taken = np.take_along_axis(self._logits, ids, -1).astype(np.float64)
        found: Singles = (taken - self._log_sums[:, None]).astype(np.float32)
        return found

    def without(self, ids: npt.NDArray[Any]) -> Singles:
        """The log of what all other tokens have together. Their weights stay in `weights` alone."""
        import numpy as np

        np.put_along_axis(self.weights, ids, 0, -1)
        rest = self.weights.sum(axis=-1, dtype=np.float64)
        with np.errstate(divide="ignore"):
            found: Singles = np.log(rest / self.sums).astype(np.float32)
        return found


def _noted(
    logits: Logits, following: list[int], top: int, drawn: int, random: np.random.Generator
) -> tuple[Ids, Singles, Singles, Singles]:
    """A page's four parts, of a few rows."""
    import numpy as np

    found = _Found(logits)
    ids = np.empty((len(logits), top + drawn), np.int64)
    for place, row in enumerate(logits):
        likeliest = np.sort(np.argpartition(row, len(row) - top)[-top:])
        # Stable: of two equals the one with the lower id comes first, as argmax has it.
        ids[place, :top] = likeliest[np.argsort(-row[likeliest], kind="stable")]
    tail = found.without(ids[:, :top])
    for place, weights in enumerate(found.weights if drawn else ()):
        sums = np.cumsum(weights, dtype=np.float64)
        # Systematic: one in each of `drawn` equal shares of the tail, so that they spread.
        places = (random.random() + np.arange(drawn)) / drawn * sums[-1]
        ids[place, top:] = np.minimum(np.searchsorted(sums, places, side="right"), len(sums) - 1)
    came = found.log_probs(np.asarray(following)[:, None])[:, 0]
    return ids.astype(np.uint32), found.log_probs(ids), tail, came


def _kl(found: _Found, page: Page, rows: slice, top: int) -> Floats:
    import numpy as np

    ids = page.ids[rows].astype(np.int64)
    p = page.log_probs[rows].astype(np.float64)
    q = found.log_probs(ids).astype(np.float64)
    kl: Floats = (np.exp(p[:, :top]) * (p[:, :top] - q[:, :top])).sum(axis=-1)
    log_tail = page.tail[rows].astype(np.float64)
    tail = np.exp(log_tail)
    other = np.maximum(found.without(ids[:, :top]).astype(np.float64), np.log(_LEAST))
    is_there = tail > 0
    kl[is_there] += tail[is_there] * (log_tail - other)[is_there]
    if ids.shape[1] > top and is_there.any():
        ratio = (q[:, top:] - other[:, None] - p[:, top:] + log_tail[:, None])[is_there]
        # (a token that was drawn has some probability, and a model may give it thousands of times that)
        within = np.exp(np.minimum(ratio, 50.0)) - 1 - ratio
        kl[is_there] += tail[is_there] * within.mean(axis=-1)
    return np.maximum(kl, 0.0)


def _next(pages: Iterator[Page]) -> Page:
    try:
        return next(pages)
    except (OSError, ValueError, StopIteration):
        raise MeasureFailed("the reference's predictions were damaged meanwhile") from None


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(_SIZE.pack(len(data)) + _SIZE.pack(zlib.crc32(data)))
    file.write(data)


def _checked(file: IO[bytes], most: int) -> bytes:
    """The next block. Raises ValueError, OSError, struct.error."""
    (size,), (checksum,) = _SIZE.unpack(file.read(4)), _SIZE.unpack(file.read(4))
    if size > most:
        raise ValueError("a block that is too long")
    data = file.read(size)
    if len(data) != size or zlib.crc32(data) != checksum:
        raise ValueError("a damaged block")
    return data


def _checked_header(header: Any) -> dict[str, Any]:
    """Raises ValueError for numbers that would not describe pages."""
    numbers = [header["vocab_size"], header["top"], header["drawn"], *header["counts"]]
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise ValueError("no numbers")
    if not 0 < header["top"] <= header["vocab_size"] or header["drawn"] > 4096 or header["top"] > 2**16:
        raise ValueError("impossible numbers")
    if not all(type(header[key]) is str for key in ("source", "windows")):
        raise ValueError("no text")
    return dict(header)
