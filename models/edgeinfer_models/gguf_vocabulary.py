"""Whether llama.cpp can load a GGUF vocabulary without aborting. Source: llama-vocab.cpp, 0.3.36."""

from __future__ import annotations

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.architectures import DRAFT_ONLY
from edgeinfer_models.gguf_format import GgufArray, iter_strings
from edgeinfer_models.gguf_header import GgufHeader

# tokenizer.ggml.model -> kind, as llama_vocab::impl::load reads it.
TOKENIZERS = {
    "llama": "spm",
    "gpt2": "bpe",
    "hybriddna": "bpe",
    "whitespace": "bpe",
    "gemma4": "bpe",
    "bert": "wpm",
    "t5": "ugm",
    "rwkv": "rwkv",
    "plamo2": "plamo2",
    "no_vocab": "none",
    "none": "none",
}
# A wrong one of these ends no answer; llama.cpp ignores bad ids of the others (padding, infill …).
_CHECKED_IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
_IDS = (*_CHECKED_IDS, "unknown_token_id", "seperator_token_id", "padding_token_id", "mask_token_id")
_BOOLS = (
    "add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces",
)  # fmt: skip


def check_vocabulary(header: GgufHeader) -> None:
    """Raises ModelFileInvalid or UnsupportedModel."""
    model = header.get("tokenizer.ggml.model")
    if model is None and header.architecture in DRAFT_ONLY:
        return
    if not isinstance(model, str):
        raise _invalid(header, "'tokenizer.ggml.model' is missing")
    kind = TOKENIZERS.get(model)
    if kind is None:
        raise UnsupportedModel(
            f"{header.path.name}: tokenizer '{model}' is unknown to this build's llama.cpp;"
            " update edgeinfer, or use another model"
        )
    _check_types(header)
    if kind == "none":
        return
    tokens = _string_array(header, "tokenizer.ggml.tokens")
    if tokens is None or not tokens:
        raise _invalid(header, "'tokenizer.ggml.tokens' is missing or empty")
    _check_parallel_arrays(header, len(tokens))
    _check_special_ids(header, len(tokens))
    needs_merges = kind == "bpe" and header.get_str("tokenizer.ggml.pre") != "kimi-k2"
    if needs_merges and header.types.get("tokenizer.ggml.merges") != "[str]":
        raise _invalid(header, "'tokenizer.ggml.merges' is missing")
    # GGML_ASSERT(id_to_token.size() == token_to_id.size()), of C strings, where an empty one is named.
    named = [token.partition(b"\0")[0] or b"[EMPTY_%d]" % i for i, token in enumerate(tokens)]
    unique = set(named)
    if len(unique) != len(named):
        raise _invalid(header, f"its vocabulary has {len(named) - len(unique)} tokens twice")
    if kind == "spm":
        _check_byte_tokens(header, unique)


def _string_array(header: GgufHeader, key: str) -> list[bytes] | None:
    if header.types.get(key) != "[str]":
        return None
    value = header.get(key)
    if isinstance(value, GgufArray):
        return list(iter_strings(value.read_bytes(), value.length))
    return [str(item).encode() for item in value] if isinstance(value, list) else None


def _check_types(header: GgufHeader) -> None:
    """get_key throws when a type is another than it expects; say which."""
    expected: dict[str, tuple[str, ...]] = {f"tokenizer.ggml.{key}": ("bool",) for key in _BOOLS}
    expected |= {f"tokenizer.ggml.{key}": ("u32",) for key in _IDS}
    expected["tokenizer.ggml.pre"] = ("str",)
    expected["tokenizer.ggml.scores"] = ("[f32]", "[i32]")
    expected["tokenizer.ggml.token_type"] = ("[i32]",)
    expected["tokenizer.ggml.suppress_tokens"] = ("[i32]",)
    expected["tokenizer.ggml.precompiled_charsmap"] = ("[i8]", "[u8]")
    for key, kinds in expected.items():
        kind = header.types.get(key)
        if kind is not None and kind not in kinds:
            raise _invalid(header, f"'{key}' has the type {kind}, not {kinds[0]}")


def _check_parallel_arrays(header: GgufHeader, num_tokens: int) -> None:
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        length = header.get_length(key)
        if length is not None and length != num_tokens:
            raise _invalid(header, f"'{key}' has {length:,} elements for {num_tokens:,} tokens")


def _check_special_ids(header: GgufHeader, num_tokens: int) -> None:
    for key in _CHECKED_IDS:
        token = header.get_int(f"tokenizer.ggml.{key}", 0)
        if token >= num_tokens:
            raise _invalid(
                header, f"'tokenizer.ggml.{key}' is {token:,} in a vocabulary of {num_tokens:,}"
            )


def _check_byte_tokens(header: GgufHeader, tokens: set[bytes]) -> None:
    # Text outside the vocabulary falls back to these; `.at()` on a missing one ends the process.
    for byte in range(256):
        if b"<0x%02X>" % byte not in tokens and bytes((byte,)) not in tokens:
            raise UnsupportedModel(
                f"{header.path.name}: its vocabulary has no token <0x{byte:02X}>, so llama.cpp"
                " would stop at"
                " text it does not know; convert the model again with byte fallback"
            )


def _invalid(header: GgufHeader, what: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"{header.path.name}: {what}; the file is damaged, download it again")
