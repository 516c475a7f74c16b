"""A model in the form that its backend opens: as it is, as it was converted once, or converted now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.backend import Backend
from edgeinfer.backend_choice import AUTO, BackendChoice, backend_of_format, choose_backend, runs_type
from edgeinfer.errors import ConversionFailed, EdgeInferError, UnsupportedModel
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import ResolvedModel, resolve_model

if TYPE_CHECKING:
    from edgeinfer_models.conversion.conversion import Container
    from edgeinfer_models.conversion.model import SourceModel
    from edgeinfer_models.converted import ConvertedModel

Converting = Callable[[str, float], None]  # given what is being done, and the share that is done


def in_its_form(
    resolved: ResolvedModel, choice: BackendChoice, to: Container, converting: Converting | None
) -> tuple[ResolvedModel, list[str]]:
    """The model in the form that its backend opens, made if it is not there, and what is to be said of
    it. Raises ConversionFailed, ModelFileInvalid, UnsupportedModel."""
    from edgeinfer_models.conversion.conversion import CONTAINER_NAMES
    from edgeinfer_models.converted import find_converted, make_converted

    files = resolved.files
    found = find_converted(files, to)
    if found is not None:
        return _resolved_as(resolved, found), [_told_again(files, found), *found.notes]
    if converting is None:
        raise ConversionFailed(
            f"{files.name} has to be converted to {CONTAINER_NAMES[to]} for {choice.backend} first; the"
            " next `edgeinfer run` or `chat` with it does that"
        )
    begin = f"converting {files.name} to {CONTAINER_NAMES[to]} (only once)"
    wait = f"waiting for another edgeinfer that is converting {files.name}"
    converting(begin, 0.0)
    try:
        found = make_converted(
            _source_for(choice.backend, files, to),
            files,
            to,
            lambda done: converting(begin, done),
            lambda: converting(wait, 0.0),
        )
    except UnsupportedModel as error:
        opens = f"{choice.backend} does not open {files.format} models"
        reason = f"{choice.reason}; and {opens}" if choice.reason else opens
        raise UnsupportedModel(f"{reason}, and this one cannot be converted: {error}") from None
    return _resolved_as(resolved, found), [_told(files, choice, found), *found.notes]


def predicted_form(resolved: ResolvedModel) -> tuple[Backend, ResolvedModel]:
    """The backend that would be chosen for a model, and the model in the form that it would get."""
    from edgeinfer_models.conversion.conversion import kept_dtype, prepare_conversion
    from edgeinfer_models.converted import find_converted, source_of

    files = resolved.files
    try:
        choice = choose_backend(AUTO, files.format, resolved.config)
        if choice.convert_to is None:
            return get_backend(choice.backend), resolved
        found = find_converted(files, choice.convert_to)
        if found is not None:
            return get_backend(choice.backend), _resolved_as(resolved, found)
        dtype = kept_dtype(files.weight_types)
        planned = prepare_conversion(source_of(files), choice.convert_to, dtype, Path())
    except EdgeInferError:  # opening it says why not
        return backend_of_format(files.format), resolved
    config = replace(resolved.config, weights=(), weights_bytes=planned.num_bytes, quantization=dtype)
    files = replace(files, format=choice.convert_to, weight_types=((dtype, planned.num_bytes),))
    return get_backend(choice.backend), replace(resolved, config=config, files=files)


def _source_for(backend_name: str, files: ModelFiles, to: Container) -> SourceModel:
    """Raises ModelFileInvalid, UnsupportedModel; also where the backend would not run the result."""
    from edgeinfer_models.converted import source_of

    source, backend = source_of(files), get_backend(backend_name)
    if to == "safetensors" and not runs_type(backend, source.model_type):
        types = ", ".join(sorted(backend.model_types or ()))
        raise UnsupportedModel(
            f"it would be of the type {source.model_type}, and {backend_name} runs {types}"
        )
    return source


def _resolved_as(resolved: ResolvedModel, found: ConvertedModel) -> ResolvedModel:
    """What was converted, under the original's name and with its chat template."""
    converted = resolve_model(str(found.path))
    files = replace(converted.files, name=resolved.files.name)
    return replace(resolved, files=files, config=converted.config, header=converted.header)


def _told(files: ModelFiles, choice: BackendChoice, found: ConvertedModel) -> str:
    weights = f"{found.source_type} to {found.dtype}"
    if found.source_type == found.dtype:
        weights = f"{found.dtype} weights as they are"
    why = f" ({choice.reason})" if choice.reason else ""
    return (
        f"{files.name} was converted to {_form(found)} for {choice.backend}{why}: {weights};"
        f" {_size(found)} of disk keep it for the next time;"
        f" `edgeinfer models rm {found.name}` frees them"
    )


def _told_again(files: ModelFiles, found: ConvertedModel) -> str:
    return (
        f"{files.name} runs as converted to {_form(found)} ({found.dtype}, {_size(found)} of disk;"
        f" `edgeinfer models rm {found.name}`)"
    )


def _form(found: ConvertedModel) -> str:
    from edgeinfer_models.conversion.conversion import CONTAINER_NAMES

    return CONTAINER_NAMES[found.to]


def _size(found: ConvertedModel) -> str:
    return f"{found.num_bytes / 1e6:,.1f} MB"
