"""How a byte-level BPE cuts a text into words before it merges: GGUF has a name for it, tokenizer.json
the rules themselves.

Source: the patterns of llama-vocab.cpp (llama.cpp as packaged in llama-cpp-python 0.3.36) and of the
tokenizer.json files they were made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_SUFFIXES}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_SUFFIXES}|{_WORDS}|\p{{N}}|{_REST}"
TEKKEN = rf"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}"
GPT4O = (
    rf"{_CASED}{_UPPER}*{_LOWER}+{_SUFFIXES}?|{_CASED}{_UPPER}+{_LOWER}*{_SUFFIXES}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHES}"
)


@dataclass(frozen=True)
class Cuts:
    """pattern: by a regular expression; "": by GPT-2's own. digits: each digit for itself first.
    whole_words: a word that is a token is not merged from its parts (`ignore_merges`)."""

    pattern: str = ""
    digits: bool = False
    whole_words: bool = False

    def to_hf(self) -> dict[str, Any]:
        """`pre_tokenizer` of a tokenizer.json."""
        parts: list[dict[str, Any]] = []
        if self.digits:
            parts.append({"type": "Digits", "individual_digits": True})
        if self.pattern:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated"}
            parts.append({**split, "invert": False})
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        parts.append({**last, "use_regex": not self.pattern})
        return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


# tokenizer.ggml.pre -> cuts. The first of those that cut alike is the one that is written.
CUTS: dict[str, Cuts] = {
    "gpt-2": Cuts(),
    "smollm": Cuts(digits=True),
    "llama-bpe": Cuts(LLAMA3, whole_words=True),
    "dbrx": Cuts(LLAMA3),
    "qwen2": Cuts(QWEN2),
    "tekken": Cuts(TEKKEN, whole_words=True),
    "gpt-4o": Cuts(GPT4O),
    # Others' names for the same.
    "phi-2": Cuts(),
    "olmo": Cuts(),
    "mpt": Cuts(),
    "refact": Cuts(digits=True),
    "starcoder": Cuts(digits=True),
    "command-r": Cuts(digits=True),
    "codeshell": Cuts(digits=True),
    "exaone": Cuts(digits=True),
    "llama3": Cuts(LLAMA3, whole_words=True),
    "llama-v3": Cuts(LLAMA3, whole_words=True),
    "falcon3": Cuts(LLAMA3, whole_words=True),
    "pixtral": Cuts(LLAMA3, whole_words=True),
    "smaug-bpe": Cuts(LLAMA3),
    "deepseek-r1-qwen": Cuts(QWEN2),
    "stablelm2": Cuts(QWEN2),
    "llama4": Cuts(GPT4O),
}


def cuts_from_hf(definition: Mapping[str, Any]) -> Cuts | None:
    """Of a tokenizer.json; None where it cuts in a way that has no name in CUTS."""
    outer = definition.get("pre_tokenizer")
    model = definition.get("model")
    if not isinstance(outer, dict) or not isinstance(model, dict):
        return None
    parts = outer.get("pretokenizers") if outer.get("type") == "Sequence" else [outer]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    pattern, digits, uses_own = "", False, False
    for index, part in enumerate(parts):
        kind, is_last = part.get("type"), index == len(parts) - 1
        if kind == "Digits" and part.get("individual_digits") is True and index == 0:
            digits = True
        elif kind == "Split" and _is_plain_split(part) and not pattern:
            pattern = part["pattern"]["Regex"]
        elif kind == "ByteLevel" and is_last and not part.get("add_prefix_space"):
            uses_own = part.get("use_regex", True) is not False
        else:
            return None
    if bool(pattern) == uses_own:
        return None
    found = Cuts(pattern, digits, whole_words=model.get("ignore_merges") is True)
    return found if name_of(found) else None


def name_of(cuts: Cuts) -> str:
    """tokenizer.ggml.pre; "" where there is none."""
    return next((name for name, known in CUTS.items() if known == cuts), "")


def _is_plain_split(part: Mapping[str, Any]) -> bool:
    pattern = part.get("pattern")
    return (
        isinstance(pattern, dict)
        and isinstance(pattern.get("Regex"), str)
        and part.get("behavior") in ("Isolated", "Removed")
        and (part.get("behavior") == "Isolated") != bool(part.get("invert"))
    )
