"""Byte-level BPE, and SentencePiece's BPE, between tokenizer.json and GGUF metadata.

SentencePiece scores its tokens and merges the best pair first; tokenizer.json lists the merges in order.
A token's score is minus the place of the merge that makes it, and back: the pairs that make a token, by
its score. The two agree because all pairs of one token stand together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.pre_tokenizers import CUTS, Cuts, cuts_from_hf, name_of
from edgeinfer_models.conversion.vocabulary_tokens import (
    BYTE,
    NO_SCORE,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Token,
    added_tokens,
    complete,
    definition_of,
    is_byte,
    list_of,
    special_text,
    strings_of_gguf,
)
from edgeinfer_models.gguf_header import GgufHeader

# -- to GGUF ---------------------------------------------------------------------------------------


def bpe_to_gguf(
    definition: Mapping[str, Any], vocab_size: int, file: str
) -> tuple[list[Token], dict[str, Any]]:
    """Tokens, and the metadata beside them. Raises ModelFileInvalid, UnsupportedModel."""
    model = definition["model"]
    vocab, merges = _vocab_of(model, file), _merges_of(model, file)
    tokens = _tokens(vocab, definition, vocab_size, file)
    cuts = cuts_from_hf(definition)
    if cuts is not None:
        return tokens, {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name_of(cuts),
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        }
    if model.get("byte_fallback") is not True or not _is_sentencepiece(definition):
        raise UnsupportedModel(
            f"{file}: it cuts texts in a way that llama.cpp has no name for; use a .gguf of this"
            " model that its makers published"
        )
    tokens = _scored(tokens, merges)
    return tokens, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [token.score for token in tokens],
        "tokenizer.ggml.add_space_prefix": _adds_prefix(definition),
    }


def _vocab_of(model: Mapping[str, Any], file: str) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(
        type(index) is int and 0 <= index < 2**31 for index in vocab.values()
    ):
        raise ModelFileInvalid(f"{file}: has no proper vocabulary; download it again")
    return vocab


def _merges_of(model: Mapping[str, Any], file: str) -> list[tuple[str, str]]:
    """Older files write a merge as one text with a blank, newer ones as a pair."""
    found: list[tuple[str, str]] = []
    for merge in list_of(model, "merges", file):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise ModelFileInvalid(f"{file}: merge {len(found):,} is not a pair; download it again")
        if " " in pair[0] or " " in pair[1]:
            raise UnsupportedModel(f"{file}: merges of tokens with blanks cannot be converted yet")
        found.append((pair[0], pair[1]))
    return found


def _tokens(
    vocab: Mapping[str, int], definition: Mapping[str, Any], vocab_size: int, file: str
) -> list[Token]:
    texts: dict[int, Token] = {}
    model = definition["model"]
    unknown = model.get("unk_token")
    has_bytes = model.get("byte_fallback") is True
    for text, index in vocab.items():
        kind = NORMAL
        if has_bytes and text == unknown:
            kind = UNKNOWN
        elif has_bytes and is_byte(text):
            kind = BYTE
        texts[index] = Token(text, kind)
    return complete(texts, added_tokens(definition, file), vocab_size, file)


def _is_sentencepiece(definition: Mapping[str, Any]) -> bool:
    """Blanks become U+2581 and nothing is cut."""
    return SPACE in json.dumps(definition.get("normalizer"), ensure_ascii=False) or (
        SPACE in json.dumps(definition.get("pre_tokenizer"), ensure_ascii=False)
    )


def _adds_prefix(definition: Mapping[str, Any]) -> bool:
    normalizer = definition.get("normalizer")
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    if isinstance(parts, list) and any(
        isinstance(part, dict) and part.get("type") == "Prepend" for part in parts
    ):
        return True
    cutter = definition.get("pre_tokenizer")
    return isinstance(cutter, dict) and cutter.get("prepend_scheme") in ("always", "first")


def _scored(tokens: Sequence[Token], merges: Sequence[tuple[str, str]]) -> list[Token]:
    place: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        place.setdefault(left + right, index)
    return [
        Token(token.text, token.kind, -float(place[token.text]) if token.text in place else NO_SCORE)
        if token.kind == NORMAL
        else token
        for token in tokens
    ]


# -- from GGUF -------------------------------------------------------------------------------------


def byte_level_to_hf(header: GgufHeader, tokens: Sequence[Token]) -> dict[str, Any]:
    name = header.get_str("tokenizer.ggml.pre")
    cuts = CUTS.get(name)
    if cuts is None:
        raise UnsupportedModel(
            f"{header.path.name}: it cuts texts by '{name[:40]}', which cannot be converted yet"
        )
    pairs = [merge.partition(" ") for merge in strings_of_gguf(header, "tokenizer.ggml.merges")]
    merges = _merges_that_happen([(left, right) for left, _, right in pairs], tokens, header.path.name)
    model = _bpe(tokens, merges, cuts)
    return {
        **definition_of(tokens, model),
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": cuts.to_hf(),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
    }


def _merges_that_happen(
    merges: Sequence[tuple[str, str]], tokens: Sequence[Token], where: str
) -> Sequence[tuple[str, str]]:
    """Without those of parts that neither are tokens nor come about by other merges: llama.cpp never
    meets them, and the library refuses them. Raises UnsupportedModel where one does come about that the
    library could not have."""
    known = {token.text for token in tokens if token.kind != UNUSED}
    happen, reached = merges, set(known)
    while True:
        happen = [pair for pair in merges if all(len(part) == 1 or part in reached for part in pair)]
        made = {left + right for left, right in happen}
        if made <= reached:
            break
        reached |= made
    for left, right in happen:
        missing = [text for text in (left, right, left + right) if text not in known]
        if missing:
            raise UnsupportedModel(
                f"{where}: its merges make '{missing[0][:40]}', which is no token; such a vocabulary"
                " cannot be converted yet"
            )
    return happen


def _bpe(
    tokens: Sequence[Token],
    merges: Sequence[Sequence[str]],
    cuts: Cuts | None = None,
    unknown: str | None = None,
) -> dict[str, Any]:
    # The special ones too: the library gives those that it does not find here other ids.
    plain = {token.text: index for index, token in enumerate(tokens) if token.kind != UNUSED}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": cuts is None,
        "byte_fallback": cuts is None,
        "ignore_merges": cuts is not None and cuts.whole_words,
        "vocab": plain,
        "merges": [list(merge) for merge in merges],
    }


def sentencepiece_to_hf(header: GgufHeader, tokens: Sequence[Token]) -> dict[str, Any]:
    unknown = special_text(header, tokens, "unknown") or next(
        (token.text for token in tokens if token.kind == UNKNOWN), None
    )
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer: dict[str, Any] = replaced
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if header.get("tokenizer.ggml.add_space_prefix", True) is not False:
        prepend = {"type": "Prepend", "prepend": SPACE}
        normalizer = {"type": "Sequence", "normalizers": [prepend, replaced]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe(tokens, _merges_by_score(tokens), unknown=unknown)
    return {
        **definition_of(tokens, model),
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _merges_by_score(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best first. Of one token, in the order in which
    SentencePiece would meet them: the shorter left parts first."""
    scores = {token.text: token.score for token in tokens if token.kind in (NORMAL, USER_DEFINED)}
    found: list[tuple[float, int, str, str]] = []
    for index, token in enumerate(tokens):
        if token.kind != NORMAL or len(token.text) < 2:
            continue
        for cut in range(1, len(token.text)):
            left, right = token.text[:cut], token.text[cut:]
            if left in scores and right in scores:
                found.append((-token.score, index, left, right))
    found.sort(key=lambda each: each[:2])
    return [(left, right) for _, _, left, right in found]
