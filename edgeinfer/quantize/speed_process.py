"""The process that measures files of several types in turns
(`python -m edgeinfer.quantize.speed_process`).

A turn is what an answer is made of: a prompt is read into an empty sequence, then a few tokens are
decoded behind it. Each round goes through all files, every other one backwards, so that drift falls on
all alike.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgeinfer.backend import Backend, Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.machine.probe import CoreUse, probe_machine
from edgeinfer.machine.step_cost import thread_candidates
from edgeinfer.quantize.measuring_process import Teller, run_job
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model

# Tokens of a prompt, in one step: the most that the first file reads in `_PROMPT_S`. What larger steps
# take more, they take for every token.
PROMPTS = (256, 128, 64)
_PROMPT_S = 0.5
STEPS = 8  # decoded in a turn, and one before them that is not counted
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
ENOUGH_S = 20.0  # no round but the least is begun after this time
MOST_S = 60.0  # nor these but the first: the machine is busy, and nothing of it will be kept
STEADY = 0.02  # nor where the quartiles of all that counts lie so near their median
# Thread counts that took so much longer than the best in a first look are not looked at again.
_HOPELESS = 1.3
LOOKS = 2


class SpeedProcess:
    def __init__(self, job: Mapping[str, Any], teller: Teller) -> None:
        self._backend: Backend = get_backend(job["backend"])
        self._paths: Mapping[str, str] = job["paths"]
        self._keeps_loaded: bool = job["keeps_loaded"]
        self._teller = teller
        self._loaded: dict[str, Runtime] = {}
        self._prompt = PROMPTS[0]
        # (decode, prefill) seconds a token, by file, threads and round.
        self._decode: dict[str, dict[int, list[float]]] = {key: {} for key in self._paths}
        self._prefill: dict[str, dict[int, list[float]]] = {key: {} for key in self._paths}

    def run(self) -> None:
        keys = list(self._paths)
        try:
            decode, prefill = self._look(keys[0])
            begin, use = time.perf_counter(), CoreUse()
            for number in range(MOST_ROUNDS):
                spent = time.perf_counter() - begin
                if number and spent > MOST_S:
                    break
                if number >= LEAST_ROUNDS and (spent > ENOUGH_S or self._is_steady()):
                    break
                for index, key in enumerate(keys if number % 2 == 0 else reversed(keys)):
                    rounds = (number + index / len(keys)) / LEAST_ROUNDS
                    done = min(rounds, max(spent / ENOUGH_S, rounds * LEAST_ROUNDS / MOST_ROUNDS))
                    self._teller.progress("measuring the types' speed", min(0.99, done))
                    with self._runtime(key) as runtime:
                        self._turn(runtime, key, decode, prefill)
        finally:
            for runtime in self._loaded.values():
                runtime.close()
        self._teller.row({"free_cores": use.free_cores()})
        for key in keys:
            self._teller.row({"key": key, "decode": self._decode[key], "prefill": self._prefill[key]})

    def _is_steady(self) -> bool:
        for costs in (*self._decode.values(), *self._prefill.values()):
            times = min(costs.values(), key=statistics.median)
            low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
            if high - low > STEADY * middle:
                return False
        return True

    def _look(self, key: str) -> tuple[list[int], list[int]]:
        """The numbers of threads worth measuring, for decode and for prefill: those that the runtime's
        own tuner would choose among in the end. Sets the length of prompts."""
        found = thread_candidates(probe_machine().physical_cores)
        with self._runtime(key) as runtime:
            turns = {
                threads: [_turn(runtime, threads, threads, PROMPTS[-1]) for _ in range(LOOKS)]
                for threads in found
            }
        decode = {threads: min(turn[0] for turn in each) for threads, each in turns.items()}
        prefill = {threads: min(turn[1] for turn in each) for threads, each in turns.items()}
        fast = (size for size in PROMPTS if size * min(prefill.values()) <= _PROMPT_S)
        self._prompt = next(fast, PROMPTS[-1])
        return _promising(decode), _promising(prefill)

    def _turn(self, runtime: Runtime, key: str, decode: Sequence[int], prefill: Sequence[int]) -> None:
        for index in range(max(len(decode), len(prefill))):
            one, many = decode[min(index, len(decode) - 1)], prefill[min(index, len(prefill) - 1)]
            found = _turn(runtime, one, many, self._prompt)
            if index < len(decode):
                self._decode[key].setdefault(one, []).append(found[0])
            if index < len(prefill):
                self._prefill[key].setdefault(many, []).append(found[1])

    @contextlib.contextmanager
    def _runtime(self, key: str) -> Iterator[Runtime]:
        runtime = self._loaded.get(key)
        if runtime is None:
            settings = RuntimeSettings(context=2 * PROMPTS[0], sequences=1, logit_rows=1, gpu_layers=-1)
            files = resolve_model(self._paths[key]).files
            runtime = self._backend.load(files, settings, lambda _: True)
            if self._keeps_loaded:
                self._loaded[key] = runtime
            facts = runtime.facts  # a load's first steps are its slowest
            _turn(runtime, facts.threads, facts.threads_batch, PROMPTS[-1])
        try:
            yield runtime
        finally:
            if not self._keeps_loaded:
                runtime.close()


def _turn(runtime: Runtime, decode: int, prefill: int, prompt: int) -> tuple[float, float]:
    """Seconds a token: decoded, read."""
    runtime.set_threads(decode, prefill)
    prompt = max(1, min(prompt, runtime.facts.context - STEPS - 1))
    sequence = runtime.open()
    try:
        begin = time.perf_counter()
        runtime.forward(Step([SequenceStep(sequence, _tokens(runtime, prompt))]))
        read = time.perf_counter() - begin
        steps = []
        for token in _tokens(runtime, STEPS + 1):
            begin = time.perf_counter()
            runtime.forward(Step([SequenceStep(sequence, [token])]))
            steps.append(time.perf_counter() - begin)
    finally:
        runtime.free(sequence)
    return statistics.median(steps[1:]), read / prompt


def _promising(costs: Mapping[int, float]) -> list[int]:
    """Two numbers of threads at the most."""
    best = sorted(costs, key=lambda threads: costs[threads])[:2]
    return sorted(threads for threads in best if costs[threads] <= _HOPELESS * costs[best[0]])


def _tokens(runtime: Runtime, count: int) -> list[int]:
    """Different ones: a model of experts sends equal ones the same way."""
    return [(1 + 7919 * index) % runtime.facts.vocab_size for index in range(count)]


def main() -> None:
    run_job(lambda job, teller: SpeedProcess(job, teller).run())


if __name__ == "__main__":
    main()
