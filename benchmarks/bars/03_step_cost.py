"""What measuring step costs takes, and what a stored curve is taken for.

Three parts: the time the worker measures in all after a first load, by its own count and by the
processor time it used; the time from the start of a load to the first token with automatic threads and
with the same threads fixed, in turns, for first loads (no curve stored) and later ones; and a stored
curve whose words, bytes or size were changed, of which nothing may come back. A cost that no run could
have taken marks the stored curve: the worker writes all it knows, so the mark shows what it believed.
About four minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.alternate import Spread, table
from benchmarks.conversation import GREEDY, random_tokens
from benchmarks.model_files import own_cache_folder, starter
from benchmarks.shapes import shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions, Request
from edgeinfer.errors import MeasureFailed
from edgeinfer.machine.probe import default_threads

MOST_MEASURED_S, SHARE_OF_LOAD = 2.0, 0.1
MOST_FIRST_S, MOST_LATER_S = 0.5, 0.010
MIN_ROUNDS = 10
IDLE_S = 10.0  # after a load; all must be measured by then
QUIET_S, MOST_BUSY_SHARE = 3.0, 0.05  # after that the worker is to be quiet
HEARD_S = 0.1  # what a worker logged has come by then
PROMPT = 16  # tokens
MARK = [1, 61, 61, 0, 0.0123, 7]  # a step of 61 tokens, all with logits: nothing runs such a one
HUGE_BYTES = 5 << 20

_FIRST = re.compile(r"step_costs:(\d+) stored, ([\d.]+) ms before the first request")
_DONE = re.compile(r"step_costs:(\d+) known, measured for ([\d.]+) ms")
_GAVE_WAY = re.compile(r"step_costs:([\d.]+) ms until a command had way")


class WorkersWord(logging.Handler):
    """What workers log of step costs, as numbers."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.stored: list[int] = []
        self.before_first_s: list[float] = []
        self.measured_s: list[float] = []
        self.gave_way_s: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if found := _FIRST.search(text):
            self.stored.append(int(found[1]))
            self.before_first_s.append(float(found[2]) / 1e3)
        elif found := _DONE.search(text):
            self.measured_s.append(float(found[2]) / 1e3)
        elif found := _GAVE_WAY.search(text):
            self.gave_way_s.append(float(found[1]) / 1e3)

    def forget(self) -> None:
        for figures in (self.stored, self.before_first_s, self.measured_s, self.gave_way_s):
            figures.clear()


@contextlib.contextmanager
def workers_word() -> Iterator[WorkersWord]:
    """Hear the workers that are started meanwhile."""
    log, handler = logging.getLogger("edgeinfer.worker"), WorkersWord()
    before = log.level, log.propagate, os.environ.get("EDGEINFER_LOG")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    os.environ["EDGEINFER_LOG"] = "INFO"
    try:
        yield handler
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before[:2]
        if before[2] is None:
            del os.environ["EDGEINFER_LOG"]
        else:
            os.environ["EDGEINFER_LOG"] = before[2]


@dataclass(frozen=True)
class Opened:
    load_s: float  # as the caller waits for it
    first_token_s: float  # from the start of the load


def open_and_ask(
    model: Path, automatic: bool, then: Callable[[LocalClient], None] = lambda _: None
) -> Opened:
    """Load in a new worker, and ask at once. Fixed threads are those that automatic ones begin with."""
    decode, prefill = default_threads()
    options = OpenOptions(
        model=str(model),
        kv_type_k="f16",
        kv_type_v="f16",
        context=1024,
        threads=None if automatic else decode,
        threads_batch=None if automatic else prefill,
        cache_bytes=0,
        speculate="off",
    )
    begin = time.perf_counter()
    with LocalClient(options) as client:
        info = client.load()
        loaded = time.perf_counter()
        request = Request(
            tokens=random_tokens(info.vocab_size, PROMPT, 1),
            max_tokens=2,
            ignore_eos=True,
            sampling=GREEDY,
        )
        timings = client.start(request).result().stats.timings
        then(client)
        return Opened(loaded - begin, loaded - begin + timings.ttft_s)


