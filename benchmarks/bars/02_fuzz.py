"""10,000 damaged copies of a small real GGUF: every one ends in an answer or in one clear line.

Each goes the way `edgeinfer run` takes it: checked in this process, then loaded by a worker process that
is kept from one to the next (10,000 interpreter starts would take hours), then asked for four tokens. A
sample also goes through the real command, and one through the real chat.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.conversation import GREEDY
from benchmarks.mutations import Mutator
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, Message, OpenOptions, Request
from edgeinfer.errors import EdgeInferError, LoadFailed, WorkerDied
from edgeinfer.open import plan_open
from edgeinfer_tui import ChatApp
from edgeinfer_tui.status_line import StatusLine

CASES, SAMPLE = 10_000, 100
CASE_TIMEOUT_S = 60.0
ASK = Request(messages=(Message("user", "Hello"),), max_tokens=4, ignore_eos=True, sampling=GREEDY)

ANSWERED = "answered"
EARLY = "rejected before native code"
NATIVE = "rejected by llama.cpp"
REFUSED = "loaded, request failed with one line"
DIED_LOADING = "worker died while loading (reported)"
DIED_ANSWERING = "worker died while answering (reported)"
HUNG = "HUNG"
NOT_ONE_LINE = "NOT ONE LINE"
UNEXPECTED = "UNEXPECTED EXCEPTION"
BAD = (HUNG, NOT_ONE_LINE, UNEXPECTED)


@dataclass(frozen=True)
class Outcome:
    kind: str
    detail: str = ""


class Driver:
    """Runs cases one after another through one client, replaced only when it hung."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.client = LocalClient(self._options())

    def run(self, data: bytes) -> Outcome:
        self.path.write_bytes(data)
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(self._case()), daemon=True)
        thread.start()
        thread.join(CASE_TIMEOUT_S)
        if outcomes:
            return outcomes[0]
        stuck, self.client = self.client, LocalClient(self._options())
        stuck.close()
        return Outcome(HUNG, f"after {CASE_TIMEOUT_S:.0f} s")

    def close(self) -> None:
        self.client.close()

    def _options(self) -> OpenOptions:
        return OpenOptions(model=str(self.path), context=256, threads=1)

    def _case(self) -> Outcome:
        try:
            # What `load` does first; done apart so that a file refused here starts no process.
            outcome = _attempt(lambda: plan_open(self._options()), lambda error: EARLY)
            if outcome is not None:
                return outcome
            self.client.reopen(self._options())
            outcome = _attempt(self.client.load, _kind_of_load_error)
            if outcome is not None:
                return outcome
            outcome = _attempt(lambda: self.client.start(ASK).result(), _kind_of_answer_error)
            return outcome or Outcome(ANSWERED)
        except Exception as error:
            return Outcome(UNEXPECTED, repr(error))


def _attempt(action: Callable[[], object], kind: Callable[[EdgeInferError], str]) -> Outcome | None:
    try:
        action()
    except EdgeInferError as error:
        text = str(error)
        if not text.strip() or "\n" in text:
            return Outcome(NOT_ONE_LINE, repr(text))
        return Outcome(kind(error), f"{type(error).__name__}: {text}")
    return None


def _kind_of_load_error(error: EdgeInferError) -> str:
    if isinstance(error, WorkerDied):
        return DIED_LOADING
    return NATIVE if isinstance(error, LoadFailed) else EARLY


def _kind_of_answer_error(error: EdgeInferError) -> str:
    return DIED_ANSWERING if isinstance(error, WorkerDied) else REFUSED


