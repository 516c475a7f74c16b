"""Options that several commands share: one name, one help text, one variable, one key of the config
file (`edgeinfer.config.KEYS` has the same names)."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from edgeinfer.errors import UsageError

EPILOG = (
    "Every option is also a variable (--top-p is EDGEINFER_TOP_P) and a key of the config file"
    " (top-p = 0.9), which `edgeinfer doctor` names. A flag beats the variable, the variable the file."
)

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(option: str, text: str) -> int:
    """ "512M", "2GiB", "0" -> bytes."""
    match = re.fullmatch(
        r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE
    )
    if match is None:
        raise UsageError(f"{option} {text[:40]!r} is not a size; write for example 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_count(option: str, text: str) -> int | None:
    """ "auto" -> None, "4" -> 4."""
    if text.strip().lower() == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise UsageError(f"{option} {text[:40]!r} is neither a number nor 'auto'")
    return int(text)


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """ "128,512" -> (128, 512): each at least 1, none twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,7}", word) for word in words) or not all(map(int, words)):
        raise UsageError(f"{option} {text[:40]!r} is no list of numbers; write for example 128,512")
    counts = tuple(int(word) for word in words)
    if len(set(counts)) < len(counts):
        raise UsageError(f"{option} {text[:40]!r} has a number twice")
    return counts


def check_text(option: str, text: str | None) -> None:
    """Raises UsageError for bytes of the command line that were no text in its encoding."""
    if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"{option} is not valid UTF-8; check the terminal's encoding")


def _option(
    key: str, help_text: str, metavar: str | None, panel: str | None, *also: str, default: bool = True
) -> Any:
    return typer.Option(
        f"--{key}",
        *also,
        help=help_text,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=default,
        # whitespace would split a list of stop strings: configured.py takes that variable whole
        envvar=None if key == "stop" else "EDGEINFER_" + key.upper().replace("-", "_"),
        show_envvar=False,
    )


def _switch(key: str, help_text: str, *also: str) -> Any:
    """With its opposite: a flag must be able to beat the config file."""
    return typer.Option(
        f"--{key}/--no-{key}",
        *also,
        help=help_text,
        show_default=False,
        envvar="EDGEINFER_" + key.upper(),
        show_envvar=False,
    )


_MODEL, _SAMPLING, _ANSWER = "Model and memory", "Choosing tokens", "Answer"
_MEASURE = "What is measured"
_ENDPOINT = "Endpoint"
_WEIGHTS = "Weights"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A name `edgeinfer models list` shows, hf:owner/repo[:file], a GGUF file or a folder;"
        " else the one used last.",
        envvar="EDGEINFER_MODEL",
        show_envvar=False,
        show_default=False,
        is_eager=True,  # its table in the config file counts for the options
    ),
]

