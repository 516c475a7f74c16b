"""A Hugging Face folder's tokenizer.json behind the `Tokenizer` protocol, by the `tokenizers` library.

The file is untrusted. The library reads it in Rust and runs nothing from it; what it would do silently
(cutting prompts at a "truncation" length, padding them) is taken out before it sees the file.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.safetensors_header import read_json
from edgeinfer_models.tokenizer_config import TokenizerConfig, read_tokenizer_config

if TYPE_CHECKING:
    import tokenizers

FILE_NAME = "tokenizer.json"
MAX_TEXT_BYTES = 256 * 2**20  # far above any context

# Special tokens that end a turn, whatever the folder's configuration says: many name one of two only.
_TURN_ENDS = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
     "<end_of_turn>", "<|end_of_turn|>", "<end_of_utterance>", "<|eot|>")
)  # fmt: skip

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's


def read_hf_tokenizer(folder: Path, vocab_size: int) -> HfTokenizer:
    """vocab_size: the model's, which may be larger than the tokenizer's: the rest are ids without text.
    Raises ModelNotFound, ModelFileInvalid, UnsupportedModel (a decoder nobody here knows)."""
    return HfTokenizer(read_json(folder / FILE_NAME), read_tokenizer_config(folder), vocab_size)


def added_token_texts(folder: Path) -> list[str]:
    """The texts of the tokens beside the vocabulary, the special ones among them. Raises
    ModelNotFound, ModelFileInvalid."""
    return [token["content"] for token in _added_tokens(read_json(folder / FILE_NAME))]


class HfTokenizer:
    """Implements `edgeinfer_models.tokenizer.Tokenizer`. Thread-safe."""

    def __init__(self, definition: Mapping[str, Any], config: TokenizerConfig, vocab_size: int) -> None:
        # Without those that the model has no embedding for: older conversions list a [PAD] like that.
        added = [token for token in _added_tokens(definition) if token["id"] < vocab_size]
        self._text = json.dumps(
            {**definition, "added_tokens": added, "truncation": None, "padding": None}
        )
        self._size = vocab_size
        self._special = {token["id"]: token["content"] for token in added if token.get("special")}
        self._added = {token["id"]: token["content"] for token in added}
        self._decoder = _PieceDecoder(definition.get("decoder"))
        self._parsing = self._build(self._text)
        self._plain: tokenizers.Tokenizer | None = None
        self._plain_lock = threading.Lock()
        self._pieces: dict[int, bytes] = {}
        self._bos = self._id(config.bos)
        ends = {token for token, text in self._special.items() if text in _TURN_ENDS}
        ends.update(token for token in config.eos_ids if token < vocab_size)
        named = self._id(config.eos)
        listed = [token for token in config.eos_ids if token < vocab_size]
        self._eos = named if named is not None else (listed[0] if listed else min(ends, default=None))
        self._ends = frozenset(ends | ({self._eos} if self._eos is not None else set()))
        with _checked():
            full = self._parsing.encode("a").ids
            self._adds_bos = self._bos is not None and full[:1] == [self._bos]

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def bos(self) -> int | None:
        return self._bos

    @property
    def eos(self) -> int | None:
        return self._eos

    @property
    def adds_bos(self) -> bool:
        return self._adds_bos

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")  # a lone surrogate becomes "?"
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"text of {len(data)} bytes; at most {MAX_TEXT_BYTES} are tokenized")
        if not data:  # what a template adds around nothing is nothing's
            return [self._bos] if add_special and self._adds_bos and self._bos is not None else []
        tokenizer = self._parsing if parse_special else self._plain_tokenizer()
        with _checked():
            tokens = tokenizer.encode(data.decode(), add_special_tokens=add_special).ids
        return self._known(tokens)

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._make_piece(token)
        return known

    def text(self, token: int) -> str:
        self._check(token)
        return self._special.get(token) or self.piece(token).decode("utf-8", "replace")

    def decode(self, tokens: Sequence[int]) -> str:
        text = b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._decoder.strips_first_space else text

    def is_end(self, token: int) -> bool:
        self._check(token)
        return token in self._ends

    def is_control(self, token: int) -> bool:
        """Also true for ids of the model that the tokenizer has no text for."""
        self._check(token)
        return token in self._special or self._parsing.id_to_token(token) is None

    def _build(self, text: str) -> tokenizers.Tokenizer:
        try:
            import tokenizers
        except ImportError:
            raise UnsupportedModel(
                f"{FILE_NAME}: the package tokenizers is missing; run `pip install edgeinfer[mlx]`"
            ) from None
        with _checked():
            return tokenizers.Tokenizer.from_str(text)

    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """Reads special tokens as the text they are. The switch is the library's per tokenizer, so this
        is a second one, made when it is first needed."""
        with self._plain_lock:
            if self._plain is None:
                plain = self._build(_without_special_pieces(self._text, self._special))
                plain.encode_special_tokens = True
                self._plain = plain
            return self._plain

    def _known(self, tokens: list[int]) -> list[int]:
        for token in tokens:
            if token >= self._size:
                raise ModelFileInvalid(
                    f"{FILE_NAME}: gives token {token} and the model has {self._size}; is it another"
                    " model's tokenizer?"
                )
        return tokens

    def _make_piece(self, token: int) -> bytes:
        self._check(token)
        if token in self._special:
            return b""
        if token in self._added:
            return str(self._added[token]).encode("utf-8", "replace")
        text = self._parsing.id_to_token(token)
        return b"" if text is None else self._decoder.decode(text)

    def _id(self, text: str) -> int | None:
        token = self._parsing.token_to_id(text) if text else None
        return token if token is not None and token < self._size else None

    def _check(self, token: int) -> None:
        if not 0 <= token < self._size:
            raise ValueError(f"token {token} is outside the vocabulary of {self._size}")


def _without_special_pieces(text: str, special: Iterable[int]) -> str:
    """A Unigram model looks for its whole vocabulary in a text, special tokens too, whatever the
    library's switch for them says. An empty piece is never found, and the ids stay what they are."""
    definition = json.loads(text)
    model = definition.get("model")
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        return text
    hidden = {token for token in special if token < len(model["vocab"])}
    for token in hidden:
        model["vocab"][token][0] = ""
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] not in hidden]
    return json.dumps(definition)


