"""10,000 varied strings: the tokenizer.json made of a GGUF file gives the ids that llama.cpp gives.

Code, prose of many scripts, emoji, runs of blanks, control characters and special tokens in texts; the
starter's byte-level vocabulary and Gemma 3's SentencePiece one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.model_files import gemma, starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings
from edgeinfer.measure.texts import measured_text
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.model import source_of_gguf
from edgeinfer_models.model_files import ModelFiles

SCRIPTS = (
    "Příliš žluťoučký kůň úpěl ďábelské ódy. ",
    "日本語の文章と漢字、カタカナもあります。",
    "这是一个中文句子，里面有标点。",
    "한국어 문장입니다. ",
    "Съешь же ещё этих мягких французских булок. ",
    "نص عربي قصير للتجربة. ",
    "देवनागरी लिपि में एक वाक्य। ",
    "ข้อความภาษาไทย",
    "Ελληνικά γράμματα και τόνοι. ",
    "טקסט בעברית. ",
)
EMOJI = ("🦙", "👩‍👩‍👧", "🏔️", "🇨🇭", "1️⃣", "👍🏽", "\u200d", "\ufe0f")
BLANKS = (" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "   \n\n   ")
NUMBERS = ("0", "12", "345", "6789", "3.14159", "1e-5", "0x7f", "1,000,000", "²", "½", "٣", "Ⅷ")
SUFFIXES = ("'s", "'S", "'ll", "'LL", "don't", "I'VE", "’s")


def strings(count: int, special: Sequence[str]) -> list[str]:
    draw = random.Random(6)
    prose = measured_text(None)
    code = Path(random.__file__).read_text()
    kinds: list[Callable[[], str]] = [
        lambda: _piece(draw, prose),
        lambda: _piece(draw, code),
        lambda: _piece(draw, draw.choice(SCRIPTS)),
        lambda: draw.choice(EMOJI),
        lambda: draw.choice(BLANKS) * draw.randint(1, 5),
        lambda: draw.choice(NUMBERS),
        lambda: draw.choice(SUFFIXES),
        lambda: draw.choice(special),
        lambda: chr(draw.choice((draw.randint(1, 0x2FF), draw.randint(0x370, 0xD7FF)))),
    ]
    return ["".join(draw.choice(kinds)() for _ in range(draw.randint(1, 12))) for _ in range(count)]


def _piece(draw: random.Random, text: str) -> str:
    start = draw.randrange(max(1, len(text) - 40))
    return text[start : start + draw.randint(1, 40)]


def measure(bar: Bar) -> None:
    models = {"starter": starter()}
    if not bar.options.without_gemma:
        models["Gemma 3 270M"] = gemma()
    for name, path in models.items():
        differing = compare(bar, name, path)
        bar.require(f"{name}: {differing} of {bar.options.strings} strings differ", differing == 0)


def compare(bar: Bar, name: str, path: Path) -> int:
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for file, text in source_of_gguf(path).hf_files().items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        made = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    files = ModelFiles(name, (path,), "gguf")
    runtime = get_backend("llamacpp").load(files, RuntimeSettings(context=64), lambda _: True)
    own = runtime.tokenizer
    special = [own.text(token) for token in range(own.vocab_size) if own.is_control(token)][:40]
    differing = 0
    for text in strings(bar.options.strings, special):
        expected = own.encode(text, add_special=False, parse_special=True)
        found = made.encode(text, add_special_tokens=False).ids
        if found != expected:
            differing += 1
            if differing <= 5:
                bar.say(f"  {text!r}: {found[:12]} not {expected[:12]}")
    runtime.close()
    return differing


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--without-gemma", action="store_true", help="its terms are not everybody's")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
