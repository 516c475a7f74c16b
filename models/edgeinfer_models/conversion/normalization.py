"""What happens to a text before a Unigram vocabulary cuts it: GGUF has three keys for it, tokenizer.json
a normalizer and a pre_tokenizer.

llama.cpp, as SentencePiece does, replaces what its table of characters says and then makes each blank a
U+2581. Here are the ways of tokenizer.json that come to the same for every text between two special
tokens, blanks alone and blanks at its ends included; all others are refused. Three things aside: a text
that holds U+2581 itself, one that a table of characters makes into a special token's text, and that
table, which the tokenizers library applies to whole grapheme clusters, llama.cpp to the longest match.

Source: llm_tokenizer_ugm of llama-vocab.cpp (llama.cpp as packaged in llama-cpp-python 0.3.36),
tokenizers 0.23 and the converters of transformers 5.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.conversion.vocabulary_tokens import SPACE, other_tokens


@dataclass(frozen=True)
class Normalization:
    """charsmap: SentencePiece's compiled table of characters, b"" for none. adds_prefix: a U+2581 more
    in front of a text that is not all blanks. merges_blanks: words are what stands between blanks, each
    with one U+2581 in front, the first too."""

    charsmap: bytes = b""
    adds_prefix: bool = False
    merges_blanks: bool = False

    def to_gguf(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tokenizer.ggml.add_space_prefix": self.adds_prefix,
            "tokenizer.ggml.remove_extra_whitespaces": self.merges_blanks,
        }
        if self.charsmap:
            found["tokenizer.ggml.precompiled_charsmap"] = self.charsmap
        return found

    def to_hf(self) -> dict[str, Any]:
        """`normalizer` of a tokenizer.json that has no pre_tokenizer."""
        steps = _MERGED if self.merges_blanks else _PREFIXED if self.adds_prefix else _PLAIN
        if self.charsmap:
            text = base64.b64encode(self.charsmap).decode()
            steps = ({"type": "Precompiled", "precompiled_charsmap": text}, *steps)
        return {"type": "Sequence", "normalizers": list(steps)}


def _replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


_Steps = tuple[dict[str, Any], ...]
_BLANKS: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_PLAIN: _Steps = (_BLANKS,)
_PREFIXED: _Steps = (_replaced(r"\A(?= *[^ ])", SPACE), _BLANKS)
_MERGED: _Steps = (_replaced(r"\A +| +\z", ""), _replaced(" +", SPACE), _PREPEND)
# As transformers makes it of SentencePiece's files, in front of a Metaspace that always adds its blank.
_STRIPPED: _Steps = (
    {"type": "Strip", "strip_left": False, "strip_right": True},
    _replaced(" {2,}", SPACE),
)
# U+0085 aside, which no table of SentencePiece's replaces.
_WHITESPACE = "\t\n\v\f\r\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(8192, 8203)))


def normalization_from_hf(definition: Mapping[str, Any], file: str) -> tuple[Normalization, bool]:
    """Of a tokenizer.json; and whether it cuts a text in front of each U+2581. Raises UnsupportedModel
    (llama.cpp would read texts otherwise: the message says how), ModelFileInvalid."""
    steps = _steps(definition.get("normalizer"), "normalizers")
    charsmap = b""
    if steps and steps[0].get("type") == "Precompiled":
        charsmap = _charsmap(steps[0], file)
        steps = steps[1:]
    cutters = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    if len(cutters) > 1 or any(part.get("type") != "Metaspace" for part in cutters):
        raise other_tokens(file, f"its pre_tokenizer ({_names(cutters)}) cuts texts as GGUF cannot say")
    if not cutters:
        for known, (prefix, merged) in {
            _key(_PLAIN): (False, False),
            _key(_PREFIXED): (True, False),
            _key(_MERGED): (True, True),
        }.items():
            if _key(steps) == known:
                return Normalization(charsmap, prefix, merged), False
        if _key(steps) in (_key((_PREPEND, _BLANKS)), _key((_BLANKS, _PREPEND))):
            raise other_tokens(file, "it puts a blank in front of blanks alone too")
        raise other_tokens(file, f"its normalizer ({_names(steps)}) changes texts as GGUF cannot say")
    return _with_metaspace(cutters[0], steps, charsmap, file)


def _with_metaspace(
    cutter: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], charsmap: bytes, file: str
) -> tuple[Normalization, bool]:
    scheme = cutter.get("prepend_scheme", "always")
    if cutter.get("replacement") != SPACE or scheme not in ("always", "first", "never"):
        raise other_tokens(file, "its Metaspace is none of SentencePiece's")
    splits = cutter.get("split", True) is not False
    if scheme == "first":
        raise other_tokens(file, "it puts a blank at a text's start and none after special tokens")
    if scheme == "never" and _key(steps) in ("[]", _key(_PLAIN)):
        return Normalization(charsmap), splits
    if scheme == "always" and _key(steps) == _key(_STRIPPED):
        kept = [char for char in _WHITESPACE if _replacement(charsmap, char, file).strip(" ")]
        if kept:
            raise other_tokens(file, f"it strips U+{ord(kept[0]):04X} from a text's end")
        return Normalization(charsmap, adds_prefix=True, merges_blanks=True), splits
    if scheme == "always" and _key(steps) in ("[]", _key(_PLAIN)):
        raise other_tokens(file, "it puts no blank in front of a text that begins with one")
    raise other_tokens(file, f"its normalizer ({_names(steps)}) changes texts as GGUF cannot say")


def _steps(value: Any, inner: str) -> list[Mapping[str, Any]]:
    """Sequences within sequences, flat."""
    found: list[Mapping[str, Any]] = []
    waiting = [value]
    while waiting:
        step = waiting.pop()
        parts = step.get(inner) if isinstance(step, dict) and step.get("type") == "Sequence" else None
        if isinstance(parts, list):
            waiting += reversed(parts)
        elif isinstance(step, dict):
            found.append(step)
    return found


def _key(steps: Sequence[Mapping[str, Any]]) -> str:
    """The same for steps that do the same: a blank as text or as a pattern."""
    return json.dumps(list(steps), sort_keys=True).replace('{"Regex": " "}', '{"String": " "}')


def _names(steps: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(step.get("type"))[:40] for step in steps) or "none"


# -- the table of characters -----------------------------------------------------------------------


def _charsmap(step: Mapping[str, Any], file: str) -> bytes:
    try:
        found = base64.b64decode(step["precompiled_charsmap"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise _damaged(file) from None
    return checked_charsmap(found, file)


def checked_charsmap(charsmap: bytes, file: str) -> bytes:
    """Itself. Raises ModelFileInvalid if its parts have not the sizes that its first word says."""
    trie_bytes = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or trie_bytes % 4 or trie_bytes == 0 or 4 + trie_bytes >= len(charsmap):
        raise _damaged(file)
    return charsmap


def _replacement(charsmap: bytes, char: str, file: str) -> str:
    """What the table makes of one character. The table is a double array (darts-clone's): a node's
    child for a byte lies at the node's offset xor the byte."""
    if not charsmap:
        return char
    (trie_bytes,) = struct.unpack_from("<I", charsmap)
    try:
        at = _offset(_unit(charsmap, 0))
        has_value = False
        for byte in char.encode():
            at ^= byte
            unit = _unit(charsmap, at)
            if unit & 0x8000_00FF != byte:
                return char
            has_value = bool(unit >> 8 & 1)
            at ^= _offset(unit)
        if not has_value:
            return char
        start = 4 + trie_bytes + (_unit(charsmap, at) & 0x7FFF_FFFF)
        return charsmap[start : charsmap.index(0, start)].decode()
    except (IndexError, ValueError):
        raise _damaged(file) from None


def _unit(charsmap: bytes, index: int) -> int:
    (trie_bytes,) = struct.unpack_from("<I", charsmap)
    if index >= trie_bytes // 4:
        raise IndexError(index)
    (unit,) = struct.unpack_from("<I", charsmap, 4 + 4 * index)
    return int(unit)


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


def _damaged(file: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"{file}: its precompiled_charsmap is damaged; download it again")
