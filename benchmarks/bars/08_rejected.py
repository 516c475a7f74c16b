"""Of drafts that were rejected nothing stays in the KV cache.

Four answers at a time over the real model, whose drafts are nearly always wrong, until 10,000 drafted
tokens were rejected, with both layouts of the cache. After every step the positions of each sequence
and the cells in use are those of a model in plain Python, which knows prompts, answers and nothing of
drafts, and llama.cpp's own bookkeeping agrees (`Runtime.check_integrity`).
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys

from benchmarks.alternate import table
from benchmarks.model_files import starter_q4_0
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import KvLayout, RuntimeSettings
from edgeinfer.engine.draft import Draft, Outcome
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.request import Request
from edgeinfer.engine.speculation import Speculation
from edgeinfer.measure.streams import GREEDY
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

AT_ONCE, CONTEXT, TOKENS = 4, 512, 150
LAYOUTS: tuple[KvLayout, ...] = ("private", "shared")


class Wrong:
    def __init__(self, draw: random.Random, vocab_size: int) -> None:
        self._draw, self._vocab_size = draw, vocab_size

    def append(self, token: int) -> Outcome | None:
        return None

    def propose(self, most: int) -> Draft:
        count = min(most, self._draw.randint(1, 15))
        tokens = tuple(self._draw.randrange(self._vocab_size) for _ in range(count))
        return Draft(tokens, (0,) * count)


def measure(bar: Bar) -> None:
    rows = [("layout", "steps", "answers", "rejected", "differences")]
    for layout in LAYOUTS:
        rejected, steps, answers, differences = played(bar, layout)
        rows.append((layout, str(steps), str(answers), str(rejected), str(len(differences))))
        bar.require(
            f"{layout}: {len(differences)} differences, {rejected} rejected {differences[:3] or ''}",
            not differences and rejected >= bar.options.rejected,
        )
    bar.say(table(rows))
    bar.details["runs"] = rows


def played(bar: Bar, layout: KvLayout) -> tuple[int, int, int, list[str]]:
    draw = random.Random(bar.options.seed)
    path = starter_q4_0()
    settings = RuntimeSettings(
        context=CONTEXT, sequences=AT_ONCE, kv_layout=layout, threads=1, threads_batch=1
    )
    runtime = get_backend("llamacpp").load(
        ModelFiles(path.name, (path,), "gguf"), settings, lambda _: True
    )
    facts = runtime.facts
    speculation = Speculation(
        lambda tokens, _: 1.0,
        min(facts.max_logit_rows, facts.stable_chunk_tokens - 1),
        CONTEXT,
        lambda _: Wrong(draw, facts.vocab_size),
    )
    engine = Engine(runtime, model="starter", max_running=AT_ONCE, speculation=speculation)
    rejected = steps = key = ended = 0
    differences: list[str] = []
    with contextlib.closing(engine):
        while rejected < bar.options.rejected:
            while sum(1 for _ in engine._running) + len(engine._waiting) < AT_ONCE:
                prompt = tuple(draw.randrange(facts.vocab_size) for _ in range(draw.randint(5, 90)))
                request = Request(tokens=prompt, max_tokens=TOKENS, sampling=GREEDY, ignore_eos=True)
                engine.submit(key, request, prompt)
                key += 1
            for _, event in engine.step():
                if hasattr(event, "stats"):
                    stats = event.stats.speculation
                    rejected += stats.drafted - stats.accepted
                    ended += 1
            steps += 1
            differences += compared(engine, layout)
    return rejected, steps, ended, differences


def compared(engine: Engine, layout: KvLayout) -> list[str]:
    """With what each sequence must hold: all that was read or said but the newest token."""
    runtime, found = engine.runtime, []
    lengths = []
    for running in engine._running:
        said = len(running.prompt) + len(running.answered)
        wanted = said - 1 if running.answered else running.num_computed
        lengths.append(wanted)
        assert running.handle is not None
        has = runtime.length(running.handle)
        if has != wanted:
            found.append(f"sequence {running.handle} has {has} positions, not {wanted}")
    lengths += [len(idle.tokens) for idle in engine.conversations.idle]
    used = runtime.facts.cells - runtime.free_cells()
    if layout == "private" and used != sum(lengths):
        found.append(f"{used} cells are in use, not {sum(lengths)}")
    try:
        engine.check_integrity()
    except AssertionError as error:
        found.append(str(error))
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rejected", type=int, default=10_000, help="drafted tokens")
    parser.add_argument("--seed", type=int, default=8)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
