"""A vocabulary between tokenizer.json and GGUF metadata: byte-level BPE, and SentencePiece's BPE.

    metadata = vocabulary_to_gguf(folder, vocab_size)      # tokenizer.ggml.*
    files = vocabulary_to_hf(header)                       # tokenizer.json, tokenizer_config.json …

SentencePiece scores its tokens and merges the best pair first; tokenizer.json lists the merges in order.
A token's score is minus the place of the merge that makes it, and back: the pairs that make a token, by
its score. The two agree because all pairs of one token stand together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.pre_tokenizers import CUTS, Cuts, cuts_from_hf, name_of
from edgeinfer_models.gguf_format import GgufArray, iter_strings
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.safetensors_header import read_json
from edgeinfer_models.tokenizer_config import read_tokenizer_config

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's
_NO_SCORE = -1e9  # of a token that no merge makes


@dataclass(frozen=True)
class _Token:
    text: str
    kind: int
    score: float = 0.0


# -- to GGUF ---------------------------------------------------------------------------------------


def vocabulary_to_gguf(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Metadata with whole keys. vocab_size: the embedding's rows. Raises ModelFileInvalid (the tokenizer
    is of another model), UnsupportedModel (a kind of tokenizer that llama.cpp would read otherwise)."""
    path = folder / "tokenizer.json"
    definition = read_json(path)
    model = definition.get("model")
    if not isinstance(model, dict):
        raise ModelFileInvalid(f"{path.name}: has no 'model'; download it again")
    if model.get("type") not in ("BPE", None):
        raise UnsupportedModel(
            f"{path.name}: a tokenizer of the type {str(model.get('type'))[:40]} cannot be converted yet"
        )
    vocab, merges = _vocab_of(model, path.name), _merges_of(model, path.name)
    tokens = _tokens(vocab, definition, vocab_size, path.name)
    cuts = cuts_from_hf(definition)
    if cuts is not None:
        found: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name_of(cuts),
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        }
    elif model.get("byte_fallback") is True and _is_sentencepiece(definition):
        tokens = _scored(tokens, merges)
        found = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [token.score for token in tokens],
            "tokenizer.ggml.add_space_prefix": _adds_prefix(definition),
        }
    else:
        raise UnsupportedModel(
            f"{path.name}: it cuts texts in a way that llama.cpp has no name for; use a .gguf of this"
            " model that its makers published"
        )
    found["tokenizer.ggml.tokens"] = [token.text for token in tokens]
    found["tokenizer.ggml.token_type"] = [token.kind for token in tokens]
    return {**found, **_special(folder, definition, tokens)}


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
    for merge in _list(model, "merges", file):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise ModelFileInvalid(f"{file}: merge {len(found):,} is not a pair; download it again")
        if " " in pair[0] or " " in pair[1]:
            raise UnsupportedModel(f"{file}: merges of tokens with blanks cannot be converted yet")
        found.append((pair[0], pair[1]))
    return found


def _tokens(
    vocab: Mapping[str, int], definition: Mapping[str, Any], vocab_size: int, file: str
) -> list[_Token]:
    texts: dict[int, _Token] = {}
    model = definition["model"]
    unknown = model.get("unk_token")
    has_bytes = model.get("byte_fallback") is True
    for text, index in vocab.items():
        kind = NORMAL
        if has_bytes and text == unknown:
            kind = UNKNOWN
        elif has_bytes and _is_byte(text):
            kind = BYTE
        texts[index] = _Token(text, kind)
    for added in _list(definition, "added_tokens", file):
        if not isinstance(added, dict) or type(added.get("id")) is not int:
            raise ModelFileInvalid(f"{file}: an added token has no proper id; download it again")
        if texts.get(added["id"], _Token("", NORMAL)).kind != UNKNOWN:
            kind = CONTROL if added.get("special") else USER_DEFINED
            texts[added["id"]] = _Token(str(added.get("content")), kind)
    largest = max(texts, default=-1)
    if largest >= vocab_size:
        raise ModelFileInvalid(
            f"{file}: has a token {largest:,} where the model has embeddings for {vocab_size:,}; it is"
            " another model's"
        )
    return [texts.get(index, _Token(f"[PAD{index}]", UNUSED)) for index in range(vocab_size)]


def _list(table: Mapping[str, Any], key: str, file: str) -> list[Any]:
    value = table.get(key)
    if value is not None and not isinstance(value, list):
        raise ModelFileInvalid(f"{file}: '{key}' is no list; download it again")
    return value or []


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


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


def _scored(tokens: Sequence[_Token], merges: Sequence[tuple[str, str]]) -> list[_Token]:
    place: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        place.setdefault(left + right, index)
    return [
        _Token(token.text, token.kind, -float(place[token.text]) if token.text in place else _NO_SCORE)
        if token.kind == NORMAL
        else token
        for token in tokens
    ]