class _PieceDecoder:
    """The bytes of a vocabulary entry, by the kind of `decoder` the file has."""

    def __init__(self, decoder: Any) -> None:
        parts = _decoder_parts(decoder)
        kinds = {part.get("type") for part in parts}
        self._is_byte_level = "ByteLevel" in kinds
        spaces = [p for p in parts if p.get("type") == "Replace" and p.get("content") == " "]
        if not self._is_byte_level and not spaces and "Metaspace" not in kinds:
            found = ", ".join(sorted(str(kind) for kind in kinds)) or "none"
            raise UnsupportedModel(
                f"{FILE_NAME}: its decoder ({found}) is not one of byte-level and SentencePiece"
                " vocabularies; use a .gguf of this model"
            )
        prepends = any(
            p.get("prepend_scheme", "always") != "never" for p in parts if "Metaspace" in kinds
        )
        self.strips_first_space = not self._is_byte_level and ("Strip" in kinds or prepends)

    def decode(self, text: str) -> bytes:
        if self._is_byte_level:
            values = [_BYTE_OF_LETTER.get(letter) for letter in text]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(values) else text.encode("utf-8", "replace")
        byte = _BYTE_TOKEN.fullmatch(text)
        return (
            bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode("utf-8", "replace")
        )


def _decoder_parts(decoder: Any) -> list[Mapping[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    inner = decoder.get("decoders")
    if decoder.get("type") == "Sequence" and isinstance(inner, list):
        return [part for part in inner if isinstance(part, dict)]
    return [decoder]


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary.
    Source: GPT-2's tokenizer: printable Latin-1 is itself, the rest follows from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in set(printable)]
    letters.update({chr(256 + index): value for index, value in enumerate(others)})
    return letters


_BYTE_OF_LETTER = _byte_letters()


def _added_tokens(definition: Mapping[str, Any]) -> list[dict[str, Any]]:
    tokens = definition.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise ModelFileInvalid(f"{FILE_NAME}: 'added_tokens' is not a list; download it again")
    for token in tokens:
        proper = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not proper or type(token.get("id")) is not int or token["id"] < 0:
            raise ModelFileInvalid(f"{FILE_NAME}: an added token is damaged; download it again")
    return tokens


@contextmanager
def _checked() -> Iterator[None]:
    """The library raises a bare Exception for a bad file, and a panic is not even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFileInvalid(f"{FILE_NAME}: cannot be used ({error}); download it again") from None
