"""The step costs of a loaded model: taken from disk, measured where nothing is known, learnt, kept.

Measuring never keeps anybody waiting: a few steps at the end of a load, bounded by time, and the rest
while the worker has nothing to do, interrupted when a command comes.
"""

from __future__ import annotations

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

FIRST_S = 0.25  # at the end of a load
LEAST_BUDGET_S = 2.0
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
    ) -> None:
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
        candidates = thread_candidates(probe_machine().physical_cores)
        default = (facts.threads, facts.threads_batch)
        self.tuner = Tuner(self.costs, candidates, default, CoreUse().free_cores)
        budget = max(LEAST_BUDGET_S, SHARE_OF_LOAD * load_s)
        self._measurement: StepMeasurement | None = StepMeasurement(
            runtime, self.costs, candidates, budget, self._must_stop, CoreUse().free_cores
        )
        self._lock = threading.Lock()
        self._is_measuring = False
        self._arrived = self._taken = 0  # commands
        self._is_late = False
        self._saved = time.perf_counter()

    def measure_first(self) -> None:
        """The first steps of the measurement, FIRST_S at most."""
        measurement = self._measurement
        if measurement is None or not self._runtime.facts.can.abort:
            return  # a step of unknown length that cannot be ended is none to begin a chat with
        end = time.perf_counter() + FIRST_S
        timer = threading.Timer(FIRST_S, self._time_is_up)
        timer.start()
        try:
            while (left := end - time.perf_counter()) > 0 and self._run(measurement, left):
                pass
        finally:
            timer.cancel()
            timer.join()
            self._is_late = False

    def use_idle(self) -> bool:
        """Measure one piece, or save what is new; False when there is nothing to do for now."""
        measurement = self._measurement
        if measurement is not None:
            if self._run(measurement):
                return True
            if measurement.is_done:
                self._measurement = None
                self.save()
            return False
        if self.costs.num_changes and time.perf_counter() - self._saved > SAVE_INTERVAL_S:
            self.save()
        return False

    def _run(self, measurement: StepMeasurement, limit_s: float = float("inf")) -> bool:
        with self._lock:
            if self._must_stop():
                return False
            self._is_measuring = True
        try:
            return measurement.run_one(limit_s)
        finally:
            with self._lock:
                self._is_measuring = False

    def command_arrives(self) -> None:
        """End the piece being measured, and begin no other until the command was taken. From any thread,
        before the command is queued."""
        with self._lock:
            self._arrived += 1
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
