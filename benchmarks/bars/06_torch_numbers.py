"""What 8 bits cost in the torch backend: KV caches, and weights of a model with planted outliers.

The starter in f32 over a text of 1,000 tokens. KV caches of int8 and fp8 against f16. Weights as plain
INT8 against INT8 with outliers apart (LLM.int8, arXiv:2208.07339): as they are, and with eight channels
of every layer's input made 60 times larger where matrices take them in (their columns are that much
smaller, so the function is the same).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks.alternate import table
from benchmarks.model_files import starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.agreement import Agreement, agreement
from edgeinfer.quality.predictions import CHUNK
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

MOST_KL = {"int8": 0.002, "fp8": 0.015}
MOST_OF_PLAIN = 0.5  # of plain INT8's KL, with planted outliers
CHANNELS, FACTOR = (7, 70, 133, 200, 301, 388, 450, 569), 60.0
SETTINGS = RuntimeSettings(
    context=1024, logit_rows=CHUNK, threads=1, threads_batch=1, gpu_layers=0, load_as="f32"
)
Change = Callable[[Any], None]  # of a decoder


@contextmanager
def loaded(settings: RuntimeSettings = SETTINGS, *changes: Change) -> Iterator[Runtime]:
    files = ModelFiles("starter", (starter(),), "gguf")
    runtime: Any = get_backend("torch").load(files, settings, lambda _: True)
    try:
        for change in changes:
            change(runtime._decoder)
        yield runtime
    finally:
        runtime.close()


def planted(decoder: Any) -> None:
    channels = list(CHANNELS)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, matrices in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[channels] *= FACTOR
            for matrix in matrices:
                matrix.weight[:, channels] /= FACTOR


def rounded(*, outliers_apart: bool) -> Change:
    def change(decoder: Any) -> None:
        from torch import nn

        from edgeinfer_backends.torch.quantized import OUTLIER, Int8Linear

        for layer in decoder.layers:
            for name, matrix in list(layer.named_modules()):
                if isinstance(matrix, nn.Linear):
                    parent, _, leaf = name.rpartition(".")
                    small = Int8Linear(
                        matrix, OUTLIER if outliers_apart else float("inf"), keeps=outliers_apart
                    )
                    setattr(layer.get_submodule(parent), leaf, small)

    return change


def measure(bar: Bar) -> None:
    with loaded() as reference:
        text = measured_text(None)
        tokens = reference.tokenizer.encode(text, add_special=False, parse_special=False)[:1000]

        def price(settings: RuntimeSettings, *changes: Change) -> Agreement:
            with loaded(settings, *changes) as runtime:
                return agreement(runtime, reference, tokens)

        rows = [("KV cache", "mean KL", "p99 KL", "top-1")]
        for kind, most in MOST_KL.items():
            found = price(replace(SETTINGS, kv_type_k=kind, kv_type_v=kind))
            rows.append((kind, f"{found.mean_kl:.5f}", f"{found.p99_kl:.4f}", f"{found.top1:.1%}"))
            bar.require(f"{kind}: mean KL {found.mean_kl:.5f} <= {most}", found.mean_kl <= most)
        bar.say(table(rows))
        bar.details["kv"] = rows
        rows = [("INT8 weights", "as they are", "with planted outliers")]
        kl: dict[bool, float] = {}
        for apart in (False, True):
            name = "outliers apart" if apart else "plain"
            plain = price(SETTINGS, rounded(outliers_apart=apart)).mean_kl
            kl[apart] = price(SETTINGS, planted, rounded(outliers_apart=apart)).mean_kl
            rows.append((name, f"{plain:.5f}", f"{kl[apart]:.5f}"))
        bar.say(f"\nmean KL\n{table(rows)}")
        bar.details["weights"] = rows
        share = kl[True] / kl[False]
        bar.require(
            f"planted outliers: {share:.3f} of plain INT8's KL <= {MOST_OF_PLAIN}",
            share <= MOST_OF_PLAIN,
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    del parser


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
