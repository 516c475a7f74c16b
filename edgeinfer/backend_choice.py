"""Which backend opens a model, and whether in another form than the model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edgeinfer.backend import Backend
from edgeinfer.errors import BackendUnavailable, UnsupportedModel, UsageError
from edgeinfer.registry import backend_names, get_backend

if TYPE_CHECKING:
    from edgeinfer_models.config import ModelConfig
    from edgeinfer_models.conversion.conversion import Container
    from edgeinfer_models.model_files import ModelFormat

AUTO: Final = "auto"
FIRST = "llamacpp"
# Those that are taken without having been asked for, the first one that can be used.
AUTOMATIC = (FIRST, "mlx")
_CONTAINERS: tuple[Container, ...] = ("gguf", "safetensors")


@dataclass(frozen=True)
class BackendChoice:
    """convert_to: the form that the model is converted to first; None: it is opened as it is. reason:
    where `auto` has it converted, why no backend that opens it as it is was taken."""

    backend: str
    convert_to: Container | None = None
    reason: str = ""


def choose_backend(wanted: str, model_format: ModelFormat, config: ModelConfig) -> BackendChoice:
    """wanted: a backend's name, or auto. Backends are asked whether they can be used here; whether
    the model can be converted is seen where it is. Raises BackendUnavailable, UnsupportedModel,
    UsageError."""
    if wanted != AUTO:
        return _asked_for(wanted, model_format, config)
    if model_format == "gguf":  # asked nothing: a start is not to wait for it, and loading says as much
        return BackendChoice(FIRST)
    reasons = []
    for name in AUTOMATIC:
        backend = get_backend(name)
        if model_format in backend.formats:
            reason = _not_its_kind(backend, config) or _unusable(backend)
            if not reason:
                return BackendChoice(name)
            reasons.append(f"{name}: {reason}")
    why_not = "; ".join(reasons)
    for name in AUTOMATIC:
        backend = get_backend(name)
        to = _convertible_to(backend, model_format)
        if to is not None:
            reason = _unusable(backend)
            if not reason:
                return BackendChoice(name, to, why_not)
            reasons.append(f"{name}: {reason}")
    raise BackendUnavailable(f"no backend here runs {model_format} models: {'; '.join(reasons)}")


def backend_of_format(model_format: ModelFormat) -> Backend:
    """The first one that opens it, usable here or not."""
    names = (*AUTOMATIC, *backend_names())
    return get_backend(next(name for name in names if model_format in get_backend(name).formats))


def _asked_for(name: str, model_format: ModelFormat, config: ModelConfig) -> BackendChoice:
    if name not in backend_names():
        raise BackendUnavailable(
            f"there is no backend {name!r}; installed: {', '.join(backend_names())}"
        )
    backend = get_backend(name)
    if model_format not in backend.formats:
        to = _convertible_to(backend, model_format)
        if to is None:
            raise UsageError(
                f"backend {name} opens {', '.join(backend.formats)} models, not {model_format};"
                " leave --backend out to have one chosen"
            )
        choice = BackendChoice(name, to)
    elif reason := _not_its_kind(backend, config):
        raise UnsupportedModel(f"{name} {reason}; leave --backend out to have one chosen")
    else:
        choice = BackendChoice(name)
    if choice != BackendChoice(FIRST):  # said here, with the way out, and not by the worker
        reason = _unusable(backend)
        if reason:
            raise BackendUnavailable(f"{name}: {reason}; or leave --backend out to have one chosen")
    return choice


def runs_type(backend: Backend, model_type: str) -> bool:
    """Whether a backend that opens safetensors takes those of a config.json's type."""
    return not model_type or backend.model_types is None or model_type in backend.model_types


def _not_its_kind(backend: Backend, config: ModelConfig) -> str:
    """Why a backend that opens a model's form does not take the model, as the end of a sentence about
    it; "" if it does."""
    if not runs_type(backend, config.model_type):
        return f"runs {', '.join(sorted(backend.model_types or ()))}, not {config.model_type[:40]}"
    if config.packing and backend.packings is not None and config.packing not in backend.packings:
        return f"does not unpack weights that are packed as {config.packing[:40]}"
    return ""


def _convertible_to(backend: Backend, model_format: ModelFormat) -> Container | None:
    """The form of weights that a backend opens, for a model that has another one."""
    if model_format not in _CONTAINERS:
        return None
    return next((to for to in _CONTAINERS if to in backend.formats and to != model_format), None)


def _unusable(backend: Backend) -> str:
    return backend.lacks()
