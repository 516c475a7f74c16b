"""A model's memory in the process that loads it: made to fit before, compared with the truth after."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.backend import Backend, Device, MemoryItem, Progress, Runtime, RuntimeSettings
from edgeinfer.engine.kv_choice import preferred_kv_types
from edgeinfer.machine.ledger import (
    Automatic,
    Fit,
    MemoryLedger,
    MemoryUse,
    Room,
    fit_model,
    shown_bytes,
)
from edgeinfer.machine.pressure import read_pressure
from edgeinfer.machine.probe import probe_machine
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    from edgeinfer_models.config import ModelConfig

log = logging.getLogger("edgeinfer.memory")

FAR_OFF = 0.10  # a prediction that is worth a line in the log


@dataclass(frozen=True)
class MemoryReport:
    """resident_bytes: of this process, after the load."""

    uses: tuple[MemoryUse, ...]
    predicted_bytes: int
    resident_bytes: int


def load_fitted(
    backend: Backend,
    files: ModelFiles,
    config: ModelConfig | None,
    settings: RuntimeSettings,
    cache_bytes: int,
    automatic: Automatic,
    progress: Progress,
    folder: Path | None = None,
) -> tuple[Fit, Runtime]:
    """Load a model as it fits; arguments and errors as those of `fit_here` and `Backend.load`."""
    fit = fit_here(backend, files, config, settings, cache_bytes, automatic, folder)
    runtime = backend.load(files, fit.settings, progress)
    if automatic.kv_type and runtime.facts.reads_slowly:
        # Of this model's graph it is only seen now; it is not what the type was chosen for.
        runtime.close()
        asked = replace(automatic, kv_type=False)
        fit = fit_here(backend, files, config, settings, cache_bytes, asked, folder)
        runtime = backend.load(files, fit.settings, progress)
    return fit, runtime


def fit_here(
    backend: Backend,
    files: ModelFiles,
    config: ModelConfig | None,
    settings: RuntimeSettings,
    cache_bytes: int,
    automatic: Automatic,
    folder: Path | None = None,
) -> Fit:
    """folder: of what was measured of this machine. Raises ModelTooLarge."""
    found = backend.probe()  # one that is not usable says so when it is to load
    devices = found.devices if settings.gpu_layers != 0 else ()

    def predict(tried: RuntimeSettings) -> list[MemoryItem]:
        return backend.predict_memory(files, config, tried, devices)

    layers = config.num_layers if config is not None else 0
    kinds = preferred_kv_types(backend, config, settings, folder) if automatic.kv_type else ()
    room = room_here(devices)
    return fit_model(files.name, predict, settings, cache_bytes, room, automatic, layers, kinds)


def room_here(devices: tuple[Device, ...]) -> Room:
    machine = probe_machine()
    pressure = read_pressure()
    free_on_gpus = [device.free_bytes for device in devices if device.kind == "gpu"]
    # Apple's GPU has the machine's memory; one that does not tell what is free cannot be planned for.
    has_own = bool(free_on_gpus) and all(free_on_gpus) and sys.platform != "darwin"
    return Room(
        free_bytes=machine.available_bytes + resident_bytes(),
        total_bytes=machine.total_bytes,
        gpu_bytes=sum(free_on_gpus) if has_own else None,
        pressure=str(pressure) if pressure.is_high else "",
    )


def report_memory(
    name: str, ledger: MemoryLedger, runtime: Runtime, drafting: Sequence[MemoryItem] = ()
) -> MemoryReport:
    """Compare, and log it: a line at INFO, a warning where the prediction was far off. drafting: what
    was allocated for drafts, of which nothing was predicted."""
    resident = resident_bytes()
    ledger = MemoryLedger((*ledger.items, *drafting))
    uses = ledger.compared((*runtime.memory(), *drafting))
    predicted = ledger.total("cpu")
    for use in uses:
        log.info("%s", use)
    off = ledger.deviation(resident, is_warm=False)
    log.log(
        logging.WARNING if abs(off) > FAR_OFF else logging.INFO,
        "%s: %s predicted, %s resident (%+.1f %%)",
        name,
        shown_bytes(predicted),
        shown_bytes(resident),
        100 * off,
    )
    return MemoryReport(uses, predicted, resident)


def resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