def _special(folder: Path, definition: Mapping[str, Any], tokens: Sequence[_Token]) -> dict[str, Any]:
    config = read_tokenizer_config(folder)
    ids = {token.text: index for index, token in reversed(list(enumerate(tokens)))}
    found: dict[str, Any] = {}
    if config.bos in ids:
        found["tokenizer.ggml.bos_token_id"] = ids[config.bos]
    ends = [ids[config.eos]] if config.eos in ids else []
    ends += [token for token in config.eos_ids if token < len(tokens)]
    if ends:
        found["tokenizer.ggml.eos_token_id"] = ends[0]
    if len(ends) > 1 and ends[1] != ends[0]:
        found["tokenizer.ggml.eot_token_id"] = ends[1]
    found["tokenizer.ggml.add_bos_token"] = config.bos in ids and _begins_with(
        definition, ids[config.bos], config.bos
    )
    found["tokenizer.ggml.add_eos_token"] = False
    if config.chat_template:
        found["tokenizer.chat_template"] = config.chat_template
    return found


def _begins_with(definition: Mapping[str, Any], bos: int, text: str) -> bool:
    """Whether the tokenizer puts `bos` in front of a text: its post-processor's template says."""
    template = json.dumps(definition.get("post_processor"), ensure_ascii=False)
    return f'"SpecialToken": {{"id": {json.dumps(text, ensure_ascii=False)}' in template or (
        f'"SpecialToken": {{"id": {bos}' in template
    )


# -- from GGUF -------------------------------------------------------------------------------------


def vocabulary_to_hf(header: GgufHeader) -> dict[str, str]:
    """Files by name. Raises UnsupportedModel for a vocabulary of another kind, ModelFileInvalid."""
    kind = header.get_str("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{header.path.name}: a vocabulary of the kind '{kind[:40]}' cannot be converted yet"
        )
    tokens = _gguf_tokens(header)
    definition = _byte_level(header, tokens) if kind == "gpt2" else _sentencepiece(header, tokens)
    bos = _special_text(header, tokens, "bos")
    adds_bos = header.get("tokenizer.ggml.add_bos_token", kind == "llama") is True and bool(bos)
    if adds_bos:
        definition["post_processor"] = _template(bos, header.get_int("tokenizer.ggml.bos_token_id"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos or None,
        "eos_token": _special_text(header, tokens, "eos") or None,
        "pad_token": _special_text(header, tokens, "padding") or None,
        "unk_token": _special_text(header, tokens, "unknown") or None,
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
    }
    ends = [header.get_int(f"tokenizer.ggml.{name}_token_id", -1) for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end >= 0))
    files = {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }
    if ends:
        generation = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        files["generation_config.json"] = json.dumps(generation, indent=2)
    template = header.get_str("tokenizer.chat_template")
    if template:
        files["chat_template.jinja"] = template
    return files


def _gguf_tokens(header: GgufHeader) -> list[_Token]:
    texts = _strings(header, "tokenizer.ggml.tokens")
    kinds = _numbers(header, "tokenizer.ggml.token_type", len(texts), NORMAL)
    scores = _numbers(header, "tokenizer.ggml.scores", len(texts), 0.0)
    return [
        _Token(text, int(kind), float(score))
        for text, kind, score in zip(texts, kinds, scores, strict=True)
    ]


def _strings(header: GgufHeader, key: str) -> list[str]:
    value = header.get(key)
    if isinstance(value, GgufArray):
        return [
            each.decode("utf-8", "replace") for each in iter_strings(value.read_bytes(), value.length)
        ]
    return [str(each) for each in value] if isinstance(value, list) else []


def _numbers(header: GgufHeader, key: str, count: int, default: float) -> Sequence[float]:
    found = header.get_list(key)
    return [default] * count if found is None else [float(each) for each in found]


def _special_text(header: GgufHeader, tokens: Sequence[_Token], name: str) -> str:
    index = header.get_int(f"tokenizer.ggml.{name}_token_id", -1)
    return tokens[index].text if 0 <= index < len(tokens) else ""


def _byte_level(header: GgufHeader, tokens: Sequence[_Token]) -> dict[str, Any]:
    name = header.get_str("tokenizer.ggml.pre")
    cuts = CUTS.get(name)
    if cuts is None:
        raise UnsupportedModel(
            f"{header.path.name}: it cuts texts by '{name[:40]}', which cannot be converted yet"
        )
    pairs = [merge.partition(" ") for merge in _strings(header, "tokenizer.ggml.merges")]
    merges = _merges_that_happen([(left, right) for left, _, right in pairs], tokens, header.path.name)
    model = _bpe(tokens, merges, cuts)
    return {
        **_definition(tokens, model),
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
    merges: Sequence[tuple[str, str]], tokens: Sequence[_Token], where: str
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
    tokens: Sequence[_Token],
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


def _definition(tokens: Sequence[_Token], model: Mapping[str, Any]) -> dict[str, Any]:
    added = [
        {
            "id": index,
            "content": token.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token.kind == CONTROL,
        }
        for index, token in enumerate(tokens)
        if token.kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        "model": model,
    }


def _sentencepiece(header: GgufHeader, tokens: Sequence[_Token]) -> dict[str, Any]:
    unknown = _special_text(header, tokens, "unknown") or next(
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
        **_definition(tokens, model),
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _merges_by_score(tokens: Sequence[_Token]) -> list[tuple[str, str]]:
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


def _template(bos: str, index: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
