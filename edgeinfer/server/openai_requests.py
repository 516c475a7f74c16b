"""What OpenAI's clients send, as pydantic models, and what it means for the engine.

Fields that OpenAI has and this endpoint cannot honour are refused by name; fields nobody here knows are
ignored and named in the answer's warnings.

A body is validated in the event loop, so no body may be long to refuse: every list ends at its first
error, and what may be one of several types is looked at as one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from edgeinfer.client import Message
from edgeinfer.engine.request import MAX_STOP_STRINGS
from edgeinfer.sampling import MAX_SEED, SamplingParams
from edgeinfer.server.errors import ApiError, invalid

MAX_MESSAGES = 2048
MAX_CHOICES = 64
MAX_INPUTS = 2048
MAX_TEMPLATE_VARIABLES = 32
MAX_TOKENS = 2**20  # of one prompt
MAX_CONTENT_PARTS = 1024
MAX_BIASES = 4096

_One = TypeVar("_One")
Few = Annotated[list[_One], Field(fail_fast=True)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[Few[Token], Field(max_length=MAX_TOKENS)]


def refused(message: str) -> PydanticCustomError:
    """For validators: what is said behind the field's name."""
    return PydanticCustomError("refused", "{said}", {"said": message})


def _length(value: int | None) -> int | None:
    if value == 0:
        raise refused("must be at least 1, or -1 for the rest of the context")
    return value


Length = Annotated[int | None, Field(ge=-1, le=2**31 - 1), AfterValidator(_length)]

_TOKENS: TypeAdapter[list[int]] = TypeAdapter(Tokens)
_TOKEN_LISTS: TypeAdapter[list[list[int]]] = TypeAdapter(Few[Tokens])
_TEXTS: TypeAdapter[list[str]] = TypeAdapter(Few[str])


def _texts_or_tokens(most: int) -> Callable[[Any], Any]:
    """most: texts, or lists of tokens."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise refused("must be a text, tokens, or a list of either")
        first = value[0] if value else ""
        if isinstance(first, int | float):
            return _TOKENS.validate_python(value)
        if len(value) > most:
            raise refused(f"has {len(value)} entries; at most {most} are taken at once")
        lists = _TOKEN_LISTS if isinstance(first, list) else _TEXTS
        return lists.validate_python(value)

    return read


_TextsOrTokens = str | list[str] | list[int] | list[list[int]]


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused("must be a text or a list of texts")
    if len(value) > MAX_STOP_STRINGS:
        raise refused(f"has {len(value)} texts; at most {MAX_STOP_STRINGS} are taken")
    return _TEXTS.validate_python(value)


Stop = Annotated[
    str | list[str] | None, PlainValidator(_stop, json_schema_input_type=str | list[str] | None)
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=512, description="An id that /v1/models lists.")

    @property
    def unknown(self) -> list[str]:
        """Names of fields that mean nothing here, for a warning."""
        return sorted(islice(self.model_extra or {}, 20))


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Generate(_Body):
    """What /v1/chat/completions and /v1/completions share."""

    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    typical_p: float | None = Field(None, ge=0.0, le=1.0)
    repeat_penalty: float | None = Field(
        None, gt=0.0, le=10.0, validation_alias=AliasChoices("repeat_penalty", "repetition_penalty")
    )
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    dry_multiplier: float | None = Field(None, ge=0.0, le=100.0)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop = None
    max_tokens: Length = Field(None, description="-1: to the end of the context.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = Field(None, max_length=512)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_BIASES:
            raise refused(f"has {len(value)} tokens; at most {MAX_BIASES} are taken")
        return value

    @property
    def asked_length(self) -> int | None:
        """-1: to the end of the context. None: the request does not say."""
        return self.max_tokens

    def most_tokens(self, default: int | None) -> int | None:
        """What `Request.max_tokens` takes: None is to the end of the context. default: where the request
        does not say."""
        asked = self.asked_length
        if asked is None:
            return default
        return None if asked == -1 else asked

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` with what the request says. Raises UsageError."""
        named = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repeat_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "dry_multiplier": self.dry_multiplier,
        }
        values: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        for name in ("top_p", "typical_p"):
            if values.get(name) == 0.0:  # "only the likeliest", which some clients mean by it
                values[name], values["top_k"] = 1.0, 1
        if values.get("top_k") == -1:  # off, as vLLM's clients write it
            values["top_k"] = 0
        if self.logit_bias:
            values["logit_bias"] = tuple(_biases(self.logit_bias))
        if self.seed is not None:
            values["seed"] = self.seed % (MAX_SEED + 1)
        return replace(defaults, **values)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)


