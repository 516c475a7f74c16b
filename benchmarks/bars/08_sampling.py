"""Sampled answers come from the same distribution with drafts and without.

A model of 257 tokens with random weights, run by llama.cpp with its samplers (temperature 0.9, top-k 24,
top-p 0.97). The same prompt is answered thousands of times, each time with another seed, with and
without drafts that are often right; the tokens at each position are compared by a chi-squared test of
homogeneity, and the second and third together. That the test can see a difference is shown by a third
side, whose acceptance is made wrong on purpose: now and then a drafted token is taken that the model did
not say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternate import table
from benchmarks.holes import write_holes
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.engine.draft import Draft, Outcome
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.request import Request
from edgeinfer.engine.speculation import Speculation
from edgeinfer.quantize.conversion import convert, plan_conversion
from edgeinfer.registry import get_backend
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.conversion.model import source_of_folder
from edgeinfer_models.model_files import ModelFiles

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "tie_word_embeddings": False,
}
SHARPNESS = 8.0  # of embeddings and head: the likeliest tokens have odds of some tenths
PROMPT = tuple(range(60, 72))
TOKENS = 4  # of an answer: the first one is drawn before there is a draft
AT_ONCE = 8
LEAST_P = 0.001  # four positions and one pair are tested for each side
LEAST_EXPECTED = 8.0  # rarer tokens are counted together
BIAS = 0.05  # of tokens, on the side that is wrong
Answers = list[tuple[int, ...]]


class Guesses:
    """Drafts what answers to this prompt often were, from where it stands on."""

    def __init__(self, likely: Sequence[tuple[int, ...]], draw: random.Random) -> None:
        self._likely, self._draw, self._said = likely, draw, 0

    def append(self, token: int) -> Outcome | None:
        self._said += 1
        return None

    def propose(self, most: int) -> Draft:
        tokens = self._draw.choice(self._likely)[self._said :][:most]
        return Draft(tokens, (0,) * len(tokens))


def measure(bar: Bar) -> None:
    draw = random.Random(bar.options.seed)
    count = -(-bar.options.draws // TOKENS)
    with tempfile.TemporaryDirectory() as temporary:
        path = write_model(Path(temporary), bar.options.seed)
        plain, _ = answers(path, count, draw, None)
        # The commonest: what is accepted wrongly then makes them commoner still.
        likely = [answer for answer, _ in Counter(plain).most_common(16)]
        drafted, accepted = answers(path, count, draw, likely)
        wrong, _ = answers(path, count, draw, likely, bias=BIAS)
    rows = [("compared", "without drafts and with", "without and a wrong acceptance")]
    found: dict[str, list[float]] = {"same": [], "wrong": []}
    for what, of in positions():
        same = p_value([of(each) for each in plain], [of(each) for each in drafted])
        other = p_value([of(each) for each in plain], [of(each) for each in wrong])
        rows.append((what, f"p = {same:.3g}", f"p = {other:.3g}"))
        found["same"].append(same)
        found["wrong"].append(other)
    bar.say(table(rows))
    bar.details["p"] = found
    draws = count * TOKENS
    bar.require(f"{accepted} of {draws} tokens were accepted drafts", accepted > 0.05 * draws)
    least = min(found["same"])
    bar.require(f"no difference in {draws} draws: least p {least:.3g} >= {LEAST_P}", least >= LEAST_P)
    seen = min(found["wrong"])
    bar.require(f"a wrong acceptance is seen: least p {seen:.3g} < {LEAST_P}", seen < LEAST_P)


def positions() -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [
        (f"token {at + 1}", lambda answer, at=at: answer[at]) for at in range(TOKENS)
    ]
    return [*found, ("tokens 2 and 3 together", lambda answer: answer[1:3])]


def answers(
    path: Path,
    count: int,
    draw: random.Random,
    likely: Sequence[tuple[int, ...]] | None,
    bias: float = 0.0,
) -> tuple[Answers, int]:
    """To the same prompt, each with a seed of its own; and how many drafted tokens were accepted."""
    settings = RuntimeSettings(context=64, sequences=AT_ONCE, threads=1, threads_batch=1)
    runtime = get_backend("llamacpp").load(ModelFiles("tiny", (path,), "gguf"), settings, lambda _: True)
    speculation = None
    if likely is not None:
        speculation = Speculation(lambda tokens, _: 1.0, 16, 64, lambda _: Guesses(likely, draw))
    engine = Engine(runtime, model="tiny", max_running=AT_ONCE, speculation=speculation)
    if bias:
        accept_wrongly(engine, draw, bias)
    found: dict[int, tuple[int, ...]] = {}
    accepted = 0
    sampling = {"temperature": 0.9, "top_k": 24, "top_p": 0.97}
    with contextlib.closing(engine):
        for key in range(count):
            params = SamplingParams(seed=draw.randrange(2**31), **sampling)  # type: ignore[arg-type]
            request = Request(tokens=PROMPT, max_tokens=TOKENS, sampling=params, ignore_eos=True)
            engine.submit(key, request, PROMPT)
        said: dict[int, list[int]] = {}
        while engine.has_work:
            for running in engine._running:
                said[running.key] = running.answered
            for key, event in engine.step():
                if hasattr(event, "stats"):
                    found[key] = tuple(said[key])
                    accepted += event.stats.speculation.accepted
    return [found[key] for key in sorted(found)], accepted


def accept_wrongly(engine: Engine, draw: random.Random, share: float) -> None:
    """Now and then say the draft's next token, whatever was drawn."""
    runtime: Runtime = engine.runtime
    sample, check = runtime.sample, engine._check
    waiting: list[int] = []

    def checked(running: Any, first_row: int) -> None:
        waiting[:] = running.draft
        check(running, first_row)
        waiting.clear()

    def sampled(*arguments: Any) -> int:
        token = sample(*arguments)
        drafted = waiting.pop(0) if waiting else token
        return drafted if draw.random() < share else token

    engine._check = checked  # type: ignore[method-assign]
    runtime.sample = sampled  # type: ignore[method-assign]