def what_it_takes(bar: Bar, model: Path, word: WorkersWord) -> None:
    """The measurement of a first load, to its end."""
    word.forget()
    used: list[float] = []

    def wait(client: LocalClient) -> None:
        assert client.worker_pid is not None
        worker = psutil.Process(client.worker_pid)
        for span in (IDLE_S, QUIET_S):
            before = worker.cpu_times()
            time.sleep(span)
            after = worker.cpu_times()
            used.append(after.user + after.system - before.user - before.system)

    with own_cache_folder() as folder:
        load_s = open_and_ask(model, automatic=True, then=wait).load_s
        num_files = len(list(folder.glob("step-costs/*.json")))
    most = max(MOST_MEASURED_S, SHARE_OF_LOAD * load_s)
    cores = os.cpu_count() or 1
    bar.say(
        f"\n{model.name}: loaded in {load_s:.2f} s; processor time of the worker in the {IDLE_S:.0f} s"
        f" after its first answer {used[0]:.2f} s, in the {QUIET_S:.0f} s after these {used[1]:.2f} s"
    )
    taken = word.measured_s[0] if word.measured_s else float("inf")
    bar.details[f"{model.name}, measuring"] = {
        "load_s": load_s,
        "measured_s": taken,
        "processor_s": used,
    }
    bar.require(
        f"{model.name}: measured for {taken:.2f} s in all, and then no more, <= {most:.2f} s",
        taken <= most and len(word.measured_s) == 1 and num_files == 1,
    )
    # Two witnesses: what it says it took, and what the processor was used for.
    bar.require(f"{model.name}: its processor time fits that", used[0] <= cores * (taken + 0.5))
    bar.require(f"{model.name}: quiet afterwards", used[1] <= MOST_BUSY_SHARE * QUIET_S)


def what_it_delays(bar: Bar, model: Path, word: WorkersWord) -> None:
    """First and later loads against fixed threads, in turns."""
    rounds: int = bar.options.rounds
    ttfts: dict[str, list[float]] = {"fixed": [], "first load": [], "later load": []}
    direct: dict[str, list[float]] = {"first load": [], "later load": []}
    with own_cache_folder():
        open_and_ask(model, automatic=True, then=lambda _: time.sleep(MOST_MEASURED_S + 1.0))

        def note(kind: str) -> None:
            """Before the worker is ended, which may interrupt its measuring once more."""
            time.sleep(HEARD_S)
            if (word.stored[0] > 0) != (kind == "later load"):
                raise MeasureFailed(f"a {kind} found {word.stored[0]} costs")
            direct[kind].append(word.before_first_s[0] + sum(word.gave_way_s))

        def turn(kind: str) -> float:
            word.forget()
            if kind == "fixed":
                return open_and_ask(model, automatic=False).first_token_s
            with own_cache_folder() if kind == "first load" else contextlib.nullcontext():
                return open_and_ask(model, True, lambda _: note(kind)).first_token_s

        kinds = list(ttfts)
        for number in range(rounds):
            shift = number % len(kinds)
            for kind in kinds[shift:] + kinds[:shift]:
                ttfts[kind].append(turn(kind))
    rows = [("seconds, median (quartiles)", "load to first token", "less fixed", "of it measuring")]
    medians = {kind: Spread.of(figures).median for kind, figures in ttfts.items()}
    for kind, figures in ttfts.items():
        own = Spread.of(direct[kind]).show(4) if kind in direct else "-"
        rows.append((kind, Spread.of(figures).show(), f"{medians[kind] - medians['fixed']:+.3f}", own))
    bar.say(f"\n{model.name}, {rounds} rounds in turns")
    bar.say(table(rows))
    bar.details[f"{model.name}, delay"] = {"first_token_s": ttfts, "measuring_s": direct}
    enough = rounds >= MIN_ROUNDS
    first = medians["first load"] - medians["fixed"]
    own_first = Spread.of(direct["first load"]).median
    later = Spread.of(direct["later load"]).median
    bar.require(
        f"{model.name}: a first load's first token {first:.3f} s later <= {MOST_FIRST_S} s",
        first <= MOST_FIRST_S and own_first <= MOST_FIRST_S and enough,
    )
    # What it spends itself: loads differ by more than the bound from one to the next.
    bar.require(
        f"{model.name}: a later load's {1e3 * later:.1f} ms <= {1e3 * MOST_LATER_S:.0f} ms",
        later <= MOST_LATER_S and enough,
    )


