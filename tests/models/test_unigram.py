"""Unigram vocabularies between tokenizer.json and GGUF: llama.cpp, the tokenizers library and our own
tokenizer give the same ids, or the conversion is refused with the reason."""

from __future__ import annotations

import base64
import functools
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.backend import RuntimeSettings
from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf
from edgeinfer_models.conversion.normalization import Normalization
from edgeinfer_models.conversion.to_gguf import GgufPlan, write_gguf
from edgeinfer_models.conversion.vocabulary import vocabulary_to_gguf
from edgeinfer_models.hf_tokenizer import read_hf_tokenizer
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.tokenizer import Tokenizer
from tests.fixtures_gguf import SPECIAL_TOKENS, write_tiny_gguf
from tests.fixtures_hf import unigram_definition, write_tiny_folder

BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}
RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}


def metaspace(scheme: str, *, split: bool = True) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


@functools.cache
def _trained() -> str:
    return json.dumps(unigram_definition())


def plain_definition() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_trained())
    return found


WAYS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "blanks are letters": (Normalization().to_hf(), None),
    "a blank in front": (Normalization(adds_prefix=True).to_hf(), None),
    "blanks are merged": (Normalization(adds_prefix=True, merges_blanks=True).to_hf(), None),
    "metaspace": (None, metaspace("never", split=False)),
    "metaspace and words": (None, metaspace("never")),
    "blanks by a pattern": (sequence({**BLANKS, "pattern": {"Regex": " "}}), None),
}


def strings(count: int) -> list[str]:
    draw = random.Random(7)
    pieces = (
        "the ", "The quick brown fox", "in-", "aaaa", "banana", "def f(x):\n    return x", "Ünïcödé ",
        "日本語", "русский ", "한국어", "🦙", "👩\u200d👩\u200d👧", "1\ufe0f\u20e3", "\u0301", "3.14",
        " ", "   ", "\n", "\n\n  ", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\x04", "\0", "<0x41>",
        "[PAD7]", "<s>", "<unk>", "unk>", *SPECIAL_TOKENS,
    )  # fmt: skip
    mixed = ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(count)]
    return ["", " ", "   ", "\n", " a", "a ", "  a  b  ", "<unk> <unk>", *mixed]


@contextmanager
def llama_cpp(path: Path) -> Iterator[Tokenizer]:
    files = ModelFiles("tiny", (path,), "gguf")
    runtime = get_backend("llamacpp").load(files, RuntimeSettings(context=64), lambda _: True)
    try:
        yield runtime.tokenizer
    finally:
        runtime.close()


def to_gguf(folder: Path, path: Path) -> Path:
    model = source_of_folder(folder)
    write_gguf(path, model.source, GgufPlan(model.family, model.shape, "F16", model.gguf_metadata()))
    return path


