"""From options to a client: shared by `run`, `chat` and `bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeinfer.cli.options import parse_count, parse_size
from edgeinfer.errors import UsageError

if TYPE_CHECKING:
    from edgeinfer.open import OpenOptions

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


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
    cache_ram: str,
) -> OpenOptions:
    """Raises UsageError naming the option that cannot be right."""
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
        cache_bytes=parse_size("--cache-ram", cache_ram),
    )


def puller(show: Callable[[str, float], None]) -> Callable[[str], None]:
    """A `pull_missing` that fetches a catalogue model and tells how far it is."""

    def pull_missing(name: str) -> None:
        from edgeinfer_models.pull import PullProgress, pull

        def report(progress: PullProgress) -> None:
            what = "fetching" if progress.phase == "download" else "checking"
            share = progress.done / progress.total if progress.total else 0.0
            show(f"{what} {name} (only once)", share)

        pull(name, report)

    return pull_missing
