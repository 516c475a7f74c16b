"""What `edgeinfer bench` says: one JSON object, or lines for people."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeinfer import __version__
from edgeinfer.client import ModelInfo
from edgeinfer.machine.probe import probe_machine
from edgeinfer.measure.bench import BenchPlan
from edgeinfer.measure.figures import Figure


@dataclass(frozen=True)
class Report:
    """partial: it was stopped before every figure had all its samples. busy: the share of the processor
    that other programs used just before, 0 to 1."""

    info: ModelInfo
    plan: BenchPlan
    figures: Sequence[Figure]
    busy: float
    partial: bool = False

    def as_json(self) -> dict[str, Any]:
        """Keys are not renamed or taken away; there may be more in later versions.

        suite, model, backend, device, version; partial; cached_tokens (always 0: a run whose prompt was
        partly known is an error); machine {system, processor, physical_cores, logical_cores,
        total_bytes, busy, time}; settings {ctx, threads {decode, prefill}, kv_type_k, kv_type_v,
        prompt_tokens[], new_tokens[], streams[], repeat, warmup}; figures[] {metric, unit,
        prompt_tokens, new_tokens, streams, median, low_quartile, high_quartile, samples[]}; warnings[].
        metric: prefill, decode, total (tok/s), ttft, worst_ttft (s).
        """
        info, plan, machine = self.info, self.plan, probe_machine()
        return {
            "suite": plan.suite,
            "model": info.name,
            "backend": info.backend,
            "device": info.device,
            "version": __version__,
            "partial": self.partial,
            "cached_tokens": 0,
            "machine": {
                "system": machine.system,
                "processor": machine.processor,
                "physical_cores": machine.physical_cores,
                "logical_cores": machine.logical_cores,
                "total_bytes": machine.total_bytes,
                "busy": self.busy,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
            "settings": {
                "ctx": info.context,
                "threads": {"decode": info.threads, "prefill": info.threads_batch},
                "kv_type_k": info.kv_type_k,
                "kv_type_v": info.kv_type_v,
                "prompt_tokens": list(plan.prompt_tokens),
                "new_tokens": list(plan.new_tokens),
                "streams": list(plan.streams),
                "repeat": plan.repeat,
                "warmup": plan.warmup,
            },
            "figures": [figure.as_json() for figure in self.figures],
            "warnings": list(info.warnings),
        }

    @property
    def title(self) -> str:
        """What was measured, on what, with which settings: one line."""
        info = self.info
        kv = info.kv_type_k
        if info.kv_type_v != kv:
            kv = f"{info.kv_type_k}/{info.kv_type_v}"
        return (
            f"{info.name} on {info.backend}/{info.device}, {threads_line(info)}, {kv} KV cache,"
            " no prompt cache"
        )


def threads_line(info: ModelInfo) -> str:
    if info.threads == info.threads_batch:
        return f"{info.threads} thread" + ("s" if info.threads != 1 else "")
    return f"threads: {info.threads} to answer, {info.threads_batch} to read prompts"


def busy_warning(busy: float) -> str | None:
    """One line if other programs take so much that figures would say more about them."""
    cores = os.cpu_count() or 1
    if busy * cores < 0.2:  # a fifth of one core
        return None
    return f"other programs use {busy * cores:.1f} of {cores} cores; figures will scatter"