def to_folder(path: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, text in source_of_gguf(path).hf_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def vocab_size_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def assert_reads_alike(folder: Path, own: Tokenizer, texts: Sequence[str]) -> None:
    """A folder's tokenizer.json, in the library and here, and llama.cpp."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = read_hf_tokenizer(folder, vocab_size_of(folder))
    for text in texts:
        expected = own.encode(text, add_special=False, parse_special=True)
        assert library.encode(text, add_special_tokens=False).ids == expected, text
        assert ours.encode(text, add_special=False, parse_special=True) == expected, text
        expected = own.encode(text, add_special=False, parse_special=False)
        assert ours.encode(text, add_special=False, parse_special=False) == expected, text


@pytest.mark.parametrize("way", WAYS)
def test_ids_are_the_same_in_llama_cpp_and_in_a_folder_made_back(tmp_path: Path, way: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", tokenizer=unigram_definition(*WAYS[way]))
    path = to_gguf(folder, tmp_path / "out.gguf")
    back = to_folder(path, tmp_path / "back")
    texts = strings(300)
    with llama_cpp(path) as own:
        assert_reads_alike(folder, own, texts)
        assert_reads_alike(back, own, texts)
        unknown = own.encode("🦙", add_special=False, parse_special=False)
        assert unknown[-1:] == own.encode("<unk>", add_special=False, parse_special=True)
    size = vocab_size_of(folder)
    assert vocabulary_to_gguf(back, size) == vocabulary_to_gguf(folder, size)


@pytest.mark.parametrize("form", ["ours", "transformers"])
def test_a_table_of_characters_goes_with_the_vocabulary(tmp_path: Path, form: str) -> None:
    charsmap = sentencepiece_charsmap()
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    if form == "ours":
        way = Normalization(charsmap, adds_prefix=True, merges_blanks=True).to_hf(), None
    else:
        way = sequence(table, STRIP, RUNS), metaspace("always")
    folder = write_tiny_folder(tmp_path / "tiny", tokenizer=unigram_definition(*way))
    path = to_gguf(folder, tmp_path / "out.gguf")
    back = to_folder(path, tmp_path / "back")
    # Letters of one part, which the library and llama.cpp replace alike.
    texts = (
        "ﬁne　ｗｉｄｅ",
        "\tone\r\n\r\n two  ",
        " ",
        "\n",
        "x² ½ Ⅷ",
        "①\u00a0②",
        "ÅÅ",
        "<|im_end|> \u2003",
    )
    with llama_cpp(path) as own:
        assert_reads_alike(folder, own, texts)
        assert_reads_alike(back, own, texts)
        narrow = own.encode("fine wide", add_special=False, parse_special=False)
        assert own.encode(" ﬁne　ｗｉｄｅ ", add_special=False, parse_special=False) == narrow
    assert any("emoji" in note for note in source_of_folder(folder).notes())
    assert source_of_gguf(path).notes() == source_of_folder(folder).notes()
    size = vocab_size_of(folder)
    assert vocabulary_to_gguf(back, size) == vocabulary_to_gguf(folder, size)


def sentencepiece_charsmap() -> bytes:
    """Of its rules nmt_nfkc, which most of its vocabularies are made with."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "jumps over the lazy dog"] * 20),
        model_writer=written,
        vocab_size=31,
        model_type="unigram",
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    return bytes(model.normalizer_spec.precompiled_charsmap)


# -- what is refused, and what is said -------------------------------------------------------------


def change_model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda definition: definition["model"].update(values)


def change_added(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda definition: definition["added_tokens"][-1].update(values)


def add_pieces(*pieces: list[Any], **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(definition: dict[str, Any]) -> None:
        definition["model"]["vocab"] += [list(piece) for piece in pieces]
        definition["model"].update(values)

    return change


def cut_like(
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None
) -> Callable[[dict[str, Any]], None]:
    return lambda definition: definition.update(normalizer=normalizer, pre_tokenizer=pre_tokenizer)


def price_by_special(definition: dict[str, Any]) -> None:
    definition["model"]["vocab"][1][1] = -80.0
    definition["model"]["vocab"].append(["x\u0416", -9.0])  # the only one with this letter


DIFFERING: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "bytes": (add_pieces(["<0x41>", -9.0], byte_fallback=True), "unknown characters as bytes"),
    "chance": (change_model(alpha=0.1), "at random"),
    "no unknown": (change_model(unk_id=None), "no token for unknown characters"),
    "a price": (price_by_special, "unknown characters by a special token"),
    "a token that C would cut": (add_pieces(["x\0x", -9.0]), "holds a NUL"),
    "a blank in front unless there is one": (cut_like(None, metaspace("always")), "begins with one"),
    "a blank in front of the first": (cut_like(None, metaspace("first")), "none after special tokens"),
    "a blank in front of blanks": (cut_like(sequence(PREPEND, BLANKS), None), "blanks alone"),
    "stripped of more than blanks": (cut_like(sequence(STRIP, RUNS), metaspace("always")), "U+0009"),
    "words": (cut_like(None, {"type": "WhitespaceSplit"}), "(WhitespaceSplit) cuts"),
    "cut twice": (
        cut_like(None, {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, metaspace("never")]}),
        "(Digits, Metaspace) cuts",
    ),
    "another letter": (cut_like(None, metaspace("never") | {"replacement": "_"}), "SentencePiece's"),
    "small letters": (cut_like(sequence({"type": "Lowercase"}, BLANKS), None), "(Lowercase, Replace)"),
    "nothing": (cut_like(None, None), "(none) changes"),
    "tokens over two words": (cut_like(None, metaspace("never")), "'▁▁▁' reaches over"),
    "an added token that strips": (change_added(rstrip=True), "(rstrip)"),
    "an added token with a blank": (change_added(content="a▁b", special=False, id=400), "(▁)"),
    "an added token after the normalizer": (change_added(normalized=True), "(normalized)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERING)
def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    change, said = DIFFERING[name]
    definition = plain_definition()
    change(definition)
    folder = write_tiny_folder(tmp_path / "tiny", tokenizer=definition)
    with pytest.raises(UnsupportedModel, match=r"^tokenizer\.json: [^\n]+$") as caught:
        vocabulary_to_gguf(folder, vocab_size_of(folder))
    assert said in str(caught.value)


def test_special_tokens_may_be_the_least_likely_where_their_score_decides_nothing(
    tmp_path: Path,
) -> None:
    """All letters of its tokens are tokens, as SentencePiece makes them."""
    definition = plain_definition()
    definition["model"]["vocab"][1][1] = -80.0
    folder = write_tiny_folder(tmp_path / "tiny", tokenizer=definition)
    with llama_cpp(to_gguf(folder, tmp_path / "out.gguf")) as own:
        assert_reads_alike(folder, own, strings(100))


DAMAGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "no list": change_model(vocab={"a": 0}),
    "no pairs": change_model(vocab=[["a"]]),
    "nothing of two": change_model(vocab=[7]),
    "no numbers": change_model(vocab=[["a", "b"]]),
    "no likelihoods": change_model(vocab=[["<unk>", 0.0], ["a", -(10**400)]]),
    "no finite numbers": change_model(vocab=[["<unk>", 0.0], ["a", float("nan")]]),
    "special tokens alone": lambda definition: definition["model"]["vocab"].__delitem__(slice(4, None)),
    "a text twice": add_pieces(["s", -9.0]),
    "two ids": change_added(id=1),
    "no table": cut_like(sequence({"type": "Precompiled"}, BLANKS), None),
    "a cut table": cut_like(
        sequence({"type": "Precompiled", "precompiled_charsmap": "AAQAAAAA"}, BLANKS), None
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_unigram_tokenizer_is_one_line(tmp_path: Path, name: str) -> None:
    definition = plain_definition()
    folder = write_tiny_folder(tmp_path / "tiny", tokenizer=definition)
    DAMAGED[name](definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ModelFileInvalid, match=r"^tokenizer\.json: [^\n]+$"):
        vocabulary_to_gguf(folder, vocab_size_of(folder))


@pytest.mark.parametrize("name", [name for name in DAMAGED if name.startswith("no")])
def test_what_is_said_of_a_damaged_tokenizer_is_that_it_is(tmp_path: Path, name: str) -> None:
    definition = plain_definition()
    folder = write_tiny_folder(tmp_path / "tiny", tokenizer=definition)
    DAMAGED[name](definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ModelFileInvalid, match=r"^tokenizer\.json: [^\n]+$"):
        source_of_folder(folder).notes()


def test_scores_that_gguf_rounds_are_said(tmp_path: Path) -> None:
    definition = plain_definition()
    folder = write_tiny_folder(tmp_path / "tiny", tokenizer=definition)
    assert source_of_folder(folder).notes() == []
    definition["model"]["vocab"][9][1] += 1e-12
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert [note.split(":")[0] for note in source_of_folder(folder).notes()] == [
        "its tokens' scores are rounded to float32"
    ]


# -- files that others made ------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PIECES: list[tuple[str, int, float]] = [
    ("<pad>", CONTROL, 0.0),
    ("</s>", CONTROL, -99.0),
    ("<unk>", UNKNOWN, 0.0),
    ("<0x0A>", BYTE, 0.0),
    ("[hole]", UNUSED, -1000.0),
    ("un", UNUSED, -3.0),
    ("<b>", USER_DEFINED, -20.0),
    ("▁▁", USER_DEFINED, -1.0),
    ("▁", NORMAL, -2.0),
    ("the", NORMAL, -3.0),
    ("▁the", NORMAL, -3.5),
    *[(letter, NORMAL, -4.0 - place / 8) for place, letter in enumerate("<>0xAabehlnotu[]")],
    ("[PAD27]", UNUSED, -10000.0),
]


def write_pieces(path: Path, pieces: Sequence[tuple[str, int, float]], **keys: Any) -> Path:
    texts, kinds, scores = zip(*pieces, strict=True)
    vocabulary = {
        "model": "t5",
        "tokens": list(texts),
        "token_type": list(kinds),
        "scores": list(scores),
        "merges": None,
        "pre": "default",
        "bos_token_id": None,
        "eos_token_id": 1,
        "padding_token_id": 0,
        "unknown_token_id": 2,
    } | keys
    return write_tiny_gguf(
        path, metadata={f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    )


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("merges", [False, True])
def test_a_gguf_vocabulary_of_all_kinds_of_tokens_is_read_alike(
    tmp_path: Path, prefix: bool, merges: bool
) -> None:
    keys = {"add_space_prefix": prefix, "remove_extra_whitespaces": merges}
    path = write_pieces(tmp_path / "t5.gguf", PIECES, **keys)
    back = to_folder(path, tmp_path / "back")
    texts = (
        "the un the", "  the  <b>hello ", "under<b><0x0A>", "\n", "[hole] [PAD27]", "</s>a<unk>b<pad>",
        "▁▁a", "Zoo the", "   ", "тhe <0x0A", *strings(100),
    )  # fmt: skip
    with llama_cpp(path) as own:
        assert_reads_alike(back, own, texts)
        ours = read_hf_tokenizer(back, len(PIECES))
        shown = [token for token, (_, kind, _) in enumerate(PIECES) if kind != UNUSED]
        assert [ours.piece(token) for token in shown] == [own.piece(token) for token in shown]
    again = vocabulary_to_gguf(back, len(PIECES))
    assert again["tokenizer.ggml.token_type"][3] == BYTE


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([*PIECES, ("<0x0B>", BYTE, 0.0)], "'<0x0B>'"),  # B is no letter of it
        ([*PIECES, ("xж", NORMAL, -9.0), ("unt", UNUSED, -30.0)], "'<0x0A>'"),
        ([p for p in PIECES if p[1] != BYTE] + [("xж", NORMAL, -9.0), ("unt", UNUSED, -30.0)], "'unt'"),
        ([*PIECES, ("▁<c>", CONTROL, 0.0)], "'▁<c>'"),
    ],
)
def test_a_token_that_only_tokenizer_json_would_find_is_refused(
    tmp_path: Path, pieces: list[tuple[str, int, float]], said: str
) -> None:
    path = write_pieces(tmp_path / "t5.gguf", pieces)
    with pytest.raises(UnsupportedModel, match=r"^t5\.gguf: [^\n]+$") as caught:
        source_of_gguf(path).hf_files()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"unknown_token_id": 999},
        {"token_type": [CONTROL] * len(PIECES)},
        {"precompiled_charsmap": [4, 0]},
        {"scores": [float("nan")] * len(PIECES)},
    ],
)
def test_a_damaged_gguf_vocabulary_is_one_line(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = write_pieces(tmp_path / "t5.gguf", PIECES, **keys)
    with pytest.raises(ModelFileInvalid, match=r"^t5\.gguf: [^\n]+$"):
        source_of_gguf(path).hf_files()
