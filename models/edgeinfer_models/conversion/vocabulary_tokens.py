"""The tokens of a vocabulary, from tokenizer.json and from GGUF metadata, and the frame of a
tokenizer.json around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.gguf_format import GgufArray, iter_strings
from edgeinfer_models.gguf_header import GgufHeader

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's
NO_SCORE = -1e9  # of a token that no text is to be cut into


@dataclass(frozen=True)
class Token:
    text: str
    kind: int
    score: float = 0.0


def other_tokens(file: str, why: str) -> UnsupportedModel:
    """For a tokenizer.json that GGUF cannot say: `why` is what it does otherwise than llama.cpp."""
    return UnsupportedModel(
        f"{file}: {why}, so llama.cpp would give other tokens; use a .gguf of this model that its makers"
        " published"
    )


# -- tokenizer.json --------------------------------------------------------------------------------


def added_tokens(definition: Mapping[str, Any], file: str) -> list[Mapping[str, Any]]:
    """Raises ModelFileInvalid."""
    found = list_of(definition, "added_tokens", file)
    for added in found:
        if not isinstance(added, dict) or type(added.get("id")) is not int or added["id"] < 0:
            raise ModelFileInvalid(f"{file}: an added token has no proper id; download it again")
    return found


def complete(
    tokens: dict[int, Token], added: Sequence[Mapping[str, Any]], vocab_size: int, file: str
) -> list[Token]:
    """With the added tokens, and a token without use for each row of the embedding that has none.
    Raises ModelFileInvalid: more tokens than rows, or one text twice, which llama.cpp does not load."""
    for each in added:
        before = tokens.get(each["id"], Token("", NORMAL))
        if before.kind != UNKNOWN:
            kind = CONTROL if each.get("special") else USER_DEFINED
            tokens[each["id"]] = replace(before, text=str(each.get("content")), kind=kind)
    largest = max(tokens, default=-1)
    if largest >= vocab_size:
        raise ModelFileInvalid(
            f"{file}: has a token {largest:,} where the model has embeddings for {vocab_size:,}; it is"
            " another model's"
        )
    found = [tokens.get(index, Token(f"[PAD{index}]", UNUSED, NO_SCORE)) for index in range(vocab_size)]
    places: dict[str, int] = {}
    for index, token in enumerate(found):
        first = places.setdefault(token.text, index)
        if first != index:
            raise ModelFileInvalid(
                f"{file}: tokens {first:,} and {index:,} have the same text {token.text[:40]!r};"
                " download it again"
            )
    return found


def list_of(table: Mapping[str, Any], key: str, file: str) -> list[Any]:
    """Raises ModelFileInvalid."""
    value = table.get(key)
    if value is not None and not isinstance(value, list):
        raise ModelFileInvalid(f"{file}: '{key}' is no list; download it again")
    return value or []


def is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def definition_of(tokens: Sequence[Token], model: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json, as yet without what it does to a text before and after `model`."""
    added = [
        {
            "id": index,
            "content": token.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token.kind != USER_DEFINED,
        }
        for index, token in enumerate(tokens)
        if token.kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        "model": model,
    }


# -- GGUF ------------------------------------------------------------------------------------------


def tokens_of_gguf(header: GgufHeader) -> list[Token]:
    texts = strings_of_gguf(header, "tokenizer.ggml.tokens")
    kinds = _numbers(header, "tokenizer.ggml.token_type", len(texts), NORMAL)
    scores = _numbers(header, "tokenizer.ggml.scores", len(texts), 0.0)
    return [
        Token(text, int(kind), float(score))
        for text, kind, score in zip(texts, kinds, scores, strict=True)
    ]


def strings_of_gguf(header: GgufHeader, key: str) -> list[str]:
    value = header.get(key)
    if isinstance(value, GgufArray):
        return [
            each.decode("utf-8", "replace") for each in iter_strings(value.read_bytes(), value.length)
        ]
    return [str(each) for each in value] if isinstance(value, list) else []


def special_text(header: GgufHeader, tokens: Sequence[Token], name: str) -> str:
    index = header.get_int(f"tokenizer.ggml.{name}_token_id", -1)
    return tokens[index].text if 0 <= index < len(tokens) else ""


def _numbers(header: GgufHeader, key: str, count: int, default: float) -> Sequence[float]:
    found = header.get_list(key)
    return [default] * count if found is None else [float(each) for each in found]