Backend = Annotated[
    str,
    _option(
        "backend",
        "auto, or a name `edgeinfer doctor` shows; a model in a form that it does not open is converted,"
        " once.",
        "NAME",
        _MODEL,
    ),
]
Ctx = Annotated[
    int | None,
    _option(
        "ctx",
        "Tokens of context. Default: 4096, or less if the model was trained on less or memory is short.",
        "N",
        _MODEL,
    ),
]
BenchCtx = Annotated[
    int | None,
    _option("ctx", "Tokens of context. Default: as many as the runs need.", "N", _MODEL),
]
Threads = Annotated[str, _option("threads", "Processor threads, or auto.", "N", _MODEL)]
GpuLayers = Annotated[
    str, _option("gpu-layers", "Layers placed on a GPU, or auto: all that fit.", "N", _MODEL)
]
KvType = Annotated[
    str,
    _option(
        "kv-type",
        "Type of the KV cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl (torch: int8,"
        " fp8); or auto: q8_0 where it makes answers faster here, or f16 does not fit, and costs next to"
        " nothing; else f16.",
        "TYPE",
        _MODEL,
    ),
]
KvTypeK = Annotated[str | None, _option("kv-type-k", "The same, for the keys alone.", "TYPE", _MODEL)]
KvTypeV = Annotated[str | None, _option("kv-type-v", "The same, for the values alone.", "TYPE", _MODEL)]
Window = Annotated[
    int | None,
    _option(
        "window",
        "Tokens the model sees at once, at most --ctx. Default: all of the context.",
        "N",
        _MODEL,
    ),
]
Sinks = Annotated[
    int,
    _option("sinks", "First tokens that stay when old ones leave a full context.", "N", _MODEL),
]
Eviction = Annotated[
    str,
    _option(
        "eviction",
        "What leaves a full context: streaming, the oldest tokens; h2o, those that got the least"
        " attention (torch).",
        "HOW",
        _MODEL,
    ),
]
Speculate = Annotated[
    str,
    _option(
        "speculate",
        "Guess the next tokens and check several in one step, where that is measured to be faster; the"
        " answer stays what it is. lookup: copied from the conversation; exit: by the model's early"
        " exit; draft: by the model that --draft names; auto: whatever there is; off.",
        "HOW",
        _MODEL,
    ),
]
Draft = Annotated[
    str | None,
    _option(
        "draft",
        "A smaller model with the same tokenizer, which guesses tokens; or the file of an exit"
        " (NAME.exit.gguf). Default: the model's exit: beside it, trained here, or one of ours.",
        "MODEL",
        _MODEL,
    ),
]
LoadAs = Annotated[
    str,
    _option(
        "load-as",
        "In what the torch backend holds and computes weights: f32, bf16, f16, int8, int4; or auto.",
        "TYPE",
        _MODEL,
    ),
]
Compile = Annotated[
    bool,
    _switch("compile", "Compile the torch backend's step for an NVIDIA GPU (a wait at first)."),
]
Overflow = Annotated[
    str,
    _option(
        "overflow",
        "Where the context is full: stream lets the oldest turns go, stop ends the answer, error fails"
        " it. A prompt that does not fit is an error but with stream.",
        "WHAT",
        _MODEL,
    ),
]
CacheRam = Annotated[
    str,
    _option(
        "cache-ram", "Memory for conversations that are not running, like 512M; 0: none.", "SIZE", _MODEL
    ),
]
CacheDisk = Annotated[
    str,
    _option(
        "cache-disk",
        "Disk for conversations that survive the program, like 2G; 0: none.",
        "SIZE",
        _MODEL,
    ),
]
CacheDir = Annotated[
    str | None,
    _option("cache-dir", "Folder for them. Default: your folder for caches.", "DIR", _MODEL),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Keep no conversation but in the running model's own memory.",
        rich_help_panel=_MODEL,
        show_default=False,
        envvar="EDGEINFER_NO_CACHE",
        show_envvar=False,
    ),
]
Temp = Annotated[float, _option("temp", "Temperature; 0 always takes the likeliest.", "X", _SAMPLING)]
TopK = Annotated[int, _option("top-k", "Only the K likeliest; 0: off.", "K", _SAMPLING)]
TopP = Annotated[
    float, _option("top-p", "Only the likeliest that make up share P; 1: off.", "P", _SAMPLING)
]
MinP = Annotated[
    float, _option("min-p", "Only those with P times the likeliest's chance; 0: off.", "P", _SAMPLING)
]
TypicalP = Annotated[
    float, _option("typical-p", "Only the most typical that make up share P; 1: off.", "P", _SAMPLING)
]
RepeatPenalty = Annotated[
    float, _option("repeat-penalty", "Divides the score of tokens seen lately; 1: off.", "X", _SAMPLING)
]
PresencePenalty = Annotated[
    float, _option("presence-penalty", "Taken off tokens seen lately; 0: off.", "X", _SAMPLING)
]
FrequencyPenalty = Annotated[
    float,
    _option("frequency-penalty", "The same, for each time they were seen; 0: off.", "X", _SAMPLING),
]
DryMultiplier = Annotated[
    float, _option("dry-multiplier", "DRY: against repeating phrases; 0: off.", "X", _SAMPLING)
]
Seed = Annotated[
    int | None, _option("seed", "The same seed gives the same text. Default: random.", "N", _SAMPLING)
]
MaxTokens = Annotated[
    int | None,
    _option("max-tokens", "Longest answer. Default: to the end of the context.", "N", _ANSWER),
]
System = Annotated[
    str | None, _option("system", "System message: who the model is to be.", "TEXT", _ANSWER)
]
Stop = Annotated[
    list[str] | None,
    _option("stop", "Text that ends the answer; may be given several times.", "TEXT", _ANSWER),
]
Schema = Annotated[
    str | None,
    _option(
        "schema",
        "Answer in JSON that fits the JSON schema in FILE; - reads standard input.",
        "FILE",
        _ANSWER,
    ),
]
Suite = Annotated[
    str,
    _option(
        "suite",
        "speed: one request at a time; concurrency: several at once; speculation: with drafts and"
        " without, on four kinds of work.",
        "NAME",
        _MEASURE,
    ),
]
PromptTokens = Annotated[
    str | None,
    _option("prompt-tokens", "Lengths of the prompts to read, like 128,512.", "N,…", _MEASURE),
]
NewTokens = Annotated[
    str | None, _option("new-tokens", "Lengths of the answers to write, like 64,256.", "N,…", _MEASURE)
]
Streams = Annotated[
    str, _option("streams", "How many requests at once, like 1,2,4 (concurrency).", "N,…", _MEASURE)
]
EvalSuite = Annotated[
    str,
    _option(
        "suite",
        "kv: what KV types cost; stream: what a window costs over a long text; recall: what is still"
        " known of what left it.",
        "NAME",
        _MEASURE,
    ),
]
Reference = Annotated[
    str | None,
    _option(
        "reference",
        "Another model of the same vocabulary: how far MODEL's predictions lie from its.",
        "MODEL",
        _MEASURE,
    ),
]
EvalSettings = Annotated[
    str | None,
    _option(
        "settings",
        "What to measure side by side: KV types for kv, like q8_0,q8_0/q4_0; with window and sinks for"
        " the others, like f16:512:4,q8_0:512:4; with :h2o behind them, as --eviction h2o.",
        "LIST",
        _MEASURE,
    ),
]
Text = Annotated[
    str | None,
    _option("text", "A file of text. Default: Python's own documentation.", "FILE", _MEASURE),
]
Tokens = Annotated[
    int | None,
    _option(
        "tokens",
        "Of the text. Default: 2000 for kv, 10000 for stream, 5000 for --reference (about a minute with"
        " a model of 135M on two cores).",
        "N",
        _MEASURE,
    ),
]
Repeat = Annotated[int, _option("repeat", "Samples of each figure.", "N", _MEASURE)]
Warmup = Annotated[int, _option("warmup", "Runs before them that do not count.", "N", _MEASURE)]
Plot = Annotated[
    str | None, _option("plot", "Draw the figures into a .svg or .png file.", "FILE", _MEASURE)
]
Output = Annotated[
    str | None,
    _option(
        "output", "Where the result goes. Default: beside the model, NAME-TYPE.", "PATH", _WEIGHTS, "-o"
    ),
]
WeightType = Annotated[
    str | None,
    _option(
        "type",
        "Of the weights. auto (default): of ggml's the fastest on this machine that loses no more than"
        " --max-kl. f16, bf16, f32; one of ggml's, like q4_0, q4_k_m, q8_0; of MLX's, mlx-4bit or"
        " mlx-8bit; int8, int4 or fp8 for torch.",
        "TYPE",
        _WEIGHTS,
    ),
]
Method = Annotated[
    str | None,
    _option(
        "method",
        "How weights are rounded. rtn: each by itself. With calibration text: imatrix, those that matter"
        " more come out closer; gptq, errors are made up for in other weights; awq, columns that matter"
        " are scaled up first; awq+gptq; qat, gptq and then learning from the full model. Folders have"
        " neither imatrix nor qat, fp8 only rtn. Default: awq+gptq where torch is installed and the"
        " model is not huge (of folders: mlx-4bit and int4), else rtn.",
        "METHOD",
        _WEIGHTS,
        default=False,
    ),
]
ImatrixFile = Annotated[
    str | None,
    _option(
        "imatrix",
        "How much each column of the weights matters: a file of llama-imatrix, GGUF or the older form.",
        "FILE",
        _WEIGHTS,
    ),
]
SaveImatrix = Annotated[
    str | None,
    _option(
        "save-imatrix",
        "Keep what --method imatrix finds, in a GGUF file that llama-quantize reads.",
        "FILE",
        _WEIGHTS,
    ),
]
Calibration = Annotated[
    str | None,
    _option(
        "calibration",
        "A text like those the model will read. Default: Python's own documentation.",
        "FILE",
        _WEIGHTS,
    ),
]
CalibrationTokens = Annotated[
    int | None,
    _option("calibration-tokens", "At most so many of it. Default: 32768.", "N", _WEIGHTS),
]
Budget = Annotated[
    str | None,
    _option(
        "budget",
        "Bits a weight (4.5bpw) or bytes (100M) of the file: each matrix gets the type whose bytes buy"
        " most. --type says then what embeddings and head get (default q4_k_m).",
        "SIZE",
        _WEIGHTS,
    ),
]
Minutes = Annotated[float | None, _option("minutes", "How long qat learns. Default: 20.", "N", _WEIGHTS)]
Report = Annotated[
    str | None,
    _option(
        "report",
        "Keep the report of what it cost: a .md, .json, .png or .svg file.",
        "FILE",
        _WEIGHTS,
    ),
]
ReportTokens = Annotated[
    int | None,
    _option("report-tokens", "Of text that the report is measured on. Default: 5000.", "N", _WEIGHTS),
]
NoReport = Annotated[
    bool, _switch("no-report", "Do not measure what it cost: predictions, speed, a few answers.")
]
MaxKl = Annotated[
    float | None,
    _option(
        "max-kl",
        "The most that may be lost, in nats a token from the model as it is: --type auto chooses by it"
        " (default 0.05), and a file that lost more is not kept.",
        "NATS",
        _WEIGHTS,
    ),
]
Refresh = Annotated[
    bool, _switch("refresh", "Measure the types' speed again instead of using what is known.")
]
To = Annotated[
    str | None,
    _option(
        "to",
        "gguf: one file (default); safetensors: a Hugging Face folder (of f16, if no --type says"
        " otherwise); mlx: a folder for mlx-lm (likewise of mlx-4bit).",
        "FORM",
        _WEIGHTS,
    ),
]
GroupSize = Annotated[
    int | None,
    _option(
        "group-size",
        "Weights that share a scale, of mlx-4bit, mlx-8bit (default 64) and int4 (32): 32, 64 or 128.",
        "N",
        _WEIGHTS,
    ),
]
ScaleType = Annotated[
    str | None,
    _option(
        "scale-type",
        "Of a quantized folder's scales and of what is not quantized in it: f16, bf16 or f32. Default:"
        " what the model has.",
        "TYPE",
        _WEIGHTS,
    ),
]
Replay = Annotated[
    str | None,
    _option(
        "replay",
        "With --suite speculation: the model says what this one answers, at the cost of its own steps:"
        " so random weights show what drafts would bring a model of their size.",
        "MODEL",
        _MEASURE,
    ),
]
ExitOutput = Annotated[
    str | None,
    _option(
        "output",
        "Where the exit goes: NAME.exit.gguf. Default: the user's folder of exits, where it is found.",
        "FILE",
        None,
        "-o",
        default=False,
    ),
]
ExitMinutes = Annotated[
    float, _option("minutes", "For everything; more is better. Default: 30.", "N", None, default=False)
]
ExitLayer = Annotated[
    str,
    _option(
        "layer",
        "After which of the model's layers it lies; 8x2: after the eighth, with two of its own; auto:"
        " where it is likely to save most.",
        "N",
        None,
        default=False,
    ),
]
ExitText = Annotated[
    str | None,
    _option(
        "text", "Text of yours that it learns from too: what you ask about.", "FILE", None, default=False
    ),
]
ExitDevice = Annotated[
    str,
    _option("device", "What trains it: cpu, cuda, mps; or auto.", "NAME", None, default=False),
]
ExportDraft = Annotated[
    str | None,
    _option(
        "export-draft",
        "Write a draft model too, with the whole head, that any llama.cpp takes (--model-draft).",
        "FILE",
        None,
        default=False,
    ),
]
Force = Annotated[bool, _switch("force", "Replace a file that is there; never a folder.")]
Host = Annotated[
    str,
    _option("host", "Address to listen at. Beyond this machine it needs an API key.", "HOST", _ENDPOINT),
]
Port = Annotated[int, _option("port", "Port to listen at; 0: any free one.", "N", _ENDPOINT)]
ApiKey = Annotated[
    str | None,
    _option(
        "api-key",
        "What a client must send as its key. A file or the variable is better: others see commands.",
        "KEY",
        _ENDPOINT,
    ),
]
ApiKeyFile = Annotated[
    str | None,
    _option("api-key-file", "A file of keys, one a line; # begins a remark.", "FILE", _ENDPOINT),
]
NoApiKey = Annotated[
    bool,
    typer.Option(
        "--no-api-key",
        help="Listen beyond this machine without a key: everybody there may use it.",
        rich_help_panel=_ENDPOINT,
        show_default=False,
        envvar="EDGEINFER_NO_API_KEY",
        show_envvar=False,
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    _option(
        "allow-origin",
        "A web page's origin that may ask, beside local ones; may be given several times.",
        "ORIGIN",
        _ENDPOINT,
    ),
]
AllowHost = Annotated[
    list[str] | None,
    _option(
        "allow-host",
        "A name this machine is reached under, beside its own; may be given several times.",
        "NAME",
        _ENDPOINT,
    ),
]
Attach = Annotated[
    str | None,
    _option(
        "attach",
        "Ask an endpoint that runs already, like http://127.0.0.1:11435, instead of loading a model.",
        "URL",
        _MODEL,
    ),
]
AttachKey = Annotated[
    str | None, _option("api-key", "That endpoint's key. Better in EDGEINFER_API_KEY.", "KEY", _MODEL)
]
Parallel = Annotated[
    int, _option("parallel", "Answers at once; each has a context of its own.", "N", _ENDPOINT)
]
Queue = Annotated[
    int, _option("queue", "Requests that may wait; more are told to come again.", "N", _ENDPOINT)
]
Timeout = Annotated[
    str, _option("timeout", "Longest that an answer may take, like 10m, or never.", "TIME", _ENDPOINT)
]
IdleUnload = Annotated[
    str,
    _option(
        "idle-unload",
        "Free the model's memory after so long without a request, like 10m; the next loads it again.",
        "TIME",
        _ENDPOINT,
    ),
]
Raw = Annotated[bool, _switch("raw", "Send PROMPT as it is, without the chat template.")]
Quiet = Annotated[bool, _switch("quiet", "Nothing on stderr but errors.", "-q")]
JsonOutput = Annotated[bool, _switch("json", "One JSON object on stdout.")]
Debug = Annotated[bool, _switch("debug", "A traceback when something fails.")]