def p_value(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Of two samples being from one distribution: chi-squared, by the normal approximation of Wilson and
    Hilferty (1931), which is good to three digits here."""
    counts = [Counter(one), Counter(other)]
    cells: list[tuple[int, int]] = []
    rare = [0, 0]
    for value in set(one) | set(other):
        pair = (counts[0][value], counts[1][value])
        if sum(pair) / 2 < LEAST_EXPECTED:
            rare[0] += pair[0]
            rare[1] += pair[1]
        else:
            cells.append(pair)
    if sum(rare) / 2 >= LEAST_EXPECTED:
        cells.append((rare[0], rare[1]))
    totals = (len(one), len(other))
    statistic = 0.0
    for pair in cells:
        for seen, total in zip(pair, totals, strict=True):
            expected = sum(pair) * total / sum(totals)
            statistic += (seen - expected) ** 2 / expected
    freedom = len(cells) - 1
    if freedom < 1:
        return 1.0
    cube = (statistic / freedom) ** (1 / 3)
    z = (cube - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    from math import erfc, sqrt

    return 0.5 * erfc(z / sqrt(2))


def write_model(folder: Path, seed: int) -> Path:
    """As a GGUF file in F32."""
    hf = folder / "model"
    write_holes(hf, SHAPE)
    numbers = np.random.default_rng(seed)
    for path in sorted(hf.glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        for name, told in json.loads(data[8 : 8 + length]).items():
            start, stop = told["data_offsets"]
            drawn = numbers.standard_normal((stop - start) // 2, dtype=np.float32)
            values = drawn * 0.12 if len(told["shape"]) > 1 else np.ones_like(drawn)
            if "embed" in name or "lm_head" in name:
                values *= SHARPNESS
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            data[8 + length + start : 8 + length + stop] = bits.tobytes()
        path.write_bytes(data)
    plan = plan_conversion(source_of_folder(hf), hf, "gguf", "f32", None, force=False)
    convert(plan, lambda _: None)
    return plan.out


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=60_000, help="tokens of each side")
    parser.add_argument("--seed", type=int, default=8)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
