"""What the scripted backend answers, how long it takes, and when it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgeinfer.backend import Capabilities, KvLayout
from edgeinfer.errors import LoadFailed
from edgeinfer_backends.scripted_tokenizer import BOS, TURN_END, ByteTokenizer

_REMOVABLE = ("evict", "snapshot", "token_masks", "embeddings", "abort", "rewind", "fork")


@dataclass(frozen=True)
class Script:
    """The table behind a `ScriptedRuntime`. Everything has a default: `Script()` babbles ASCII.

    An answer is pinned when the sequence's cells hold a known prompt followed by a beginning of its
    answer: the answer's next token, and then the end of turn, become 40 logits likelier than the rest.
    In this order:

    next_token(history) -> the next token, or None: any function of the tokens in the cells.
    answers: prompt -> answer. The prompt is a whole prompt as text (control tokens included; bos left
        out) or, in a chat (`<|im_start|>user\\n…<|im_end|>` … `<|im_start|>assistant\\n`), the user's
        last message alone. "*" answers every chat prompt that nothing else matches.
    respond(prompt) -> answer, or None: for the text of a chat prompt, up to and with `prompt_end`.

    What is not pinned is babble: printable ASCII, decided by a hash of the cells and the seed.
    """

    answers: Mapping[str, str] = field(default_factory=dict)
    respond: Callable[[str], str | None] | None = None
    next_token: Callable[[Sequence[int]], int | None] | None = None
    prompt_end: str = "<|im_start|>assistant\n"  # where a chat's prompt ends and the answer begins
    seed: int = 0  # stands for the weights: another seed is another model
    step_s: float = 0.0  # time of one forward step; `abort` interrupts it
    fail_at_step: int | None = None  # the n-th forward, from 1, raises StepFailed
    die_at_step: int | None = None  # the n-th forward ends the process with status 9
    load_steps: int = 4  # calls of `progress` while loading
    load_s: float = 0.0  # time of loading
    load_error: str = ""  # loading fails, saying this
    kv_layout: KvLayout = "shared"
    without: tuple[str, ...] = ()  # capabilities to do without
    order_noise: float = 0.0  # logits of a sequence with cells out of order differ by up to this

    def __post_init__(self) -> None:
        """Raises ValueError naming the field."""
        for name in ("step_s", "load_s", "order_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, not {value}")
        for name in ("fail_at_step", "die_at_step", "load_steps"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        if self.kv_layout not in ("shared", "private"):
            raise ValueError(f"kv_layout is shared or private, not {self.kv_layout!r}")
        if not self.prompt_end:
            raise ValueError("prompt_end must not be empty")
        for name in self.without:
            if name not in _REMOVABLE:
                raise ValueError(f"without: {name!r} is none of {', '.join(_REMOVABLE)}")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(**{name: name not in self.without for name in _REMOVABLE})


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "answers": (dict,),
    "prompt_end": (str,),
    "seed": (int,),
    "step_s": (int, float),
    "fail_at_step": (int,),
    "die_at_step": (int,),
    "load_steps": (int,),
    "load_s": (int, float),
    "load_error": (str,),
    "kv_layout": (str,),
    "without": (list,),
    "order_noise": (int, float),
}
assert set(_JSON_TYPES) | {"respond", "next_token"} == {f.name for f in fields(Script)}


def read_script(path: Path) -> Script:
    """A script from a JSON object with the keys of `Script` (all but the two functions). Unknown keys
    and wrong types are refused. Raises LoadFailed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{path}: the script cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise LoadFailed(f"{path}: a script is a JSON object, not {type(found).__name__}")
    for key, value in found.items():
        if key not in _JSON_TYPES:
            raise LoadFailed(f"{path}: a script has no key {key!r}; known: {', '.join(_JSON_TYPES)}")
        if not _is_valid(key, value):
            raise LoadFailed(f"{path}: {key!r} cannot be {json.dumps(value)[:80]}")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    try:
        return Script(**settings)
    except ValueError as error:
        raise LoadFailed(f"{path}: {error}") from error


def _is_valid(key: str, value: object) -> bool:
    if not isinstance(value, _JSON_TYPES[key]) or isinstance(value, bool):
        return False
    if isinstance(value, dict):
        return all(isinstance(answer, str) for answer in value.values())
    return not isinstance(value, list) or all(isinstance(name, str) for name in value)


class Prompter:
    """Finds the pinned next token, if there is one, for what a sequence's cells hold."""

    def __init__(self, script: Script, tokenizer: ByteTokenizer) -> None:
        self._script = script
        self._tokenizer = tokenizer
        self._prompt_end = self._encode(script.prompt_end)
        self._user_start = self._encode("<|im_start|>user\n")
        answers = [(key, text) for key, text in script.answers.items() if key != "*"]
        pairs = [(self._encode(key), self._encode(text)) for key, text in answers]
        self._raw = sorted(pairs, key=lambda pair: len(pair[0]), reverse=True)
        self._answer_tokens = lru_cache(maxsize=256)(self._encode)

    def next_token(self, history: Sequence[int]) -> int | None:
        if self._script.next_token is not None:
            token = self._script.next_token(history)
            if token is not None:
                return token
        if not self._script.answers and self._script.respond is None:
            return None
        history = [token for token in history if token != BOS]
        end = _find_last(history, self._prompt_end)
        if end is None:
            return self._continue_raw(history)
        prompt = history[: end + len(self._prompt_end)]
        answer = self._answer(prompt)
        return None if answer is None else _next_of(self._answer_tokens(answer), history[len(prompt) :])

    def _continue_raw(self, history: list[int]) -> int | None:
        for prompt, answer in self._raw:
            if history[: len(prompt)] == prompt:
                token = _next_of(answer, history[len(prompt) :])
                if token is not None:
                    return token
        return None

    def _answer(self, prompt: list[int]) -> str | None:
        answers = self._script.answers
        text = self._tokenizer.decode_with_control(prompt)
        if text in answers:
            return answers[text]
        message = self._last_user_message(prompt)
        if message is not None and message in answers:
            return answers[message]
        if self._script.respond is not None:
            answer = self._script.respond(text)
            if answer is not None:
                return answer
        return answers.get("*")

    def _last_user_message(self, prompt: list[int]) -> str | None:
        start = _find_last(prompt, self._user_start)
        if start is None:
            return None
        message = prompt[start + len(self._user_start) :]
        if TURN_END in message:
            message = message[: message.index(TURN_END)]
        return self._tokenizer.decode_with_control(message)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=True)


def _find_last(history: Sequence[int], pattern: Sequence[int]) -> int | None:
    for start in range(len(history) - len(pattern), -1, -1):
        if history[start] == pattern[0] and list(history[start : start + len(pattern)]) == list(pattern):
            return start
    return None


def _next_of(answer: Sequence[int], begun: Sequence[int]) -> int | None:
    """The token after `begun` if that is a beginning of the answer; the end of turn after all of it."""
    if list(begun) == list(answer[: len(begun)]):
        return answer[len(begun)] if len(begun) < len(answer) else TURN_END
    return None
