"""10,000 varied strings: the tokenizer.json made of a GGUF file gives the ids that llama.cpp gives.

Code, prose of many scripts, emoji, runs of blanks, control characters and special tokens in texts; the
starter's byte-level vocabulary and Gemma 3's SentencePiece one.

Left out, and counted, are strings with a byte that the vocabulary has no token for: llama.cpp ends a
merge there, the tokenizers library drops the byte first and merges over the gap, whatever the file says.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.model_files import gemma, starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings
from edgeinfer.measure.texts import measured_text
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.model import source_of_gguf
from edgeinfer_models.conversion.vocabulary_tokens import CONTROL, UNKNOWN, USER_DEFINED
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
        compared, differing = compare(bar, name, path)
        bar.require(
            f"{name}: {differing} of {compared:,} strings differ", differing == 0 and compared > 0
        )


def compare(bar: Bar, name: str, path: Path) -> tuple[int, int]:
    """How many strings were compared, and how many of them differ."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(source_of_gguf(path).hf_files()["tokenizer.json"])
    has_gap = _gap_finder(made)
    files = ModelFiles(name, (path,), "gguf")
    runtime = get_backend("llamacpp").load(files, RuntimeSettings(context=64), lambda _: True)
    own = runtime.tokenizer
    special = _sought(path)
    compared = left_out = differing = 0
    for text in strings(bar.options.strings, special):
        if has_gap(text):
            left_out += 1
            continue
        compared += 1
        expected = own.encode(text, add_special=False, parse_special=True)
        found = made.encode(text, add_special_tokens=False).ids
        if found != expected:
            differing += 1
            if differing <= 5:
                bar.say(f"  {text!r}: {found[:12]} not {expected[:12]}")
    runtime.close()
    if left_out:
        bar.say(f"  {name}: {left_out:,} strings left out, which have a byte that has no token")
    return compared, differing


def _sought(path: Path) -> list[str]:
    """Some of the tokens that are looked for before a text is cut: special, unknown, user-defined."""
    header = read_gguf_model(path)
    texts = header.get_list("tokenizer.ggml.tokens") or []
    kinds = header.get_list("tokenizer.ggml.token_type") or []
    return [
        str(text)
        for kind in (CONTROL, UNKNOWN, USER_DEFINED)
        for text in [text for text, own in zip(texts, kinds, strict=True) if own == kind][:40]
    ]


def _gap_finder(tokenizer: Tokenizer) -> Callable[[str], bool]:
    """Whether a text has a byte that the vocabulary has no token for. One of SentencePiece's kind has
    all of them: llama.cpp loads no other."""
    from tokenizers import pre_tokenizers

    definition = json.loads(tokenizer.to_str())
    if "ByteLevel" not in json.dumps(definition["pre_tokenizer"]):
        return lambda text: False
    known = set(tokenizer.get_vocab())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda text: any(
        letter not in known for word, _ in spelled.pre_tokenize_str(text) for letter in word
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--without-gemma", action="store_true", help="its terms are not everybody's")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
