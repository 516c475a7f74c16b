"""The user's config file: every option of the command line as a key, and tables for single models.

    ctx = 8192
    temp = 0.5
    kv-type = "q8_0"          # kv_type is the same key

    [model."smollm2"]         # over the keys above, for this model
    system = "Be brief."

A key is named like its long option. A flag beats the EDGEINFER_* variable, the variable the file.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from edgeinfer.errors import EdgeInferError

MAX_BYTES = 256 * 1024

Kind = Literal["whole", "number", "text", "texts", "count", "counts", "size", "switch"]

KEYS: Mapping[str, Kind] = {
    "model": "text",
    "backend": "text",
    "ctx": "whole",
    "threads": "count",
    "gpu-layers": "count",
    "kv-type": "text",
    "kv-type-k": "text",
    "kv-type-v": "text",
    "window": "whole",
    "sinks": "whole",
    "eviction": "text",
    "speculate": "text",
    "draft": "text",
    "replay": "text",
    "load-as": "text",
    "compile": "switch",
    "overflow": "text",
    "cache-ram": "size",
    "cache-disk": "size",
    "cache-dir": "text",
    "no-cache": "switch",
    "seed": "whole",
    "temp": "number",
    "top-p": "number",
    "top-k": "whole",
    "min-p": "number",
    "typical-p": "number",
    "repeat-penalty": "number",
    "presence-penalty": "number",
    "frequency-penalty": "number",
    "dry-multiplier": "number",
    "max-tokens": "whole",
    "system": "text",
    "stop": "texts",
    "schema": "text",
    "raw": "switch",
    "suite": "text",
    "settings": "text",
    "reference": "text",
    "text": "text",
    "tokens": "whole",
    "prompt-tokens": "counts",
    "new-tokens": "counts",
    "streams": "counts",
    "repeat": "whole",
    "warmup": "whole",
    "plot": "text",
    "attach": "text",
    "host": "text",
    "port": "whole",
    "api-key": "text",
    "api-key-file": "text",
    "no-api-key": "switch",
    "allow-origin": "texts",
    "allow-host": "texts",
    "parallel": "whole",
    "queue": "whole",
    "timeout": "text",
    "idle-unload": "text",
    "quiet": "switch",
    "json": "switch",
    "debug": "switch",
}

_KINDS: Mapping[Kind, tuple[tuple[type, ...], str]] = {
    "whole": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "text": ((str,), 'text in quotes, like "…"'),
    "texts": ((str, list), 'text in quotes, or a list of them: ["…", "…"]'),
    "count": ((int, str), 'a whole number or "auto"'),
    "counts": ((int, str), 'a whole number, or several like "128,512"'),
    "size": ((int, str), 'a size, like "512M" or 0'),
    "switch": ((bool,), "true or false"),
}

Value = str | int | float | bool | list[str]


class ConfigInvalid(EdgeInferError):
    """The config file cannot be used: unreadable, not TOML, an unknown key, a value of a wrong type."""


@dataclass(frozen=True)
class Setting:
    """A value of the file, and where it stands, for messages: "…/config.toml: temp"."""

    value: Value
    where: str


@dataclass(frozen=True)
class Config:
    path: Path
    found: bool = False
    general: Mapping[str, Setting] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)

    def lookup(self, key: str, model_names: Sequence[str] = ()) -> Setting | None:
        """model_names: what the model may be called in a [model."…"] table; the first one found wins."""
        for name in model_names:
            if key in self.models.get(name, {}):
                return self.models[name][key]
        return self.general.get(key)


def config_path() -> Path:
    """EDGEINFER_CONFIG, or config.toml in the platform's folder for a user's settings."""
    override = os.environ.get("EDGEINFER_CONFIG")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_config_path("edgeinfer", appauthor=False)) / "config.toml"


def read_config(path: Path | None = None) -> Config:
    """A missing file is an empty one. Raises ConfigInvalid, naming the file and the line or the key."""
    path = path or config_path()
    text = _read_text(path)
    if text is None:
        return Config(path)
    found = _parse(path, text)
    tables: dict[str, Mapping[str, Setting]] = {}
    for name in ("model", "models"):
        if isinstance(found.get(name), dict):
            tables |= _model_tables(path, name, found.pop(name))
    return Config(path, True, _settings(path, found), tables)


def _read_text(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and str(path) != os.devnull:
            raise ConfigInvalid(f"{path}: is not a file; EDGEINFER_CONFIG may name another one")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigInvalid(f"{path}: cannot be read ({reason}); check its permissions") from None
    if len(data) > MAX_BYTES:
        raise ConfigInvalid(f"{path}: is longer than {MAX_BYTES // 1024} KiB; is it a config file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigInvalid(f"{path}: line {line} is not valid UTF-8; save the file as UTF-8") from None


def _parse(path: Path, text: str) -> dict[str, object]:
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        message = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        both = re.search(r"^\s*model\s*=", text, re.M) and re.search(r"^\s*\[\s*model\s*\.", text, re.M)
        hint = '; beside a key `model`, write the tables as [models."NAME"]' if both else ""
        raise ConfigInvalid(f"{path}: is not valid TOML: {message}{hint}") from None


def _model_tables(path: Path, table: str, found: object) -> dict[str, Mapping[str, Setting]]:
    assert isinstance(found, dict)  # noqa: S101 (the caller looked)
    tables: dict[str, Mapping[str, Setting]] = {}
    for name, values in found.items():
        heading = f'[{table}."{name}"]'
        if not isinstance(values, dict):
            raise ConfigInvalid(
                f'{path}: {table}.{name} belongs in a table of one model: [{table}."NAME"]'
            )
        if "model" in values:
            raise ConfigInvalid(f"{path}: {heading} cannot choose another model; remove its key 'model'")
        tables[name] = _settings(path, values, f"{heading} ")
    return tables


def _settings(path: Path, found: Mapping[str, object], heading: str = "") -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for written, value in found.items():
        key = written.replace("_", "-")
        where = f"{path}: {heading}{written}"
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(KEYS)}"
            raise ConfigInvalid(f"{path}: {heading}has an unknown key '{written}'; {hint}")
        if key in settings:
            raise ConfigInvalid(f"{path}: {heading}has '{key}' twice, with - and with _; remove one")
        settings[key] = Setting(_checked(where, KEYS[key], value), where)
    return settings


def _checked(where: str, kind: Kind, value: object) -> Value:
    """The value in the form the option's own parser takes. Raises ConfigInvalid."""
    types, expected = _KINDS[kind]
    proper = isinstance(value, types) and (kind == "switch" or not isinstance(value, bool))
    if proper and isinstance(value, list):
        proper = all(isinstance(item, str) for item in value)
    if not proper:
        raise ConfigInvalid(f"{where} must be {expected}, not {_shown(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigInvalid(f"{where} is a number with more digits than any option takes")
    if kind == "texts" and isinstance(value, str):
        return [value]
    if kind in ("count", "counts", "size"):
        return str(value)
    return value  # type: ignore[return-value]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return repr(value)[:60]
