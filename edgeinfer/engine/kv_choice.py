"""The type of the KV cache that `auto` takes: what it may cost is bounded, what it is worth is measured.

A smaller type is taken where it makes answers faster on this machine, and where the memory there is
would not do otherwise; never one that loses more than the bounds below. How fast it is was measured for
this model's shape before the first load, and is kept, so that the choice stays: two types alternate in
one run then, which the step costs of two loads on two days would not say as well.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from pathlib import Path

from edgeinfer.backend import Backend, KvSpeed, RuntimeSettings
from edgeinfer.machine.cost_store import load_measured, save_measured
from edgeinfer.machine.probe import machine_fingerprint
from edgeinfer_models.config import ModelConfig

log = logging.getLogger("edgeinfer.kv_type")

FULL = "f16"
# Mean KL from f16 in nats a token: 2,000 tokens of text on the F16 weights of SmolLM2 135M, which round
# nothing themselves (benchmarks/bars/05_kv_types.py). Other models differ: `edgeinfer eval` tells.
MEAN_KL = {
    "q8_0": 0.0002,
    "q5_1": 0.011,
    "q5_0": 0.013,
    "iq4_nl": 0.045,
    "q4_1": 0.049,
    "q4_0": 0.057,
}
MOST_KL = 0.002
GOOD_TYPES = tuple(kind for kind, loss in MEAN_KL.items() if loss <= MOST_KL)
LEAST = KvSpeed(decode=0.9, prefill=0.8)
# An estimate may say so much more than the model then does. In two runs of 05_kv_auto.py (12 models) the
# most was, near the bounds, 1.15 times for decoding (estimates below 1.3) and 1.02 times for reading
# prompts (below 0.96).
MARGIN = KvSpeed(decode=1.2, prefill=1.05)
FASTER = 1.1  # decoding that is so much faster is worth what the type costs
# An estimate within these factors of where the choice changes is made so many times, for a neighbour's
# work may have been in one. (Of decoding one was 1.09 where the next said 0.96 and 0.97.)
NEAR = KvSpeed(decode=1.15, prefill=1.05)
TIMES = 3


def preferred_kv_types(
    backend: Backend, config: ModelConfig | None, settings: RuntimeSettings, folder: Path | None
) -> tuple[str, ...]:
    """In this order, as far as memory allows; FULL is always among them. The later ones are smaller, or
    only there to be had where another was better.

    folder: of what was measured; None: measured each time.
    """
    if config is None:
        return (FULL,)
    return in_order(
        {kind: _speed(backend, config, settings, kind, folder, may_measure=True) for kind in GOOD_TYPES}
    )


def known_kv_speeds(
    backend: Backend, config: ModelConfig, settings: RuntimeSettings, folder: Path
) -> dict[str, KvSpeed]:
    """What was measured before; of the types that may be chosen beside FULL."""
    speeds = {kind: _speed(backend, config, settings, kind, folder) for kind in GOOD_TYPES}
    return {kind: speed for kind, speed in speeds.items() if speed is not None}


def in_order(speeds: Mapping[str, KvSpeed | None]) -> tuple[str, ...]:
    """As `preferred_kv_types`."""
    order = [FULL]
    for kind, speed in speeds.items():
        if speed is None or speed.decode < _LEAST.decode or speed.prefill < _LEAST.prefill:
            continue
        if speed.decode >= FASTER:
            order.insert(0, kind)
        else:
            order.append(kind)
    return tuple(order)


# What an estimate must say at the least.
_LEAST = KvSpeed(MARGIN.decode * LEAST.decode, MARGIN.prefill * LEAST.prefill)


def estimate(
    backend: Backend, config: ModelConfig, settings: RuntimeSettings, kv_type: str
) -> KvSpeed | None:
    """As `Backend.measure_kv_speed`, which says what None means; the median of some where it matters."""
    speed = backend.measure_kv_speed(config, settings, kv_type)
    if speed is None or not _is_near_a_bound(speed):
        return speed
    more = (backend.measure_kv_speed(config, settings, kv_type) for _ in range(TIMES - 1))
    speeds = [speed, *(each for each in more if each is not None)]
    return KvSpeed(
        statistics.median(each.decode for each in speeds),
        statistics.median(each.prefill for each in speeds),
    )


def _is_near_a_bound(speed: KvSpeed) -> bool:
    cases = (
        (speed.decode / _LEAST.decode, NEAR.decode),
        (speed.decode / FASTER, NEAR.decode),
        (speed.prefill / _LEAST.prefill, NEAR.prefill),
    )
    return any(1 / near < factor < near for factor, near in cases)


def _speed(
    backend: Backend,
    config: ModelConfig,
    settings: RuntimeSettings,
    kv_type: str,
    folder: Path | None,
    *,
    may_measure: bool = False,
) -> KvSpeed | None:
    conditions = _conditions(backend, config, settings, kv_type)
    speed = _read(load_measured(folder, conditions)) if folder is not None else None
    if speed is None and may_measure:
        speed = estimate(backend, config, settings, kv_type)
        log.info("%s against f16, measured: %s", kv_type, speed)
        if speed is not None and folder is not None:
            save_measured(folder, conditions, [speed.decode, speed.prefill])
    return speed


def _conditions(
    backend: Backend, config: ModelConfig, settings: RuntimeSettings, kv_type: str
) -> dict[str, str]:
    shape = (
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        max(config.num_kv_heads, default=0),
        config.head_dim_k,
        config.head_dim_v,
        config.num_experts_used,
        config.weights_bytes,
        config.quantization,
    )
    return {
        **backend.switches(),
        "measured": "kv speed",
        "kv_type": kv_type,
        "backend": backend.name,
        "build": backend.probe().build,
        "machine": machine_fingerprint(),
        "shape": "/".join(map(str, shape)),
        "threads": f"{settings.threads}/{settings.threads_batch}",
        "gpu_layers": str(settings.gpu_layers),
        "flash_attention": str(settings.flash_attention),
    }


def _read(data: object) -> KvSpeed | None:
    if not (isinstance(data, list) and len(data) == 2):
        return None
    if not all(isinstance(value, float) and 0.0 < value < 1000.0 for value in data):
        return None
    return KvSpeed(*data)
