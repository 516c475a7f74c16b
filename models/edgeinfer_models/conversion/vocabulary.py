"""A vocabulary between a folder's tokenizer files and GGUF metadata.

    metadata = vocabulary_to_gguf(folder, vocab_size)      # tokenizer.ggml.*
    files = vocabulary_to_hf(header, vocab_size)           # tokenizer.json, tokenizer_config.json …

Here is what all kinds have in common: special tokens, what comes in front of a text, the chat template.
How texts are cut into tokens is in vocabulary_bpe.py and vocabulary_unigram.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.vocabulary_bpe import (
    bpe_to_gguf,
    byte_level_to_hf,
    sentencepiece_to_hf,
)
from edgeinfer_models.conversion.vocabulary_tokens import Token, special_text, tokens_of_gguf
from edgeinfer_models.conversion.vocabulary_unigram import (
    unigram_notes_to_gguf,
    unigram_notes_to_hf,
    unigram_to_gguf,
    unigram_to_hf,
)
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.safetensors_header import read_json
from edgeinfer_models.tokenizer_config import read_tokenizer_config

_TO_GGUF = {"BPE": bpe_to_gguf, None: bpe_to_gguf, "Unigram": unigram_to_gguf}
_TO_HF = {"gpt2": byte_level_to_hf, "llama": sentencepiece_to_hf, "t5": unigram_to_hf}


def vocabulary_notes(origin: Path | GgufHeader) -> list[str]:
    """What the other side does otherwise with the vocabulary of a folder or a file, a line each. Raises
    as the conversion does; of what is not there it says nothing."""
    if isinstance(origin, GgufHeader):
        is_unigram = origin.get_str("tokenizer.ggml.model") == "t5"
        return unigram_notes_to_hf(origin) if is_unigram else []
    path = origin / "tokenizer.json"
    if not path.exists():
        return []
    definition = read_json(path)
    model = definition.get("model")
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        return []
    return unigram_notes_to_gguf(definition, path.name)


# -- to GGUF ---------------------------------------------------------------------------------------


def vocabulary_to_gguf(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Metadata with whole keys. vocab_size: the embedding's rows. Raises ModelNotFound, ModelFileInvalid
    (the tokenizer is of another model), UnsupportedModel (llama.cpp would read texts otherwise)."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.model").exists():
        raise UnsupportedModel(
            f"{folder.name}: has a tokenizer.model and no tokenizer.json, which alone is read; make one:"
            " transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    definition = read_json(path)
    model = definition.get("model")
    if not isinstance(model, dict):
        raise ModelFileInvalid(f"{path.name}: has no 'model'; download it again")
    kind = model.get("type")
    convert = _TO_GGUF.get(kind) if kind is None or isinstance(kind, str) else None
    if convert is None:
        raise UnsupportedModel(
            f"{path.name}: a tokenizer of the type {str(kind)[:40]} cannot be converted yet"
        )
    tokens, found = convert(definition, vocab_size, path.name)
    found["tokenizer.ggml.tokens"] = [token.text for token in tokens]
    found["tokenizer.ggml.token_type"] = [token.kind for token in tokens]
    return {**found, **_special(folder, definition, tokens)}


def _special(folder: Path, definition: Mapping[str, Any], tokens: Sequence[Token]) -> dict[str, Any]:
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


def vocabulary_to_hf(header: GgufHeader, vocab_size: int) -> dict[str, str]:
    """Files by name. vocab_size: the embedding's rows. Raises ModelFileInvalid, UnsupportedModel (a
    vocabulary of another kind, or one that the tokenizers library would use otherwise)."""
    kind = header.get_str("tokenizer.ggml.model")
    convert = _TO_HF.get(kind)
    if convert is None:
        raise UnsupportedModel(
            f"{header.path.name}: a vocabulary of the kind '{kind[:40]}' cannot be converted yet"
        )
    tokens = tokens_of_gguf(header)
    if len(tokens) > vocab_size:
        raise ModelFileInvalid(
            f"{header.path.name}: has {len(tokens):,} tokens where the model has embeddings for"
            f" {vocab_size:,}; its vocabulary is another model's"
        )
    definition = convert(header, tokens)
    bos = special_text(header, tokens, "bos")
    adds_bos = header.get("tokenizer.ggml.add_bos_token", kind == "llama") is True and bool(bos)
    if adds_bos:
        definition["post_processor"] = _template(bos, header.get_int("tokenizer.ggml.bos_token_id"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos or None,
        "eos_token": special_text(header, tokens, "eos") or None,
        "pad_token": special_text(header, tokens, "padding") or None,
        "unk_token": special_text(header, tokens, "unknown") or None,
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
