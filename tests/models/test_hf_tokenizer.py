"""tokenizer.json behind our protocol: byte-level and SentencePiece vocabularies, ends, damaged files."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import EdgeInferError, ModelFileInvalid, ModelNotFound, UnsupportedModel
from edgeinfer_models.hf_tokenizer import HfTokenizer, read_hf_tokenizer
from edgeinfer_models.tokenizer_config import read_tokenizer_config
from tests.fixtures_hf import tokenizer_definition, unigram_definition

pytest.importorskip("tokenizers", reason="the package tokenizers (extra mlx) is not installed")


def write(folder: Path, definition: Any, **config: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_definition() -> dict[str, Any]:
    """As Llama 2 and Mistral have it: spaces as U+2581, bytes as <0x..>, a space before the text."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "\u2581"]
    words += ["h", "i", "hi", "\u2581hi", "t", "\u2581t", "a", "e", "o"]
    vocab = {word: token for token, word in enumerate(words)}
    special = [
        {"id": token, "content": words[token], "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for token in range(3)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "vocab": vocab, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "merges": [["h", "i"], ["\u2581", "hi"], ["\u2581", "t"]],
        },
    }  # fmt: skip


def plain(tokenizer: HfTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False, parse_special=False)


@pytest.mark.parametrize("text", ["hi", "hi the", "日本 😀", "two\nlines", " hi", "<s> is text"])
def test_a_sentencepiece_vocabulary_gives_back_what_it_was_given(tmp_path: Path, text: str) -> None:
    tokenizer = read_hf_tokenizer(write(tmp_path, sentencepiece_definition(), bos_token="<s>"), 300)
    tokens = plain(tokenizer, text)
    assert tokenizer.decode(tokens) == text
    assert b"".join(map(tokenizer.piece, tokens)) == b" " + text.encode()
    assert not any(map(tokenizer.is_control, tokens))
    assert tokenizer.encode("<s>", add_special=False, parse_special=True)[-1] == tokenizer.bos == 1


def test_ids_agree_with_the_library_itself(tmp_path: Path) -> None:
    import tokenizers

    for definition in (tokenizer_definition("NFC", "<|endoftext|>"), sentencepiece_definition()):
        ours = read_hf_tokenizer(write(tmp_path, definition), 400)
        theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
        for text in ("hello the world", "cafe\u0301 in tone", "<|im_start|>user\nhi<|im_end|>", "</s>"):
            for add in (False, True):
                expected = theirs.encode(text, add_special_tokens=add).ids
                assert ours.encode(text, add_special=add, parse_special=True) == expected


def test_a_unigram_vocabularys_special_tokens_are_text_where_text_is_meant(tmp_path: Path) -> None:
    """The library's model looks for them in every text, and gives their ids."""
    definition = unigram_definition()
    hidden = definition["model"]["vocab"][2][0]
    tokenizer = read_hf_tokenizer(write(tmp_path, definition), 400)
    for text in (hidden, f"a {hidden} b", "<unk>", hidden[:-1]):
        tokens = plain(tokenizer, text)
        assert tokenizer.is_control(2) and 2 not in tokens
        seen = tokenizer.decode(tokens)  # less the letters that are no token
        assert seen and set(seen) <= set(text) and len(tokens) > 3
    assert tokenizer.encode(hidden, add_special=False, parse_special=True) == [2]