def _biases(found: Mapping[str, float]) -> list[tuple[int, float]]:
    biases = []
    for key, bias in found.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise invalid(f"logit_bias {key[:20]!r} is no token id", "logit_bias")
        biases.append((int(key), bias))
    return biases


# -- chat ------------------------------------------------------------------------------------------


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str = Field(max_length=64)
    text: str | None = None


_PARTS: TypeAdapter[list[ContentPart]] = TypeAdapter(Few[ContentPart])


def _content(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused("must be a text or a list of parts")
    if len(value) > MAX_CONTENT_PARTS:
        raise refused(f"has {len(value)} parts; at most {MAX_CONTENT_PARTS} are taken")
    return _PARTS.validate_python(value)


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | list[ContentPart] | None,
        PlainValidator(_content, json_schema_input_type=str | list[ContentPart] | None),
    ] = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Few[dict[str, Any]] | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = Field("schema", max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class FunctionName(BaseModel):
    name: str = Field(max_length=64)


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: FunctionName


class ChatRequest(_Generate):
    messages: Few[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Length = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Few[dict[str, Any]] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=MAX_TEMPLATE_VARIABLES)
    reasoning_effort: str | None = Field(None, max_length=32)
    # Known, and without an effect on what is answered here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: Few[str] | None = Field(None, max_length=8)
    audio: Any = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    verbosity: str | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise refused("needs logprobs: true")
        return value

    @field_validator("modalities")
    @classmethod
    def _text_only(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and set(value) != {"text"}:
            raise refused('must be ["text"]: this endpoint answers in text only')
        return value

    @field_validator("audio")
    @classmethod
    def _no_audio(cls, value: Any) -> None:
        if value is not None:
            raise refused("is not supported: this endpoint answers in text only")

    @property
    def asked_length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def message_of(index: int, message: ChatMessage) -> Message:
    """In the Hugging Face convention. Raises ApiError for what is no text."""
    extra: dict[str, Any] = {}
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            extra[name] = value
    role = "system" if message.role == "developer" else message.role
    return Message("tool" if role == "function" else role, _text_of(index, message.content), extra)


def _text_of(index: int, content: str | Sequence[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for place, part in enumerate(content):
        where = f"messages[{index}].content[{place}]"
        if part.type not in ("text", "refusal", "input_text"):
            raise invalid(
                f"{where} is of type {part.type!r}, and this model reads text only; remove that part",
                where,
            )
        texts.append(part.text or str((part.model_extra or {}).get("refusal") or ""))
    return "\n".join(texts)


# -- the others ------------------------------------------------------------------------------------


class CompletionRequest(_Generate):
    prompt: Annotated[
        _TextsOrTokens,
        PlainValidator(_texts_or_tokens(MAX_CHOICES), json_schema_input_type=_TextsOrTokens),
    ] = Field(description="A text or tokens, or a list of them.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        return _each(self.prompt)


class EmbeddingRequest(_Body):
    input: Annotated[
        _TextsOrTokens,
        PlainValidator(_texts_or_tokens(MAX_INPUTS), json_schema_input_type=_TextsOrTokens),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)

    @property
    def inputs(self) -> list[str | tuple[int, ...]]:
        return _each(self.input)


def _each(found: _TextsOrTokens) -> list[str | tuple[int, ...]]:
    if isinstance(found, str):
        return [found]
    if found and isinstance(found[0], int):
        return [tuple(found)]
    return [one if isinstance(one, str) else tuple(one) for one in found]  # type: ignore[arg-type]


class TokenizeRequest(_Body):
    text: str | None = Field(None, validation_alias=AliasChoices("text", "prompt", "content", "input"))
    messages: Few[ChatMessage] | None = Field(None, max_length=MAX_MESSAGES)
    add_special: bool = False
    parse_special: bool = False


class DetokenizeRequest(_Body):
    tokens: Tokens


__all__ = [
    "ApiError",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "TokenizeRequest",
    "message_of",
]
