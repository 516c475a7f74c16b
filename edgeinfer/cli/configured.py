"""Defaults that the user set: the EDGEINFER_* variables and the config file, below the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from edgeinfer.config import KEYS, Config, ConfigInvalid, Setting, read_config
from edgeinfer.errors import ModelError

Context = Any  # typer's or click's; see command.py

_FIRST_OF_TWO = "arguments"  # run's positionals: [MODEL] PROMPT


class FileDefaults(dict[str, Any]):
    """A context's `default_map`: parameter name -> value of the config file, which is read when the
    first parameter asks. Parameters that say which model it is about are eager, so that its table
    counts for all others."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self._ctx = ctx
        self._config: Config | None = None
        self._model_names: tuple[str, ...] | None = None
        self._keys = {
            param.name: option.lstrip("-")
            for param in ctx.command.params
            for option in param.opts
            if option.lstrip("-") in KEYS
        }

    @staticmethod
    def of(ctx: Context) -> FileDefaults:
        return cast(FileDefaults, ctx.default_map)

    def get(self, name: str, default: Any = None) -> Any:
        setting = self.setting(name)
        return default if setting is None else setting.value

    def setting(self, name: str) -> Setting | None:
        """Raises ConfigInvalid."""
        key = self._keys.get(name)
        if key is None:
            return None
        if key == "stop" and os.environ.get("EDGEINFER_STOP"):
            # click would split it at blanks, which stop strings may have.
            return Setting([os.environ["EDGEINFER_STOP"]], "EDGEINFER_STOP")
        try:
            config = self._read()
        except ConfigInvalid:
            # Help, completion and commands that run no model (doctor, to find this out) still work.
            if self._ctx.resilient_parsing or set(self._keys.values()) <= {"json", "debug"}:
                return None
            raise
        return config.lookup(key, () if key == "model" else self._names(config))

    def chosen_model(self) -> Setting | None:
        """MODEL, where the user chose one at all; `where` is empty if on the command line."""
        given = self._ctx.params.get(_FIRST_OF_TWO)
        if given is not None and len(given) > 1:
            return Setting(given[0], "")
        params = {param.name: param for param in self._ctx.command.params}
        if self._ctx.params.get("model") and source_of(self._ctx, params["model"]) is None:
            return Setting(self._ctx.params["model"], "")
        if os.environ.get("EDGEINFER_MODEL"):
            return Setting(os.environ["EDGEINFER_MODEL"], "EDGEINFER_MODEL")
        return self._read().lookup("model")

    def _read(self) -> Config:
        if self._config is None:
            self._config = read_config()
        return self._config

    def _names(self, config: Config) -> tuple[str, ...]:
        if not config.models:
            return ()
        if self._model_names is None:
            chosen = self.chosen_model()
            self._model_names = _names_of(None if chosen is None else str(chosen.value))
        return self._model_names


def typed_options(ctx: Context) -> frozenset[str]:
    """The options of the command line, by their long names."""
    return frozenset(
        option
        for param in ctx.command.params
        for option in param.opts
        if getattr(ctx.get_parameter_source(param.name), "name", "") == "COMMANDLINE"
    )


def source_of(ctx: Context, param: Any) -> str | None:
    """Where a value comes from that was not typed: a variable, or a place in the config file."""
    source = getattr(ctx.get_parameter_source(param.name), "name", "")
    if source == "ENVIRONMENT":
        return str(param.envvar)
    setting = FileDefaults.of(ctx).setting(param.name) if source == "DEFAULT_MAP" else None
    return None if setting is None else setting.where


def is_model_name(word: str) -> bool:
    """Whether somebody who wrote this one word meant a model."""
    from edgeinfer_models.catalogue import CATALOGUE
    from edgeinfer_models.hub_name import is_hub_name
    from edgeinfer_models.store import find_model

    if word in CATALOGUE:
        return True
    if (is_hub_name(word) or word.lower().endswith(".gguf")) and " " not in word:
        return True
    try:
        return find_model(word) is not None
    except ModelError:  # it is there, and damaged
        return True


def _names_of(spec: str | None) -> tuple[str, ...]:
    """What a [model."…"] table may call this model: as the user gives it, and the model's name."""
    from edgeinfer_models.hub_name import is_hub_name

    if spec is None:
        from edgeinfer_models.catalogue import STARTER
        from edgeinfer_models.store import last_used

        spec = last_used() or STARTER
    if is_hub_name(spec):  # its table may leave the file out: [model."hf:owner/repo"]
        return (spec, spec.rpartition(":")[0] if spec.count(":") > 1 else spec)
    return (spec, Path(spec).name, Path(spec).stem)