def what_is_believed(bar: Bar, model: Path, word: WorkersWord) -> None:
    """Changed curves, where the worker looks for its own."""
    with own_cache_folder() as folder:
        open_and_ask(model, automatic=True)
        (path,) = folder.glob("step-costs/*.json")
        own: dict[str, Any] = json.loads(path.read_text())
        own["costs"].append(MARK)
        rows = [("what lies there", "believed", "replaced")]
        wrong = []
        for name, content, good in _curves(own):
            path.write_bytes(content)
            word.forget()
            open_and_ask(model, automatic=True)
            after = path.read_bytes()
            costs = json.loads(after)["costs"] if after != content else []
            marked = any(row[:4] == MARK[:4] for row in costs)
            believed = marked or word.stored[0] > 0
            replaced = after != content
            rows.append((name, "yes" if believed else "no", "yes" if replaced else "no"))
            if (believed, replaced) != (good, True) or marked != good:
                wrong.append(name)
    bar.say(f"\n{model.name}, curves of others")
    bar.say(table(rows))
    bar.details["believed"] = rows[1:]
    num_foreign = len(rows) - 2
    bar.require(
        f"{num_foreign} foreign and damaged curves, none believed, all replaced; the own one believed"
        + (f" (wrong: {', '.join(wrong)})" if wrong else ""),
        not wrong and num_foreign >= len(own["conditions"]) * 2 + 10,
    )


def _curves(own: Mapping[str, Any]) -> list[tuple[str, bytes, bool]]:
    """(what it is, content, whether it is to be believed)."""
    text = json.dumps(own).encode()
    words: Mapping[str, str] = own["conditions"]
    found = [("the own one", text, True)]
    for name, value in words.items():
        others = {key: word for key, word in words.items() if key != name}
        found.append((f"another {name}", _with(own, conditions={**others, name: value + "x"}), False))
        found.append((f"no {name}", _with(own, conditions=others), False))
    found.append(("one word more", _with(own, conditions={**words, "more": "x"}), False))
    found.append(("no words", _with(own, conditions=None), False))
    found.append(("another format", _with(own, format=own["format"] + 1), False))
    for share in (0.0, 0.3, 0.9, 0.999):
        cut = text[: int(share * len(text))]
        found.append((f"{len(cut)} of {len(text)} bytes", cut, False))
    found.append(("zeros", b"\0" * len(text), False))
    found.append(("no UTF-8", b"\xff" + text, False))
    found.append(("a list", b"[1, 2, 3]", False))
    found.append(("a deep nest", b"[" * 200_000, False))
    found.append(("the own one, and spaces to 5 MB", text + b" " * HUGE_BYTES, False))
    for name, row in _bad_rows():
        found.append((name, _with(own, costs=[*own["costs"], row]), False))
    return found


def _bad_rows() -> Sequence[tuple[str, list[Any]]]:
    return (
        ("a cost that is no number", [1, 1, 1, 0, float("nan"), 3]),
        ("a cost below zero", [1, 1, 1, 0, -0.01, 3]),
        ("a cost that is text", [1, 1, 1, 0, "0.01", 3]),
        ("a size below zero", [1, -1, 1, 0, 0.01, 3]),
        ("a row too short", [1, 1, 1, 0, 0.01]),
    )


def _with(own: Mapping[str, Any], **changed: Any) -> bytes:
    return json.dumps({**own, **changed}).encode()


def measure(bar: Bar) -> None:
    o = bar.options
    if o.rounds < MIN_ROUNDS:
        bar.say(f"  {o.rounds} rounds are for a look only; the bar asks for {MIN_ROUNDS}")
    models = o.model or [starter(), shape_file("1b")]
    with workers_word() as word:
        for model in models:
            what_it_takes(bar, model, word)
            what_it_delays(bar, model, word)
        what_is_believed(bar, models[0], word)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--model", type=Path, nargs="+", help="GGUF files instead of the usual two")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "what measuring step costs takes and believes", measure, add_options))
