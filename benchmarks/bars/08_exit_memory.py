"""What the starter's exit takes of memory, in the ledger and in the process.

Two workers hold SmolLM2 (Q4_0) in a context of 2,048 tokens, one of them with its exit. Both answer the
same questions until the context is full; the one with the exit checks drafts of it throughout. What it
takes more is held against the exit's share of the model's layers (weights, keys and values) and its own
tensors: its layer, its norm and its head, which is a copy of some of the model's rows. What an exit is
put together from is read once, the first time it is loaded; that time does not count here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psutil

from benchmarks.alternate import table
from benchmarks.model_files import starter_q4_0
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions, Request
from edgeinfer.engine.request import DraftOptions
from edgeinfer.errors import MeasureFailed
from edgeinfer.measure.kinds_of_work import question
from edgeinfer.measure.streams import GREEDY
from edgeinfer_models.exit_file import SHIPPED_EXITS, read_exit_file
from edgeinfer_models.ggml_types import row_bytes
from edgeinfer_models.gguf_header import read_gguf_header

MOST = 1.15
CONTEXT = 2048
MIB = 2**20


def measure(bar: Bar) -> None:
    path = starter_q4_0()
    share, own = shares(path)
    allowed = MOST * (share + own)
    taken(bar, path, with_exit=True)
    plain, _ = taken(bar, path, with_exit=False)
    drafting, ledger = taken(bar, path, with_exit=True)
    more = drafting - plain
    rows = [("", "MiB")]
    for name, size in (
        ("share of the layers, weights and KV", share),
        ("its own tensors", own),
        ("ledger", ledger),
        ("process, more than without", more),
        (f"{MOST} of the first two", allowed),
    ):
        rows.append((name, f"{size / MIB:.1f}"))
    bar.say(table(rows))
    bar.details["bytes"] = {"share": share, "own": own, "ledger": ledger, "process": more}
    for name, size in (("ledger", ledger), ("process", more)):
        ratio = size / (share + own)
        bar.require(f"{name}: {ratio:.3f} of its share and its own <= {MOST}", size <= allowed)


def shares(model: Path) -> tuple[int, int]:
    """Bytes of its share of the model's layers, and of its own tensors."""
    header, exit_file = read_gguf_header(model), read_exit_file(SHIPPED_EXITS / "smollm2.exit.gguf")
    weights = sum(
        tensor.num_bytes
        for tensor in header.tensors
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) < exit_file.layer
    )
    layers = header.get_int("{arch}.block_count")
    heads = header.get_int("{arch}.attention.head_count_kv")
    width = header.get_int("{arch}.embedding_length") // header.get_int("{arch}.attention.head_count")
    kv = 2 * 2 * heads * width * CONTEXT * (exit_file.layer + exit_file.new_layers)
    assert 0 < exit_file.layer < layers
    head = header.tensor("output.weight") or header.tensor("token_embd.weight")
    assert head is not None
    rows = len(exit_file.kept_tokens) * row_bytes(head.type_name, head.shape[0])
    return weights + kv, rows + sum(tensor.num_bytes for tensor in exit_file.header.tensors)


def taken(bar: Bar, path: Path, *, with_exit: bool) -> tuple[int, int]:
    """Resident bytes of the worker once it has answered, and those of drafts in its ledger."""
    options = OpenOptions(
        model=str(path),
        draft=str(SHIPPED_EXITS / "smollm2.exit.gguf") if with_exit else None,
        measures_drafts=with_exit,
        speculate="exit" if with_exit else "lookup",  # so that both measure what steps cost
        context=CONTEXT,
        threads=1,
        kv_type_k="f16",
        kv_type_v="f16",
        cache_bytes=0,
    )
    with LocalClient(options) as client:
        info = client.load()
        text = "\n".join(question("chat", number) for number in range(60))
        drafts = DraftOptions("exit" if with_exit else "off", 3 if with_exit else 0)
        tokens = [token.id for token in client.tokenize(text)][: CONTEXT - bar.options.tokens - 1]
        for _ in range(2):
            request = Request(
                tokens=tuple(tokens),
                max_tokens=bar.options.tokens,
                sampling=GREEDY,
                ignore_eos=True,
                drafts=drafts,
            )
            ended = client.start(request).result()
            if ended.outcome != "finished":
                raise MeasureFailed(ended.error)
            if with_exit and not ended.stats.speculation.drafted:
                raise MeasureFailed("the exit drafted nothing")
        assert client._process is not None
        resident = int(psutil.Process(client._process.pid).memory_info().rss)
        ledger = sum(use.real_bytes or 0 for use in info.memory if use.name.startswith("exit "))
    return resident, ledger


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=150, help="of each answer")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
