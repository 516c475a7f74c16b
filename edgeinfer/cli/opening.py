"""From options to a client: shared by `run`, `chat` and `bench`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from edgeinfer.backend import LOAD_AS
from edgeinfer.cli.options import parse_count, parse_size
from edgeinfer.errors import UsageError
from edgeinfer_models.ggml_types import KV_TYPES as _KV_TYPES

if TYPE_CHECKING:
    import typer

    from edgeinfer.client.http import HttpClient
    from edgeinfer.engine.request import Overflow
    from edgeinfer.engine.window import Eviction
    from edgeinfer.open import OpenOptions

NameT = TypeVar("NameT", bound=str)
OVERFLOWS: tuple[Overflow, ...] = ("stream", "stop", "error")
EVICTIONS: tuple[Eviction, ...] = ("streaming", "h2o")
KV_TYPES = ("auto", *_KV_TYPES, "int8", "fp8")  # the last two: torch's


def open_options(
    model: str | None,
    *,
    backend: str,
    ctx: int | None,
    threads: str,
    gpu_layers: str,
    kv_type: str,
    kv_type_k: str | None,
    kv_type_v: str | None,
    window: int | None = None,
    sinks: int = 4,
    eviction: str = "streaming",
    speculate: str = "auto",
    draft: str | None = None,
    load_as: str = "auto",
    compile: bool = False,
    cache_ram: str,
    cache_disk: str = "0",
    cache_dir: str | None = None,
    no_cache: bool = False,
) -> OpenOptions:
    """Raises UsageError naming the option that cannot be right."""
    from edgeinfer.engine.speculation import SPECULATE
    from edgeinfer.open import OpenOptions

    for option, name in (
        ("--kv-type", kv_type),
        ("--kv-type-k", kv_type_k),
        ("--kv-type-v", kv_type_v),
    ):
        if name is not None and name not in KV_TYPES:
            raise UsageError(
                f"{option} {name[:40]!r} is not a KV cache type; one of {', '.join(KV_TYPES)}"
            )
    wanted = parse_count("--threads", threads)
    if wanted == 0:
        raise UsageError("--threads 0 is outside [1, 1024]")
    return OpenOptions(
        model=model,
        remember=True,
        backend=backend,
        context=ctx,
        threads=wanted,
        gpu_layers=parse_count("--gpu-layers", gpu_layers),
        kv_type_k=kv_type_k or kv_type,
        kv_type_v=kv_type_v or kv_type,
        window=window,
        sinks=sinks,
        eviction=_one_of("--eviction", eviction, EVICTIONS),
        speculate=_one_of("--speculate", speculate, SPECULATE),
        draft=draft,
        load_as=_one_of("--load-as", load_as, LOAD_AS),
        compiled=compile,
        cache_bytes=0 if no_cache else parse_size("--cache-ram", cache_ram),
        cache_disk_bytes=0 if no_cache else parse_size("--cache-disk", cache_disk),
        cache_dir=cache_dir,
    )


# What only the one who loads a model can choose.
_LOADING = (
    *("backend", "ctx", "threads", "gpu_layers", "kv_type", "kv_type_k", "kv_type_v", "cache_ram"),
    *("window", "sinks", "eviction", "speculate", "draft", "load_as", "compile", "overflow"),
    *("cache_disk", "cache_dir", "no_cache"),
)


def checked_overflow(name: str) -> Overflow:
    """Raises UsageError."""
    return _one_of("--overflow", name, OVERFLOWS)


def _one_of(option: str, name: str, known: Sequence[NameT]) -> NameT:
    for each in known:
        if name == each:
            return each
    raise UsageError(f"{option} {name[:40]!r} is not one of {', '.join(known)}")


def attached(context: typer.Context, url: str, api_key: str | None) -> HttpClient:
    """A client of an endpoint that runs already, and of the model there that the command line names: one
    that a variable or the config file has for models here says nothing about it. Raises UsageError for
    options that cannot reach it."""
    from edgeinfer.cli.configured import FileDefaults
    from edgeinfer.client.http import HttpClient

    for name in _LOADING:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is the endpoint's to choose; give it to `edgeinfer serve` there")
    chosen = FileDefaults.of(context).chosen_model()
    return HttpClient(url, api_key, str(chosen.value) if chosen and not chosen.where else None)


def puller(
    show: Callable[[str, float], None], say: Callable[[str], None] | None = None
) -> Callable[[str], None]:
    """A `pull_missing` that fetches a model of the catalogue or the hub.

    show: how far it is, with what is left to wait; say: a line that should stay to be read.
    """

    def pull_missing(name: str) -> None:
        from edgeinfer_models.pull import pull
        from edgeinfer_models.pull_progress import PullProgress

        pace = Pace()

        def report(progress: PullProgress) -> None:
            share = progress.done / progress.total if progress.total else 0.0
            if progress.phase == "download":
                what = f"fetching {name} (only once), {pace.told(progress.done, progress.total)}"
            elif progress.phase == "verify":
                what = f"checking {name} (only once)"
            else:
                what = f"waiting for another edgeinfer that is fetching {name}"
            show(what, share)

        pull(name, report, note=say)

    return pull_missing


class Pace:
    """Bytes, speed and time left of a download, of the last seconds rather than of its whole."""

    _SPAN_S = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def told(self, done: int, total: int) -> str:
        now = self._clock()
        if self._seen and done < self._seen[-1][1]:  # it had to begin again
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > self._SPAN_S:
            self._seen.popleft()
        text = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
        began, first = self._seen[0]
        # Less than a second says little, and the first figure must not count what was there before.
        if now - began < 1 or done == first:
            return text
        speed = (done - first) / (now - began)
        return f"{text}, {speed / 1e6:,.1f} MB/s, {_duration((total - done) / speed)} left"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
