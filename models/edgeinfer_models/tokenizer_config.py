"""What a Hugging Face folder says about its tokens and its chat template, beside tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.safetensors_header import read_json

_MAX_TEMPLATE_BYTES = 4 << 20


@dataclass(frozen=True)
class TokenizerConfig:
    """`bos` and `eos` are texts, "" where there is none; `eos_ids` are all that end an answer."""

    bos: str
    eos: str
    eos_ids: tuple[int, ...]
    chat_template: str  # "" where there is none


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """From tokenizer_config.json, chat_template.jinja, generation_config.json and config.json, as far
    as they are there. Raises ModelFileInvalid for one that cannot be read."""
    values = _optional(folder / "tokenizer_config.json")
    generation, model = _optional(folder / "generation_config.json"), _optional(folder / "config.json")
    ends = [*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]
    return TokenizerConfig(
        bos=_text(values.get("bos_token")),
        eos=_text(values.get("eos_token")),
        eos_ids=tuple(dict.fromkeys(ends)),
        chat_template=_chat_template(folder, values.get("chat_template")),
    )


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


def _text(value: Any) -> str:
    """A token as tokenizer_config.json writes it: its text, or an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and token >= 0]


def _chat_template(folder: Path, value: Any) -> str:
    """The file wins over the key; of several named templates the one named "default" is taken."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            if path.stat().st_size > _MAX_TEMPLATE_BYTES:
                raise ModelFileInvalid(f"{path.name}: is too long to be a chat template; check the file")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileInvalid(f"{path.name}: cannot be read ({error}); check the file") from None
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""
