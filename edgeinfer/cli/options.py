"""Options that several commands share: one name, one help text, one environment variable."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from edgeinfer.errors import UsageError

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(option: str, text: str) -> int:
    """ "512M", "2GiB", "0" -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{option} {text!r} is not a size; write for example 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_count(option: str, text: str) -> int | None:
    """ "auto" -> None, "4" -> 4."""
    if text.strip().lower() == "auto":
        return None
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise UsageError(f"{option} {text!r} is neither a number nor 'auto'")
    return int(text)


Backend = Annotated[
    str,
    typer.Option(help="auto, or a backend's name (see `edgeinfer doctor`).", envvar="EDGEINFER_BACKEND"),
]
Ctx = Annotated[
    int | None,
    typer.Option(
        "--ctx",
        help="Cells of context per conversation. Default: 4096, or what the model was trained on.",
        envvar="EDGEINFER_CTX",
        show_default=False,
    ),
]
Threads = Annotated[str, typer.Option(help="Processor threads, or auto.", envvar="EDGEINFER_THREADS")]
GpuLayers = Annotated[
    str,
    typer.Option(help="Layers placed on a GPU, or auto.", envvar="EDGEINFER_GPU_LAYERS"),
]
KvType = Annotated[
    str,
    typer.Option(
        "--kv-type",
        help="Type of the KV cache: f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, f32.",
        envvar="EDGEINFER_KV_TYPE",
    ),
]
KvTypeK = Annotated[
    str | None,
    typer.Option("--kv-type-k", help="Of the keys only.", envvar="EDGEINFER_KV_TYPE_K"),
]
KvTypeV = Annotated[
    str | None,
    typer.Option("--kv-type-v", help="Of the values only.", envvar="EDGEINFER_KV_TYPE_V"),
]
CacheRam = Annotated[
    str,
    typer.Option(
        "--cache-ram",
        help="Host memory for conversations that are not running, e.g. 512M; 0: none.",
        envvar="EDGEINFER_CACHE_RAM",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="The same seed gives the same text.", envvar="EDGEINFER_SEED", show_default=False),
]
Temp = Annotated[
    float, typer.Option("--temp", help="Temperature; 0 is greedy.", envvar="EDGEINFER_TEMP")
]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1: off.", envvar="EDGEINFER_TOP_P")]
TopK = Annotated[int, typer.Option(help="Likeliest tokens kept; 0: off.", envvar="EDGEINFER_TOP_K")]
MinP = Annotated[
    float,
    typer.Option(
        help="Least share of the likeliest token's probability; 0: off.", envvar="EDGEINFER_MIN_P"
    ),
]
TypicalP = Annotated[
    float, typer.Option(help="Locally typical sampling; 1: off.", envvar="EDGEINFER_TYPICAL_P")
]
RepeatPenalty = Annotated[
    float, typer.Option(help="Of tokens seen lately; 1: off.", envvar="EDGEINFER_REPEAT_PENALTY")
]
PresencePenalty = Annotated[float, typer.Option(envvar="EDGEINFER_PRESENCE_PENALTY", help="0: off.")]
FrequencyPenalty = Annotated[float, typer.Option(envvar="EDGEINFER_FREQUENCY_PENALTY", help="0: off.")]
DryMultiplier = Annotated[
    float,
    typer.Option(help="DRY: penalty on repeating phrases; 0: off.", envvar="EDGEINFER_DRY_MULTIPLIER"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Longest answer in tokens. Default: to the end of the context.",
        envvar="EDGEINFER_MAX_TOKENS",
        show_default=False,
    ),
]
System = Annotated[
    str | None, typer.Option(help="System message.", envvar="EDGEINFER_SYSTEM", show_default=False)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends the answer; may be given several times.", show_default=False),
]
JsonOutput = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Print a traceback when something fails.", envvar="EDGEINFER_DEBUG"),
]
