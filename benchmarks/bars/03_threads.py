"""`--threads auto` against every fixed choice, idle and with one core kept busy from outside."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.alternate import Spread, table
from benchmarks.conversation import GREEDY, random_tokens
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions, Request
from edgeinfer.machine.probe import probe_machine

LEAST_RATIO = 0.95
MEASURED_S = 4.0  # idle after the load: what is measured then is measured before the first turn
NEIGHBOUR = "import os; owner = os.getppid()\nwhile os.getppid() == owner: pass"


@contextlib.contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """One core kept busy by a process that has nothing to do with ours."""
    if not wanted:
        yield
        return
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], start_new_session=True)
    try:
        time.sleep(0.5)
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


class Turns:
    """One loaded model with its own prompts."""

    def __init__(self, client: LocalClient, prefill: int, decode: int) -> None:
        self._client = client
        self._prefill, self._decode = prefill, decode
        self._vocab_size = client.load().vocab_size
        self._seed = 0

    def measure(self) -> dict[str, float]:
        self._seed += 1
        prompt = random_tokens(self._vocab_size, self._prefill, self._seed)
        request = Request(tokens=prompt, ignore_eos=True, max_tokens=self._decode + 1, sampling=GREEDY)
        timings = self._client.start(request).result().stats.timings
        return {"prefill": timings.prefill_tok_s, "decode": timings.decode_tok_s}


def measure(bar: Bar) -> None:
    o = bar.options
    model = str(o.model or _shape_1b())
    names = ["auto", *(str(n) for n in range(1, probe_machine().physical_cores + 1))]
    with contextlib.ExitStack() as stack:
        sides: dict[str, Turns] = {}
        for name in names:
            threads = None if name == "auto" else int(name)
            options = OpenOptions(
                model=model, context=2048, threads=threads, threads_batch=threads, cache_bytes=0
            )
            client = stack.enter_context(LocalClient(options))
            sides[name] = Turns(client, o.prefill, o.decode)
            time.sleep(MEASURED_S if name == "auto" else 0.0)
            sides[name].measure()
        for busy in (False, True):
            with busy_core(busy):
                where = "one core busy" if busy else "idle"
                _compare(bar, where, sides, o.rounds)


def _compare(bar: Bar, where: str, sides: dict[str, Turns], rounds: int) -> None:
    figures: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        turn = names[number % len(names) :] + names[: number % len(names)]
        for name in turn:
            found = sides[name].measure()
            if number:  # the first turn of a new situation is where auto finds out
                for metric, value in found.items():
                    figures[name][metric].append(value)
        print(f"  {where}, round {number}", file=sys.stderr)
    rows = [("tok/s", *names)]
    for metric in ("prefill", "decode"):
        rows.append((metric, *(Spread.of(figures[name][metric]).show(1) for name in names)))
    bar.say(f"\n{where}, median (quartiles) of {rounds} rounds; columns are threads")
    bar.say(table(rows))
    bar.details[where] = figures
    for metric in ("prefill", "decode"):
        best = max(names[1:], key=lambda name: statistics.median(figures[name][metric]))
        ratios = [a / b for a, b in zip(figures["auto"][metric], figures[best][metric], strict=True)]
        ratio = statistics.median(ratios)
        bar.require(
            f"{metric}, {where}: {ratio:.3f} of the best fixed choice's ({best}) >= {LEAST_RATIO}",
            ratio >= LEAST_RATIO,
        )


def _shape_1b() -> Path:
    from benchmarks.shapes import shape_file

    return shape_file("1b")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the 1B shape")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "automatic threads against fixed ones", measure, add_options))