def test_prompts_are_neither_cut_nor_padded(tmp_path: Path) -> None:
    definition = tokenizer_definition()
    definition["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    definition["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    assert len(plain(read_hf_tokenizer(write(tmp_path, definition), 400), "x" * 30)) == 30


def test_ids_of_the_model_without_a_text_are_control_tokens(tmp_path: Path) -> None:
    tokenizer = read_hf_tokenizer(write(tmp_path, tokenizer_definition()), 400)
    assert (tokenizer.piece(399), tokenizer.text(399), tokenizer.is_control(399)) == (b"", "", True)
    assert not tokenizer.is_end(399)
    for token in (-1, 400):
        for question in (tokenizer.piece, tokenizer.text, tokenizer.is_end, tokenizer.is_control):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                question(token)


def test_an_added_token_beyond_the_model_is_only_text(tmp_path: Path) -> None:
    definition = tokenizer_definition()
    size = max(token["id"] for token in definition["added_tokens"]) + 1
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": size, "content": "[PAD]"})
    tokenizer = read_hf_tokenizer(write(tmp_path, definition), size)
    tokens = tokenizer.encode("[PAD]", add_special=False, parse_special=True)
    assert max(tokens) < size
    assert tokenizer.decode(tokens) == "[PAD]"


def test_another_models_tokenizer_is_found_out(tmp_path: Path) -> None:
    tokenizer = read_hf_tokenizer(write(tmp_path, tokenizer_definition()), 50)
    with pytest.raises(ModelFileInvalid, match="another model's tokenizer"):
        plain(tokenizer, "the world")


def test_all_that_may_end_an_answer_ends_it(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_definition(), eos_token="<|endoftext|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 100000, true, "x"]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    tokenizer = read_hf_tokenizer(folder, 400)
    ends = {token for token in range(400) if tokenizer.is_end(token)}
    parse = {
        text: tokenizer.encode(text, add_special=False, parse_special=True)[0]
        for text in ("<|endoftext|>", "<|im_end|>")
    }
    assert tokenizer.eos == parse["<|endoftext|>"]
    assert ends == {7, 9, *parse.values()}


def test_without_a_configuration_there_is_still_an_end(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    tokenizer = read_hf_tokenizer(tmp_path, 400)
    assert tokenizer.bos is None
    assert tokenizer.eos is not None
    assert tokenizer.is_end(tokenizer.eos)
    assert not tokenizer.adds_bos


def test_strange_text_is_encoded(tmp_path: Path) -> None:
    tokenizer = read_hf_tokenizer(write(tmp_path, tokenizer_definition()), 400)
    assert tokenizer.decode(plain(tokenizer, "a\ud800b")) == "a?b"
    with pytest.raises(ValueError, match="at most"):
        plain(tokenizer, "x" * (256 * 2**20 + 1))


def test_threads_share_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = read_hf_tokenizer(write(tmp_path, tokenizer_definition()), 400)
    found: list[list[int]] = []

    def work() -> None:
        for _ in range(50):
            special = tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)
            found.append(special + plain(tokenizer, "<|im_end|>"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert len({tuple(tokens) for tokens in found}) == 1


GOOD = {
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
}
BAD: dict[str, tuple[str, type[EdgeInferError]]] = {
    "text": ("hello", ModelFileInvalid),
    "a list": ("[]", ModelFileInvalid),
    "no model": (json.dumps(GOOD), ModelFileInvalid),
    "an unknown model": (json.dumps({**GOOD, "model": {"type": "Evil"}}), ModelFileInvalid),
    "added tokens are no list": (json.dumps({**GOOD, "added_tokens": 7}), ModelFileInvalid),
    "an added token without an id": (
        json.dumps({**GOOD, "added_tokens": [{"content": "x"}]}), ModelFileInvalid,
    ),
    "an added token below zero": (
        json.dumps({**GOOD, "added_tokens": [{"content": "x", "id": -1}]}), ModelFileInvalid,
    ),
    "another decoder": (json.dumps({"decoder": {"type": "WordPiece"}}), UnsupportedModel),
    "no decoder": (json.dumps({"decoder": None}), UnsupportedModel),
    "deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, ModelFileInvalid),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_tokenizer_is_one_line(tmp_path: Path, what: str) -> None:
    content, kind = BAD[what]
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(kind, match=r"^tokenizer\.json: ") as caught:
        read_hf_tokenizer(tmp_path, 400)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        read_hf_tokenizer(tmp_path, 400)


def test_side_files_are_optional_and_checked(tmp_path: Path) -> None:
    found = read_tokenizer_config(tmp_path)
    assert (found.bos, found.eos, found.eos_ids, found.chat_template) == ("", "", (), "")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileInvalid, match=r"chat_template\.jinja"):
        read_tokenizer_config(tmp_path)
