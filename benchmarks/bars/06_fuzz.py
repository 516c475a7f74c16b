"""100,000 damaged models through the readers and the conversion: each is converted, or refused.

Half are GGUF files made into a folder, half Hugging Face folders made into a GGUF file: bits flipped,
bytes overwritten, cut and doubled in the weights, their header, config.json and tokenizer.json, and
values of the JSON files replaced by awkward ones. Nothing may be left of what was refused; no process
may die, and none may hang. Two processes, each with its half.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.mutations import AWKWARD, Mutator
from benchmarks.verdict import Bar, run_bar
from edgeinfer.errors import EdgeInferError
from edgeinfer.quantize.conversion import convert, plan_conversion
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf

CASES = 100_000
ODD: tuple[Any, ...] = (None, True, -1, 0, 1, 2.5, "", "x", [], [None], {}, {"a": []}, 1e400, *AWKWARD)


def measure(bar: Bar) -> None:
    halves = []
    for which in ("gguf", "folder"):
        command = [sys.executable, __file__, "--worker", which, "--cases", str(bar.options.cases // 2)]
        halves.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for process in halves:
        out, _ = process.communicate(timeout=6 * 3600)
        found = json.loads(out) if process.returncode == 0 else {"died": process.returncode}
        bar.details[str(found.get("which"))] = found
        counts = found.get("counts", {})
        bar.say(f"  {found.get('which')}: {counts}")
        bad = found.get("bad", [f"the process ended with {process.returncode}"])
        for line in bad[:5]:
            bar.say(f"    {line}")
        bar.require(f"{found.get('which')}: {sum(counts.values())} cases, {len(bad)} bad", not bad)


def worker(which: str, cases: int) -> None:
    counts: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        case = gguf_cases(place) if which == "gguf" else folder_cases(place)
        for number in range(cases):
            path, to = case(number)
            out = place / "out"
            try:
                read = source_of_gguf if which == "gguf" else source_of_folder
                convert(plan_conversion(read(path), path, to, "f32", out, force=False))  # type: ignore[arg-type]
                counts["converted"] += 1
                shutil.rmtree(out) if out.is_dir() else out.unlink()
            except EdgeInferError as error:
                counts[type(error).__name__] += 1
                if "\n" in str(error) or len(str(error)) > 500:
                    bad.append(f"case {number}: not one line: {str(error)[:200]!r}")
                if out.exists():
                    bad.append(f"case {number}: something is left")
                    shutil.rmtree(out) if out.is_dir() else out.unlink()
            except Exception as error:  # the point of it all
                counts["UNEXPECTED"] += 1
                bad.append(f"case {number}: {type(error).__name__}: {str(error)[:200]}")
    print(json.dumps({"which": which, "counts": counts, "bad": bad[:100]}))


Case = Callable[[int], tuple[Path, str]]


def gguf_cases(place: Path) -> Case:
    from tests.fixtures_gguf import write_tiny_gguf
    from tests.fixtures_hf import unigram_definition, write_tiny_folder

    sound = [
        write_tiny_gguf(place / f"{arch}.gguf", arch=arch, layers=1, hidden=32, feed_forward=32)  # type: ignore[arg-type]
        for arch in ("llama", "qwen3", "gemma3")
    ]
    unigram = write_tiny_folder(
        place / "unigram", layers=1, hidden=32, feed_forward=32, tokenizer=unigram_definition()
    )
    sound.append(place / "unigram.gguf")
    convert(plan_conversion(source_of_folder(unigram), unigram, "gguf", "f32", sound[-1], force=False))
    mutators = [Mutator(path.read_bytes(), seed=6) for path in sound]

    def case(number: int) -> tuple[Path, str]:
        _, data = mutators[number % len(mutators)].mutate(number)
        path = place / "damaged.gguf"
        path.write_bytes(data)
        return path, "safetensors"

    return case


def folder_cases(place: Path) -> Case:
    from tests.fixtures_hf import unigram_definition, write_tiny_folder

    kinds: tuple[Any, ...] = ("llama", "qwen2", "qwen3")
    sound = [
        write_tiny_folder(place / kind, model_type=kind, layers=1, hidden=32, feed_forward=32)
        for kind in kinds
    ]
    sound.append(
        write_tiny_folder(
            place / "unigram", layers=1, hidden=32, feed_forward=32, tokenizer=unigram_definition()
        )
    )
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    folder = place / "damaged"
    folder.mkdir()

    def case(number: int) -> tuple[Path, str]:
        draw = random.Random(number)
        model, damaged = sound[number % len(sound)], draw.choice(names)
        for name in names:
            data = (model / name).read_bytes()
            if name == damaged:
                is_json = name.endswith(".json") and draw.random() < 0.7
                data = odd_json(data, draw) if is_json else damaged_bytes(data, draw)
            (folder / name).write_bytes(data)
        return folder, "gguf"

    return case


def odd_json(data: bytes, draw: random.Random) -> bytes:
    """One value, at any depth, replaced or taken out."""
    value = json.loads(data)
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw.choice(keys)
        inner = at[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            at = inner
            continue
        if draw.random() < 0.2:
            del at[key]
        else:
            at[key] = draw.choice(ODD)
        return json.dumps(value).encode()


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        kind, at = (
            draw.randrange(4),
            draw.randrange(min(len(found), draw.choice((64, 4096, len(found))))),
        )
        if kind == 0:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[at] = draw.randrange(256)
        elif kind == 2:
            del found[at : at + draw.randint(1, 64)]
        else:
            found[at:at] = found[at : at + draw.randint(1, 64)]
        if len(found) < 2:
            break
    return bytes(found)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=CASES)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        options = argparse.ArgumentParser()
        options.add_argument("--worker", required=True)
        options.add_argument("--cases", type=int, required=True)
        chosen = options.parse_args()
        worker(chosen.worker, chosen.cases)
        sys.exit(0)
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
