"""The step costs of a loaded model: taken from disk, measured where nothing is known, learnt, kept.

Measuring keeps nobody waiting: a few steps at the end of a model's first load, bounded by time, and the
rest while the worker has nothing to do, interrupted when a command comes.

What it took is logged (EDGEINFER_LOG=INFO shows it), and held to by benchmarks/bars/03_step_cost.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from edgeinfer.backend import Runtime
from edgeinfer.engine.step_measure import StepMeasurement
from edgeinfer.engine.tuner import Tuner
from edgeinfer.machine.cost_store import load_costs, save_costs
from edgeinfer.machine.probe import CoreUse, machine_fingerprint, probe_machine
from edgeinfer.machine.step_cost import StepCosts, thread_candidates

log = logging.getLogger("edgeinfer.step_costs")

FIRST_S = 0.25  # at the end of a load that found nothing stored
LEAST_BUDGET_S = 1.9
SHARE_OF_LOAD = 0.1
SAVE_INTERVAL_S = 20.0


class MeasuredCosts:
    """Used by the worker's main thread, but for `command_arrives`. load_s: seconds the load took.
    options: those of the load that change what a step costs and are not in the runtime's identity."""

    def __init__(
        self,
        runtime: Runtime,
        folder: Path,
        load_s: float,
        options: Mapping[str, str] | None = None,
        *,
        tunes_threads: bool = True,
    ) -> None:
        """tunes_threads: False: the runtime keeps its threads, and only they are measured."""
        self._begin = time.perf_counter()
        facts = runtime.facts
        self._runtime = runtime
        self._folder = folder
        self._conditions = {
            **runtime.identity(),
            **(options or {}),
            "machine": machine_fingerprint(),
            "device": facts.device,
        }
        self.costs = load_costs(folder, self._conditions) or StepCosts()
        self._num_stored = len(self.costs)
        candidates: tuple[int, ...] = (facts.threads,)
        if tunes_threads:
            candidates = thread_candidates(probe_machine().physical_cores)
        default = (facts.threads, facts.threads_batch)
        self.tuner = Tuner(
            self.costs, candidates, default, CoreUse().free_cores, is_fixed=not tunes_threads
        )
        self.budget_s = max(LEAST_BUDGET_S, SHARE_OF_LOAD * load_s)
        self.measured_s = 0.0
        self._measurement: StepMeasurement | None = StepMeasurement(
            runtime, self.costs, candidates, self.budget_s, self._must_stop, CoreUse().free_cores
        )
        self._lock = threading.Lock()
        self._is_measuring = False
        self._arrived = self._taken = 0  # commands
        self._arrived_at = 0.0
        self._is_late = False
        self._saved = time.perf_counter()

    def measure_first(self) -> None:
        """The first steps of the measurement, FIRST_S at most; none where costs were stored."""
        measurement = self._measurement
        # A step of unknown length that cannot be ended is none to begin a chat with.
        if measurement is not None and not self._num_stored and self._runtime.facts.can.abort:
            end = time.perf_counter() + FIRST_S
            while (left := end - time.perf_counter()) > 0 and self._run(measurement, left):
                pass
        log.info(
            "%d stored, %.2f ms before the first request",
            self._num_stored,
            1e3 * (time.perf_counter() - self._begin),
        )

    def use_idle(self) -> bool:
        """Measure one piece, or save what is new; False when there is nothing to do for now. Where costs
        were stored what is missing can wait until the first request was answered."""
        measurement = self._measurement
        if measurement is not None:
            if self._num_stored and not self._taken:
                return False
            if self._run(measurement, measurement.left_s):
                return True
            if measurement.is_done:
                self._measurement = None
                self.save()
                log.info(
                    "%d known, measured for %.1f ms of %.1f ms",
                    len(self.costs),
                    1e3 * self.measured_s,
                    1e3 * self.budget_s,
                )
            return False
        if self.costs.num_changes and time.perf_counter() - self._saved > SAVE_INTERVAL_S:
            self.save()
        return False

    def _run(self, measurement: StepMeasurement, limit_s: float) -> bool:
        """One piece, ended when `limit_s` is over or a command comes."""
        with self._lock:
            if self._must_stop():
                return False
            self._is_measuring = True
        begin = time.perf_counter()
        timer = threading.Timer(max(0.0, limit_s), self._time_is_up)
        timer.start()
        try:
            return measurement.run_one(limit_s)
        finally:
            with self._lock:
                self._is_measuring = False
            timer.cancel()
            timer.join()
            self._is_late = False
            now = time.perf_counter()
            self.measured_s += now - begin
            if self._must_stop():
                log.info("%.2f ms until a command had way", 1e3 * (now - self._arrived_at))

    def command_arrives(self) -> None:
        """End the piece being measured, and begin no other until the command was taken. From any thread,
        before the command is queued."""
        with self._lock:
            self._arrived += 1
            self._arrived_at = time.perf_counter()
            self._interrupt()

    def command_taken(self) -> None:
        self._taken = min(self._arrived, self._taken + 1)  # one may have come before this was here

    def _time_is_up(self) -> None:
        with self._lock:
            self._is_late = True
            self._interrupt()

    def _interrupt(self) -> None:
        if self._is_measuring and self._runtime.facts.can.abort:
            self._runtime.abort()

    def _must_stop(self) -> bool:
        return self._is_late or self._arrived > self._taken

    def save(self) -> None:
        """Write what was learnt since the last time."""
        if self.costs.num_changes:
            self.costs.num_changes = 0
            save_costs(self._folder, self._conditions, self.costs)
        self._saved = time.perf_counter()
