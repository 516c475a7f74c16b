"""32 requests with a common beginning of 2,000 tokens hold its cells once, and their own beside them.

In the layout in which sequences share cells; in the other each sequence has a stream of its own, which
is there whether or not it is used, and a fork copies rows: those figures are shown. The most cells in
use after any step, against one prefix and the own tokens of each. A beginning is shared in whole tiles
of 64 cells, and sequences begin at one, so each may take half a tile more.
"""

from __future__ import annotations

import sys

from benchmarks.alternate import table
from benchmarks.model_files import starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.request import Request
from edgeinfer.measure.streams import GREEDY, Prompts
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

REQUESTS, PREFIX, OWN, ANSWER = 32, 2000, 70, 30
TILE = 64


def measure(bar: Bar) -> None:
    rows = [("layout", "most cells", "prefix + own", "prompt tokens read")]
    for layout in ("shared", "private"):
        settings = RuntimeSettings(context=2304, sequences=REQUESTS, logit_rows=64, kv_layout=layout)
        runtime = get_backend("llamacpp").load(
            ModelFiles("starter", (starter(),), "gguf"), settings, lambda _: True
        )
        engine = Engine(runtime, model="starter", max_running=REQUESTS)
        prompts = Prompts(runtime.facts.vocab_size)
        prefix = prompts.draw(PREFIX)
        requests = [(*prefix, *prompts.draw(OWN)) for _ in range(REQUESTS)]
        read = most = 0
        for key, tokens in enumerate(requests):
            request = Request(tokens=tokens, max_tokens=ANSWER, sampling=GREEDY, ignore_eos=True)
            engine.submit(key, request, tokens)
        while engine.has_work:
            for _, event in engine.step():
                if hasattr(event, "stats"):
                    read += event.stats.usage.prompt_tokens - event.stats.usage.cached_tokens
            most = max(most, engine.status().used_cells)
        engine.close()
        ideal = PREFIX + REQUESTS * (OWN + ANSWER)
        rows.append((layout, f"{most:,}", f"{ideal:,}", f"{read:,}"))
        if layout == "shared":
            limit = ideal + REQUESTS * TILE // 2
            bar.require(f"{most} cells <= {limit}, which is {ideal} in whole tiles", most <= limit)
    bar.say(table(rows))
    bar.details["rows"] = rows


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure))
