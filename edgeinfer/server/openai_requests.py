"""What OpenAI's clients send, as pydantic models, and what it means for the engine.

Fields that OpenAI has and this endpoint cannot honour are refused by name; fields nobody here knows are
ignored and named in the answer's warnings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from edgeinfer.client import Message
from edgeinfer.sampling import MAX_SEED, SamplingParams
from edgeinfer.server.errors import ApiError, invalid

MAX_MESSAGES = 2048
MAX_CHOICES = 64
MAX_INPUTS = 2048
MAX_TEMPLATE_VARIABLES = 32

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=512, description="An id that /v1/models lists.")

    @property
    def unknown(self) -> list[str]:
        """Names of fields that mean nothing here, for a warning."""
        return sorted((self.model_extra or {}).keys())[:20]


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
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="-1: to the end of the context."
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = Field(None, max_length=512)

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


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=128)
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
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=-1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=MAX_TEMPLATE_VARIABLES)
    reasoning_effort: str | None = Field(None, max_length=32)
    # Known, and without an effect on what is answered here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    verbosity: str | None = None

    @property
    def longest(self) -> int | None:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if limit == -1 else limit


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
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text or tokens, or a list of them."
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @field_validator("prompt")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if (
            isinstance(value, list)
            and value
            and not isinstance(value[0], int)
            and len(value) > MAX_CHOICES
        ):
            raise ValueError(f"{len(value)} prompts; at most {MAX_CHOICES} are taken at once")
        return value

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [tuple(int(token) for token in self.prompt)]
        return [p if isinstance(p, str) else tuple(p) for p in self.prompt]  # type: ignore[arg-type]


class EmbeddingRequest(_Body):
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)

    @property
    def inputs(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [tuple(int(token) for token in self.input)]
        return [p if isinstance(p, str) else tuple(p) for p in self.input]  # type: ignore[arg-type]


class TokenizeRequest(_Body):
    text: str | None = Field(None, validation_alias=AliasChoices("text", "prompt", "content", "input"))
    messages: list[ChatMessage] | None = Field(None, max_length=MAX_MESSAGES)
    add_special: bool = False
    parse_special: bool = False


class DetokenizeRequest(_Body):
    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] = Field(max_length=2**20)


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
