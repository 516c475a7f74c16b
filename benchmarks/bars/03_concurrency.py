"""Several answers at once: edgeinfer against llama-server, and against its own single stream.

Tokens a second of all streams together while all of them decode, as their reader sees them
(edgeinfer.measure.streams), on both sides with the same prompts of random tokens, the same threads for
decoding and prefill, f16 KV cache and flash attention. Both sides stay loaded between their turns.

At 3, 7 and 11 streams edgeinfer can be ahead by filling the kernels' tile of four rows. What that can
gain depends on the processor (1.37 on one, 1.00 on another), so bare steps are measured beside.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.alternate import Side, alternate
from benchmarks.llama_server import LlamaServer
from benchmarks.model_files import starter_q4_0
from benchmarks.shapes import shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.client import Client, LocalClient, OpenOptions
from edgeinfer.engine.tuner import TILE
from edgeinfer.errors import MeasureFailed
from edgeinfer.measure.streams import Prompts, Stream, answer_all, total_tok_s
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model

LEAST_RATIO = {1: 1.0, 3: 1.2, 4: 1.0, 7: 1.1, 8: 1.0, 11: 1.05}
MANY, LEAST_GAIN = 8, 2.0
MIN_ROUNDS = 10
BARE_STEPS = 15

Answer = Callable[[Sequence[tuple[int, ...]], int], list[Stream]]


def against_llama_server(bar: Bar, model: Path, streams: int) -> None:
    options = bar.options
    context = _context(options)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(model, options.threads, streams, context))
        vocab_size = client.load().vocab_size
        server = stack.enter_context(
            LlamaServer(
                model,
                threads=options.threads,
                slots=streams,
                context=context,
                unified=options.kv_unified,
            )
        )
        comparisons = alternate(
            _side("edgeinfer", _answers_of(client), vocab_size, streams, options),
            _side("llama-server", server.answer_all, vocab_size, streams, options),
            options.rounds,
            lambda number, a, b: print(f"  round {number}: {dict(a)} | {dict(b)}", file=sys.stderr),
        )
    total, _ = comparisons
    least = LEAST_RATIO.get(streams)
    title = f"{model.name}, {streams} at once, {options.threads} threads, {options.rounds} alternations"
    bar.show(title, [total], least)
    worst = comparisons[1].ratio
    bar.say(f"  slowest first token, edgeinfer / llama-server: {worst.show()} (for information)")
    if streams > 1 and streams % TILE:
        gain = tile_gain(model, options.threads, streams)
        bar.details[f"{title}: gain of a full tile"] = gain
        bar.say(f"  bare steps: padded to a full tile they run {gain:.3f} times as fast")
    if least is not None:
        ratio = total.ratio.median
        what = f"{streams} at once: {ratio:.3f} of llama-server's tok/s >= {least}"
        bar.require(what, ratio >= least and options.rounds >= MIN_ROUNDS)


def tile_gain(model: Path, threads: int, streams: int) -> float:
    """What filling the kernels' tile of four rows can gain here: seconds of a bare step of so many rows,
    each with its logits, over those of the same with dummy rows, alternating; median ratio."""
    rows = -(-streams // TILE) * TILE
    settings = RuntimeSettings(
        context=256, sequences=streams, logit_rows=16, threads=threads, threads_batch=threads
    )
    files = resolve_model(str(model)).files
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    try:
        sequences = [runtime.open() for _ in range(streams)]
        for sequence in sequences:
            runtime.forward(Step([SequenceStep(sequence, [5] * 32)]))

        def seconds(padding: int) -> float:
            step = Step([SequenceStep(sequence, [7]) for sequence in sequences], padding)
            begin = time.perf_counter()
            runtime.forward(step)
            taken = time.perf_counter() - begin
            for sequence in sequences:
                runtime.rewind(sequence, 32)
            return taken

        return statistics.median(seconds(0) / seconds(rows - streams) for _ in range(BARE_STEPS))
    finally:
        runtime.close()


def against_itself(bar: Bar) -> None:
    options = bar.options
    model = options.starter or starter_q4_0()
    context = _context(options)
    with (
        _client(model, options.threads, MANY, context) as many,
        _client(model, options.threads, 1, context) as one,
    ):
        vocab_size = many.load().vocab_size
        one.load()
        total, _ = alternate(
            _side(f"{MANY} streams", _answers_of(many), vocab_size, MANY, options),
            _side("1 stream", _answers_of(one), vocab_size, 1, options),
            options.rounds,
        )
    title = f"{model.name}, {MANY} at once against 1, {options.threads} threads"
    bar.show(title, [total], LEAST_GAIN)
    ratio = total.ratio.median
    bar.require(
        f"{MANY} at once: {ratio:.3f} of one stream's tok/s >= {LEAST_GAIN}",
        ratio >= LEAST_GAIN and options.rounds >= MIN_ROUNDS,
    )


def _side(name: str, answer: Answer, vocab_size: int, streams: int, options: argparse.Namespace) -> Side:
    # The same seed on both sides: they answer the same prompts.
    prompts = Prompts(vocab_size, seed=streams)

    def turn() -> dict[str, float]:
        drawn = [prompts.draw(options.prompt_tokens) for _ in range(streams)]
        found = answer(drawn, options.new_tokens)
        worst = max(stream.ttft_s for stream in found)
        return {"all streams, tok/s": total_tok_s(found), "slowest first token, s": worst}

    turn()  # warms up
    return Side(name, turn)


def _client(model: Path, threads: int, streams: int, context: int) -> LocalClient:
    return LocalClient(
        OpenOptions(
            model=str(model),
            kv_type_k="f16",
            kv_type_v="f16",
            context=context,
            threads=threads,
            threads_batch=threads,
            sequences=streams,
            cache_bytes=0,
            speculate="off",
        )
    )


def _answers_of(client: Client) -> Answer:
    def answer(prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[Stream]:
        answers = answer_all(client, prompts, new_tokens)
        if answers is None:
            raise MeasureFailed("the answers were cancelled")
        return [one.stream for one in answers]

    return answer


def _context(options: argparse.Namespace) -> int:
    """Of one stream; a multiple of 256, to which llama-server would round it up."""
    return int(-(-(options.prompt_tokens + options.new_tokens) // 256) * 256)


def measure(bar: Bar) -> None:
    options = bar.options
    if options.rounds < MIN_ROUNDS:
        bar.say(f"  {options.rounds} rounds are for a look only; the bar asks for {MIN_ROUNDS}")
    model = options.model or shape_file("1b")
    for streams in options.streams:
        against_llama_server(bar, model, streams)
    if not options.peer_only:
        against_itself(bar)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--streams", type=int, nargs="+", default=list(LEAST_RATIO))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each stream")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--kv-unified", action="store_true", help="llama-server with one KV cache")
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the 1B shape")
    parser.add_argument("--starter", type=Path, help="a GGUF file instead of the starter's Q4_0")
    parser.add_argument("--peer-only", action="store_true", help="without the starter's own gain")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "several answers at once, against llama-server", measure, add_options))