def run_command(path: Path, data: bytes) -> Outcome:
    """The same through `edgeinfer run`, as a user would start it."""
    path.write_bytes(data)
    command = [str(Path(sys.executable).with_name("edgeinfer")), "run", str(path), "Hello"]
    command += ["--max-tokens", "4", "--temp", "0", "--ctx", "256", "--threads", "1"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CASE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome(HUNG, "the command")
    errors = done.stderr.decode("utf-8", "replace")
    if "Traceback" in errors:
        return Outcome(UNEXPECTED, errors[-400:])
    if done.returncode == 0:
        return Outcome(ANSWERED)
    if done.returncode != 1:
        return Outcome(UNEXPECTED, f"exit code {done.returncode}: {errors[-200:]}")
    if len(errors.strip().splitlines()) != 1 or done.stdout.strip():
        return Outcome(NOT_ONE_LINE, repr(errors[-400:]))
    return Outcome(EARLY, errors.strip())


def run_chat(path: Path, data: bytes) -> Outcome:
    """The same in the real chat, without a terminal: loaded, asked, left."""
    path.write_bytes(data)
    try:
        return asyncio.run(asyncio.wait_for(_chat(path), CASE_TIMEOUT_S))
    except TimeoutError:
        return Outcome(HUNG, "the chat")
    except Exception as error:
        return Outcome(UNEXPECTED, f"the chat: {error!r}")


async def _chat(path: Path) -> Outcome:
    client = LocalClient(OpenOptions(model=str(path), context=256, threads=1))
    app = ChatApp(client, system=None, sampling=GREEDY, max_tokens=4, model_label=path.name)
    async with app.run_test(size=(80, 24)) as pilot:

        async def settled(*states: str) -> str:
            while (state := app.screen_stack[0].query_one(StatusLine).figures.state) not in states:
                await pilot.pause(0.02)
            return state

        if await settled("ready", "no model") == "no model":
            outcome = Outcome(EARLY, app.load_error)
            if not app.load_error.strip() or "\n" in app.load_error:
                outcome = Outcome(NOT_ONE_LINE, repr(app.load_error))
        else:
            await pilot.press("h", "i", "enter")
            await pilot.pause(0.05)
            ended = await settled("ready", "failed")
            outcome = Outcome(ANSWERED if ended == "ready" else REFUSED)
        app.leave()
    if app.crash is not None:
        return Outcome(UNEXPECTED, f"the chat: {app.crash!r}")
    return outcome


def measure(bar: Bar) -> None:
    cases: int = bar.options.cases
    original = _tiny_model()
    mutator = Mutator(original, bar.options.seed)
    outcomes: Counter[str] = Counter()
    by_mutation: dict[str, Counter[str]] = {}
    kept: list[str] = []
    examples: dict[str, str] = {}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edgeinfer-fuzz-") as folder:
        driver = Driver(Path(folder) / "damaged.gguf")
        try:
            sound = driver.run(original)
            bar.require(f"the sound file answers ({sound.kind} {sound.detail})", sound.kind == ANSWERED)
            for number in range(bar.options.first, bar.options.first + cases):
                mutation, data = mutator.mutate(number)
                outcome = driver.run(data)
                outcomes[outcome.kind] += 1
                by_mutation.setdefault(mutation, Counter())[outcome.kind] += 1
                examples.setdefault(outcome.kind, f"case {number}: {outcome.detail}")
                if outcome.kind in (*BAD, DIED_LOADING, DIED_ANSWERING):
                    kept.append(f"case {number} ({mutation}): {outcome.kind}: {outcome.detail}")
                    if bar.options.keep:
                        bar.options.keep.mkdir(parents=True, exist_ok=True)
                        (bar.options.keep / f"{number}.gguf").write_bytes(data)
                if (number + 1) % 500 == 0:
                    spent = time.monotonic() - begin
                    print(f"  {number + 1} cases, {spent:.0f} s: {dict(outcomes)}", file=sys.stderr)
            still = driver.run(original)
            bar.require(
                f"the sound file still answers afterwards ({still.kind})", still.kind == ANSWERED
            )
        finally:
            driver.close()
        commands: Counter[str] = Counter()
        for index in range(bar.options.sample):
            number = bar.options.first + index * max(1, cases // max(1, bar.options.sample))
            outcome = run_command(Path(folder) / "damaged.gguf", mutator.mutate(number)[1])
            commands[outcome.kind] += 1
            if outcome.kind in BAD:
                kept.append(f"command, case {number}: {outcome.kind}: {outcome.detail}")
        chats: Counter[str] = Counter()
        for index in range(bar.options.chats):
            number = bar.options.first + index * max(1, cases // max(1, bar.options.chats)) + 7
            outcome = run_chat(Path(folder) / "damaged.gguf", mutator.mutate(number)[1])
            chats[outcome.kind] += 1
            if outcome.kind in BAD:
                kept.append(f"chat, case {number}: {outcome.kind}: {outcome.detail}")
    bar.details["examples"] = examples
    _report(bar, outcomes, by_mutation, {"commands": commands, "chats": chats}, kept, begin)


def _report(
    bar: Bar,
    outcomes: Counter[str],
    by_mutation: dict[str, Counter[str]],
    samples: dict[str, Counter[str]],
    kept: list[str],
    begin: float,
) -> None:
    seconds = time.monotonic() - begin
    bar.say(f"\n{outcomes.total()} damaged files in {seconds:.0f} s, seed {bar.options.seed}")
    mutations = sorted(by_mutation)
    rows = [("outcome", "all", *mutations)]
    for kind, number in outcomes.most_common():
        rows.append((kind, str(number), *(str(by_mutation[m][kind]) for m in mutations)))
    bar.say(table(rows))
    deaths = outcomes[DIED_LOADING] + outcomes[DIED_ANSWERING]
    bar.say(f"  worker deaths, each reported to its request: {deaths}")
    for kind, example in bar.details["examples"].items():
        bar.say(f"  {kind}, for example {example}")
    for name, sample in samples.items():
        bar.say(f"  {sample.total()} as {name}: {dict(sample)}")
    for line in kept[:40]:
        bar.say(f"  {line}")
    bar.details.update(
        outcomes=dict(outcomes),
        by_mutation={m: dict(c) for m, c in by_mutation.items()},
        samples={name: dict(sample) for name, sample in samples.items()},
        notable=kept,
        seconds=seconds,
    )
    bad = sum(outcomes[kind] for kind in BAD)
    bar.require(
        f"{outcomes.total() - bad} of {outcomes.total()} end in an answer or in one line", bad == 0
    )
    for name, sample in samples.items():
        wrong = sum(sample[kind] for kind in BAD)
        bar.require(f"{sample.total() - wrong} of {sample.total()} {name} do, too", wrong == 0)


def _tiny_model() -> bytes:
    """The tests' small real model."""
    fixtures = Path(__file__).resolve().parents[2] / "tests" / "fixtures_gguf.py"
    spec = importlib.util.spec_from_file_location("fixtures_gguf", fixtures)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        module.write_tiny_gguf(path)
        return path.read_bytes()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="cases also run through the command")
    parser.add_argument("--chats", type=int, default=SAMPLE, help="cases also run in the chat")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for files that killed or hung a worker")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "damaged GGUF files", measure, add_options))
