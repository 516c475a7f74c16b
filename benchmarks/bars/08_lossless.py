"""Answers with drafts are, token for token, the answers without.

Fifty questions of four kinds (edgeinfer/measure/kinds_of_work.py), 200 tokens each, greedily: with every
way to draft, alone and eight at once, over an f16 and a q8_0 KV cache, with and without tokens leaving a
window of 256. One thread, cells in order: no difference is allowed. (With more threads llama.cpp splits
caches of 512 cells and more between them where a step has one row, which moves last bits.) Drafts are
checked wherever there is one, whatever it costs, so that as many as can be are.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import starter, starter_q4_0
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine.draft_source import DraftSource, load_draft
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.lookup import Lookup
from edgeinfer.engine.request import Ended, Request, RunStats
from edgeinfer.engine.speculation import Speculation
from edgeinfer.engine.window import Window
from edgeinfer.errors import MeasureFailed
from edgeinfer.measure.kinds_of_work import KINDS, question
from edgeinfer.measure.streams import GREEDY
from edgeinfer.registry import get_backend
from edgeinfer_models.config import config_from_gguf
from edgeinfer_models.exit_file import SHIPPED_EXITS
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.model_files import ModelFiles

AT_ONCE = 8
CONTEXT, WINDOW = 1024, 256
FIRST_TOKEN = 1000  # an ordinary one
Answers = list[tuple[str, RunStats]]


@dataclass(frozen=True)
class Mode:
    """seconds: of a step. drafts: "exit", "model": the starter in its own bits; "": neither."""

    seconds: Callable[[int, int], float | None]
    has_lookup: bool = True
    drafts: str = ""


@dataclass(frozen=True)
class Setting:
    kv: str
    window: int
    at_once: int

    def __str__(self) -> str:
        leaving = f"window {self.window}" if self.window < CONTEXT else "no eviction"
        return f"{self.kv}, {leaving}, {self.at_once} at once"


def measure(bar: Bar) -> None:
    draw = random.Random(bar.options.seed)
    # Of a step of so many tokens: all cost the same, so every draft is checked; or anything does.
    modes = {
        "lookup, every draft": Mode(lambda tokens, context: 1.0),
        "lookup, any length": Mode(lambda tokens, context: 1.0 + draw.random() * tokens),
        "exit, every draft": Mode(lambda tokens, context: 1.0, has_lookup=False, drafts="exit"),
        "another model": Mode(lambda tokens, context: 1.0, has_lookup=False, drafts="model"),
        "lookup and exit": Mode(
            lambda tokens, context: 1.0 + draw.random() * tokens, has_lookup=True, drafts="exit"
        ),
    }
    rows = [("KV, window, streams", "drafts", "drafted", "accepted", "evicted", "different")]
    num_different = num_accepted = num_idle = 0
    for kv, window in itertools.product(("f16", "q8_0"), (CONTEXT, WINDOW)):
        alone = Setting(kv, window, 1)
        plain = answers(bar, alone, None)
        for setting in (alone, Setting(kv, window, AT_ONCE)):
            for name, mode in modes.items():
                drafted = answers(bar, setting, mode)
                different = sum(a != b for (a, _), (b, _) in zip(plain, drafted, strict=True))
                stats = [own for _, own in drafted]
                accepted = sum(own.speculation.accepted for own in stats)
                row = (
                    str(setting),
                    name,
                    str(sum(own.speculation.drafted for own in stats)),
                    str(accepted),
                    str(sum(own.kv.evicted_tokens for own in stats)),
                    str(different),
                )
                rows.append(row)
                print(" ", *row, sep=" | ", file=sys.stderr, flush=True)
                num_different += different
                num_accepted += accepted
                if not accepted:
                    num_idle += 1
    bar.say(table(rows))
    bar.details["runs"] = rows
    count = bar.options.questions * (len(rows) - 1)
    bar.require(
        f"{num_different} of {count} answers differ from those without drafts", num_different == 0
    )
    bar.require(f"{num_accepted} drafted tokens were accepted, none in {num_idle} runs", num_idle == 0)


def answers(bar: Bar, setting: Setting, mode: Mode | None) -> Answers:
    """Of all questions, in their order: the text and the figures. Raises MeasureFailed."""
    path = starter_q4_0()
    files = ModelFiles(path.name, (path,), "gguf")
    settings = RuntimeSettings(
        context=CONTEXT,
        sequences=setting.at_once,
        kv_type_k=setting.kv,
        kv_type_v=setting.kv,
        threads=1,
        threads_batch=1,
    )
    backend = get_backend("llamacpp")
    runtime = backend.load(files, settings, lambda _: True)
    speculation = None
    if mode is not None:
        most = min(runtime.facts.max_logit_rows, runtime.facts.stable_chunk_tokens - 1)
        lookup = Lookup if mode.has_lookup else None
        speculation = Speculation(mode.seconds, most, setting.window, lookup)
        if mode.drafts:
            source = DraftSource(files=ModelFiles("smollm2", (starter(),), "gguf"))
            if mode.drafts == "exit":
                source = DraftSource(exit_path=SHIPPED_EXITS / "smollm2.exit.gguf")
            else:
                source = replace(source, config=config_from_gguf(read_gguf_model(starter())))
            folder = Path(tempfile.gettempdir()) / "edgeinfer-08-lossless"
            loaded = load_draft(source, backend, files, 30, runtime, settings, folder, 2**40)
            speculation.use_model(loaded.model, loaded.typical)
    engine = Engine(
        runtime,
        model=files.name,
        max_running=setting.at_once,
        window=Window(setting.window),
        speculation=speculation,
    )
    ends: dict[int, Ended] = {}
    with contextlib.closing(engine), contextlib.ExitStack() as stack:
        if speculation is not None:
            stack.callback(speculation.close)
        for number in range(bar.options.questions):
            text = question(KINDS[number % len(KINDS)], number)
            prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            found = runtime.tokenizer.encode(prompt, add_special=True, parse_special=True)
            # No two begin alike: what a long prompt left of a shared beginning was computed in a large
            # step, and a short prompt's own would not be.
            tokens = [FIRST_TOKEN + number, *found]
            request = Request(
                tokens=tuple(tokens),
                max_tokens=bar.options.tokens,
                sampling=GREEDY,
                ignore_eos=True,
                overflow="stream",
            )
            engine.submit(number, request, tokens)
        while engine.has_work:
            for key, event in engine.step():
                if isinstance(event, Ended):
                    ends[key] = event
        engine.check_integrity()
    for ended in ends.values():
        if ended.outcome != "finished":
            raise MeasureFailed(ended.error)
    return [(ends[number].stats.text, ends[number].stats) for number in range(bar.options.questions)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--seed", type=int, default=8)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
