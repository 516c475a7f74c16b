"""Unigram vocabularies, between tokenizer.json and GGUF, which calls them "t5" whatever the model. Their
tokens have log-probabilities, and the likeliest way to cut a text wins.

The two search alike, so the tokens of a text are the same as long as both find the same tokens in it and
price a character that is no token alike. tokenizer.json looks for every token of its list, also for the
special ones; llama.cpp for ordinary, user-defined and unused ones, and never for bytes. The price of an
unknown character is 10 below the least score, in one of all tokens, in the other of the ordinary ones.
Two things are said with a conversion and not refused: GGUF rounds scores to float32, which those of
SentencePiece are and those of the library's own training are not; and a table of characters is read in
two ways, of which llama.cpp's is SentencePiece's own.

Source: llm_tokenizer_ugm of llama-vocab.cpp (llama.cpp as packaged in llama-cpp-python 0.3.36),
tokenizers 0.23.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.normalization import (
    Normalization,
    checked_charsmap,
    normalization_from_hf,
)
from edgeinfer_models.conversion.vocabulary_tokens import (
    BYTE,
    CONTROL,
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
    other_tokens,
)
from edgeinfer_models.gguf_header import GgufHeader

_PENALTY = 10.0  # of a character that is no token
_LEAST_SCORE = -1e6  # far below any log-probability, and far enough above NO_SCORE
_ORDINARY = (NORMAL, USER_DEFINED)
_UNFOUND = ""  # a text that tokenizer.json's search never finds

# -- what is said with a conversion ----------------------------------------------------------------


def unigram_notes_to_gguf(definition: Mapping[str, Any], file: str) -> list[str]:
    """What llama.cpp does otherwise with a tokenizer.json that `unigram_to_gguf` takes, a line each.
    Raises as that does."""
    model, notes = definition["model"], []
    rounded = [piece.score for piece in _pieces(model, file)]
    if rounded != [score for _, score in list_of(model, "vocab", file)]:
        notes.append(
            "its tokens' scores are rounded to float32: of two ways to cut a word that are equally"
            " likely llama.cpp may take another than tokenizer.json"
        )
    if normalization_from_hf(definition, file)[0].charsmap:
        notes.append(_CHARSMAP_NOTE)
    return notes


def unigram_notes_to_hf(header: GgufHeader) -> list[str]:
    """What the tokenizers library does otherwise with what `unigram_to_hf` makes, a line each."""
    return [_CHARSMAP_NOTE] if header.get_length("tokenizer.ggml.precompiled_charsmap") else []


_CHARSMAP_NOTE = (
    "llama.cpp replaces characters by the longest match, as SentencePiece does, tokenizer.json by the"
    " whole letter a reader sees: emoji of several parts, loose accents and \\r\\n may give other tokens"
)

# -- to GGUF ---------------------------------------------------------------------------------------


def unigram_to_gguf(
    definition: Mapping[str, Any], vocab_size: int, file: str
) -> tuple[list[Token], dict[str, Any]]:
    """Tokens, and the metadata beside them. Raises ModelFileInvalid, UnsupportedModel (llama.cpp would
    read texts otherwise: the message says how)."""
    model = definition["model"]
    pieces = _pieces(model, file)
    unknown = model.get("unk_id")
    if type(unknown) is not int or not 0 <= unknown < len(pieces):
        raise UnsupportedModel(
            f"{file}: it has no token for unknown characters, which llama.cpp needs; use another model"
        )
    if model.get("byte_fallback") is True and any(is_byte(piece.text) for piece in pieces):
        raise UnsupportedModel(
            f"{file}: it reads unknown characters as bytes, where llama.cpp gives such a vocabulary the"
            " unknown token; run the folder itself, with --backend mlx"
        )
    if model.get("alpha") is not None:
        raise UnsupportedModel(f"{file}: it draws its tokens at random ('alpha'); take that key out")
    normalization, splits = normalization_from_hf(definition, file)
    added = added_tokens(definition, file)
    _check_added(added, pieces, definition.get("normalizer") is not None, file)
    given = {index: piece for index, piece in enumerate(pieces) if piece.text != _UNFOUND}
    tokens = complete(given, added, vocab_size, file)
    if tokens[unknown].kind == CONTROL:
        tokens[unknown] = replace(tokens[unknown], kind=UNKNOWN)
    if "ByteFallback" in json.dumps(definition.get("decoder")):
        tokens = _with_bytes(tokens, file)
    if splits:
        _check_splits(tokens, file)
    _check_scores(tokens, pieces, file)
    return tokens, {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [token.score for token in tokens],
        "tokenizer.ggml.unknown_token_id": unknown,
        **normalization.to_gguf(),
    }


def _pieces(model: Mapping[str, Any], file: str) -> list[Token]:
    found: list[Token] = []
    for pair in list_of(model, "vocab", file):
        proper = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        if not proper or type(pair[1]) not in (int, float) or not abs(pair[1]) < -_LEAST_SCORE:
            raise ModelFileInvalid(
                f"{file}: token {len(found):,} is not a text with a log-probability; download it again"
            )
        if "\0" in pair[0]:  # the end of a text to llama.cpp, which then gives it another
            raise other_tokens(file, f"its token {len(found):,} holds a NUL")
        found.append(Token(pair[0], NORMAL, _float32(pair[1])))
    return found


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def _check_added(
    added: Sequence[Mapping[str, Any]], pieces: Sequence[Token], normalizes: bool, file: str
) -> None:
    places = {piece.text: index for index, piece in enumerate(pieces)}
    for token in added:
        text = str(token.get("content"))
        if places.get(text, token["id"]) != token["id"] or (
            token["id"] < len(pieces) and text not in places
        ):
            raise ModelFileInvalid(
                f"{file}: the added token {text[:40]!r} has two ids; download it again"
            )
        strips = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key) is True]
        if token.get("normalized") is True and normalizes:
            strips.append("normalized")
        if SPACE in text and (token.get("special") or not _is_free(pieces, token["id"])):
            strips.append(SPACE)
        if strips:
            raise other_tokens(
                file, f"it looks for the added token {text[:40]!r} as GGUF cannot say ({strips[0]})"
            )


def _is_free(pieces: Sequence[Token], index: int) -> bool:
    """Whether a token costs nothing where the search finds it, as a user-defined one does in llama.cpp.
    One with a U+2581 is found by the search, where a text has a blank."""
    return index < len(pieces) and pieces[index].score == 0


def _with_bytes(tokens: Sequence[Token], file: str) -> list[Token]:
    """With those that stand for a byte marked, where no text is ever cut into them: llama.cpp looks for
    none of that kind."""
    least = _least_score([token for token in tokens if not is_byte(token.text)], file)
    letters = _letters_alone(tokens)
    return [
        replace(token, kind=BYTE)
        if is_byte(token.text) and token.score < least * len(token.text) and set(token.text) <= letters
        else token
        for token in tokens
    ]


def _check_splits(tokens: Sequence[Token], file: str) -> None:
    """A text that is cut in front of each U+2581 gives what it gives whole, if no token reaches over a
    cut and if no two unknown characters beside one become one."""
    found = [token for token in tokens if token.kind in _ORDINARY]
    inner = next((token.text for token in found if SPACE in token.text[1:]), None)
    if inner is not None or all(token.text != SPACE for token in found):
        what = f"its token {inner[:40]!r} reaches over them" if inner else f"it has no token {SPACE!r}"
        raise other_tokens(file, f"it cuts texts into words and {what}")


def _check_scores(tokens: Sequence[Token], pieces: Sequence[Token], file: str) -> None:
    least = _least_score(tokens, file)
    ordinary = [token for token in tokens if token.kind in _ORDINARY]
    if min(piece.score for piece in pieces) < least and not _is_closed(ordinary):
        raise other_tokens(file, "it prices unknown characters by a special token")


def _least_score(tokens: Iterable[Token], file: str) -> float:
    """By which llama.cpp prices an unknown character."""
    scores = [token.score for token in tokens if token.kind == NORMAL]
    if not scores:
        raise ModelFileInvalid(f"{file}: its vocabulary has no ordinary token; download it again")
    return min(scores)


def _is_closed(tokens: Iterable[Token]) -> bool:
    """Whether a character that is no token is in none: then each way to cut a text has the same unknown
    characters, and their price decides nothing."""
    texts = [token.text for token in tokens]
    return {letter for text in texts for letter in text} <= {text for text in texts if len(text) == 1}


def _letters_alone(tokens: Iterable[Token]) -> set[str]:
    return {token.text for token in tokens if token.kind == NORMAL and len(token.text) == 1}


# -- from GGUF -------------------------------------------------------------------------------------


def unigram_to_hf(header: GgufHeader, tokens: Sequence[Token]) -> dict[str, Any]:
    """A tokenizer.json, as yet without a post-processor. Raises ModelFileInvalid, UnsupportedModel (a
    vocabulary that the search of tokenizer.json would use otherwise)."""
    file = header.path.name
    unknown = header.get_int("tokenizer.ggml.unknown_token_id", 2)  # llama.cpp's own default
    if not 0 <= unknown < len(tokens):
        raise ModelFileInvalid(f"{file}: has no token for unknown characters; download it again")
    if not all(math.isfinite(token.score) for token in tokens):
        raise ModelFileInvalid(f"{file}: its tokens' scores are not finite; download it again")
    pieces = _searched(tokens, file)
    while pieces and pieces[-1].text == _UNFOUND:
        pieces.pop()
    charsmap = header.get_list("tokenizer.ggml.precompiled_charsmap")
    normalization = Normalization(
        checked_charsmap(bytes(int(unit) & 0xFF for unit in charsmap), file) if charsmap else b"",
        header.get("tokenizer.ggml.add_space_prefix", False) is True,
        header.get("tokenizer.ggml.remove_extra_whitespaces", False) is True,
    )
    model = {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[piece.text, piece.score] for piece in pieces],
        "byte_fallback": False,
    }
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalization.adds_prefix or normalization.merges_blanks:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        **definition_of(tokens, model),
        "normalizer": normalization.to_hf(),
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _searched(tokens: Sequence[Token], file: str) -> list[Token]:
    """The same tokens with such scores that a search for all of them finds what llama.cpp finds."""
    least = _least_score(tokens, file)
    unused = {token.text for token in tokens if token.kind == UNUSED and len(token.text) == 1}

    def is_used(token: Token) -> bool:
        # An unused one is, unless its letters, even unknown ones, are likelier than it.
        beaten = token.score < (least - _PENALTY) * len(token.text) and not unused & set(token.text)
        return token.kind in _ORDINARY or (token.kind == UNUSED and not beaten)

    is_closed = _is_closed(filter(is_used, tokens))
    letters = _letters_alone(tokens)
    found = []
    for token in tokens:
        if token.kind == USER_DEFINED:  # to llama.cpp, whatever its score
            found.append(replace(token, score=0.0))
        elif token.kind == NORMAL or (is_used(token) and (is_closed or token.score >= least)):
            found.append(token)
        elif token.kind in (CONTROL, UNKNOWN) and SPACE not in token.text:
            found.append(replace(token, score=max(token.score, least)))
        elif token.kind == BYTE and is_closed and set(token.text) <= letters:
            found.append(replace(token, score=least * len(token.text) - 1))
        elif token.kind in (CONTROL, UNKNOWN, BYTE) or is_used(token):
            raise UnsupportedModel(
                f"{file}: tokenizer.json would find its token {token.text[:40]!r} where llama.cpp does"
                " not; use the folder that the file was made from"
            )
        else:
            found.append(Token(_UNFOUND, UNUSED))
    return found
