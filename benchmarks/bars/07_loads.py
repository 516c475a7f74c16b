"""Every GGUF file that `quantize` writes loads in stock llama-cli and answers.

From the full-precision model off the grids (benchmarks/off_grid.py): one file of each type, by rtn or,
where that is of no use, weighed by an importance matrix found in text, and files of the methods that
change codes, scales and norms. llama-cli answers a question greedily, and has to say what our own
backend says of the same file, token for token, up to a token that hardly differed in probability from
the next one; types of eight bits and more have to know the answer. (Not those of four: the original
gives "The" 41 % as its first word, "L" and "La" 35 %, so a file that loses little may still miss.) Every
tensor is dequantized by the gguf package and lies within what its type can hold; what awq scaled is not
compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.alternate import table
from benchmarks.off_grid import off_grid
from benchmarks.peers import peer
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, Message, OpenOptions, Request, Text
from edgeinfer.engine.request import TokenLogprob
from edgeinfer.errors import UsageError
from edgeinfer.measure.streams import GREEDY
from edgeinfer.quantize import prepared
from edgeinfer.quantize.conversion import TYPES

QUESTION, KNOWN = "What is the capital of France?", "Paris"
METHODS = (
    ("q4_0", "gptq"), ("q4_0", "awq+gptq"), ("q4_k_m", "awq+gptq"), ("iq4_nl", "awq+gptq"),
    ("iq3_xxs", "gptq"), ("iq2_xs", "imatrix"),
)  # fmt: skip
FEW_TOKENS = 4096
ANSWER_TOKENS = 24
CONTEXT = 512
NEAR_TIE = 0.1  # nats between two tokens that rounding in another order of sums may swap
# Root mean square of the errors by that of the numbers, at most: by how many codes there are.
MOST_OFF = {8: 0.01, 6: 0.04, 5: 0.07, 4: 0.14, 3: 0.30, 2: 0.60, 1: 0.95}


def measure(bar: Bar) -> None:
    original = off_grid()
    numbers = dequantized(original)
    rows = [("type", "method", "types in the file", "furthest off", "says as we do", "says")]
    silent, unknown, other, off = [], [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out.gguf"
        asked = bar.options.only.split(",") if bar.options.only else TYPES
        for type_name, method in [*((name, "") for name in TYPES), *METHODS]:
            if type_name not in asked:
                continue
            done = made(original, out, type_name, method)
            label = f"{type_name} {done}"
            found = dequantized(out)
            furthest = "scaled" if "awq" in done else f"{worst(numbers, found, off, label):.3f}"
            said = answer(out)
            same, is_same = compared(said, own_answer(out))
            kinds = " ".join(sorted({kind for kind, _ in found.values()} - {"F32", "F16"}))
            rows.append((type_name, done, kinds, furthest, same, readable(said)))
            print(f"  {label}: {same}: {readable(said)}", file=sys.stderr, flush=True)
            if not said:
                silent.append(label)
            if not is_same:
                other.append(label)
            if least_bits(found) >= 8 and KNOWN.encode() not in said:
                unknown.append(label)
            out.unlink()
    bar.say(table(rows))
    bar.details["files"] = rows
    count = len(rows) - 1
    bar.require(f"{count - len(silent)} of {count} files answer in llama-cli {silent or ''}", not silent)
    bar.require(f"{count - len(other)} of {count} say what our backend says {other or ''}", not other)
    bar.require(f"those of 8 bits and more say {KNOWN} {unknown or ''}", not unknown)
    bar.require(f"every tensor within what its type can hold {off or ''}", not off)


def made(original: Path, out: Path, type_name: str, method: str) -> str:
    """Returns the method that it was made with."""
    for each in (method,) if method else ("rtn", "imatrix"):
        request = prepared.Request(type_name, each, out, calibration_tokens=FEW_TOKENS)
        try:
            with prepared.prepare(original, request) as ready:
                prepared.write(ready)
                if ready.finished is not None:
                    ready.finished.remove()
                return each
        except UsageError as error:
            if "which weights matter" not in str(error):
                raise
    raise AssertionError(type_name)


def answer(path: Path) -> bytes:
    """What llama-cli says, without blanks around it."""
    command = [
        peer("llama-cli"), "-m", path, "-p", QUESTION, "-st", "--simple-io", "-n", ANSWER_TOKENS,
        "--temp", 0, "-t", 1, "-c", CONTEXT, "--no-warmup", "--log-verbosity", 0,
    ]  # fmt: skip
    done = subprocess.run(
        [str(each) for each in command], stdin=subprocess.DEVNULL, capture_output=True, timeout=300
    )
    if done.returncode != 0:
        return b""
    _, _, said = done.stdout.partition(b"> " + QUESTION.encode())
    said, _, _ = said.rpartition(b"[ Prompt: ")  # and how fast it was
    return said.strip()


def readable(said: bytes) -> str:
    return " ".join(said.decode(errors="replace").split())[:48]


def own_answer(path: Path) -> list[TokenLogprob]:
    """What our backend says, each token with the one that was likeliest beside it."""
    options = OpenOptions(
        model=str(path),
        kv_type_k="f16",
        kv_type_v="f16",
        context=CONTEXT,
        threads=1,
        threads_batch=1,
        speculate="off",
    )
    with LocalClient(options) as client:
        client.load()
        request = Request(
            messages=(Message("user", QUESTION),), max_tokens=ANSWER_TOKENS, sampling=GREEDY, logprobs=2
        )
        texts = [event for event in client.start(request).events() if isinstance(event, Text)]
    return [each for text in texts for each in text.logprobs]


def compared(theirs: bytes, ours: list[TokenLogprob]) -> tuple[str, bool]:
    """How many tokens two answers share, and whether they part, if they do, where two were nearly tied.

    Blanks around the answers are not compared.
    """
    said = b"".join(bytes(each.bytes) for each in ours)
    if said.strip() == theirs:
        return f"all {len(ours)}", True
    so_far = b""
    for shared, each in enumerate(ours):
        so_far += bytes(each.bytes)
        if not theirs.startswith(so_far.strip()):
            others = [logprob for token, logprob in each.top if token != each.token]
            gap = each.logprob - max(others)
            return f"{shared} of {len(ours)}, then {gap:.3f} nats", gap <= NEAR_TIE
    return f"all {len(ours)}, then they go on", False


def dequantized(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Each matrix's type and numbers, by name."""
    import gguf
    from gguf.quants import dequantize

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            numbers = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            found[tensor.name] = (tensor.tensor_type.name, numbers)
    return found


def worst(
    numbers: dict[str, tuple[str, np.ndarray]],
    found: dict[str, tuple[str, np.ndarray]],
    off: list[str],
    label: str,
) -> float:
    """The largest relative error; a line into `off` for each tensor whose type could do better."""
    largest = 0.0
    for name, (kind, own) in found.items():
        wanted = numbers[name][1].reshape(own.shape)
        error = float(np.sqrt(np.mean((own - wanted) ** 2) / np.mean(wanted**2)))
        largest = max(largest, error)
        if not error <= MOST_OFF.get(bits(kind), 0.001):
            off.append(f"{label}: {name} in {kind}: {error:.3f}")
    return largest


def bits(kind: str) -> int:
    """Of a code of a type; 16 or more of those that are not quantized."""
    if kind == "TQ2_0":
        return 1  # it stores two, and knows the same three numbers as TQ1_0
    digits = "".join(letter for letter in kind.removeprefix("BF").lstrip("IQTF") if letter.isdigit())
    return int(digits[:2]) if digits[:2] in ("16", "32") else int(digits[0])


def least_bits(found: dict[str, tuple[str, np.ndarray]]) -> int:
    return min(bits(kind) for kind, _ in found.values())


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="types, like q4_0,tq2_0; default: all")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
