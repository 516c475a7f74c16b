"""From what a user typed to a checked model: a name, a file, a folder, or nothing at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgeinfer.errors import ModelError, ModelFileInvalid, ModelNotFound, UnsupportedModel
from edgeinfer_models.architectures import MLX_MODEL_TYPES
from edgeinfer_models.catalogue import CATALOGUE, STARTER, suggestion
from edgeinfer_models.chat_template import TemplateSource, template_of, template_of_folder
from edgeinfer_models.config import ModelConfig, config_from_gguf, config_from_hf
from edgeinfer_models.exit_file import SUFFIX as EXIT_SUFFIX
from edgeinfer_models.file_kind import only_pickles, shown
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.gguf_model import is_later_shard, read_gguf_model
from edgeinfer_models.hub_installed import find_hub_model
from edgeinfer_models.hub_name import is_hub_name
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.safetensors_header import read_safetensors_folder, read_safetensors_header
from edgeinfer_models.store import InstalledModel, find_model, last_used, list_models

Origin = Literal["catalogue", "hub", "file", "folder"]
PullMissing = Callable[[str], object]  # given a name of the catalogue or the hub; installs it or raises


@dataclass(frozen=True)
class ResolvedModel:
    spec: str  # what to give to `store.record_last_used`: a name or an absolute path
    files: ModelFiles
    config: ModelConfig
    header: GgufHeader | None
    template: TemplateSource
    origin: Origin
    installed: InstalledModel | None = None
    notes: tuple[str, ...] = ()  # what the user should know about the choice, one line each


def resolve_model(spec: str | None, *, pull_missing: PullMissing | None = None) -> ResolvedModel:
    """Find a model, check its files, and say what it is.

    spec: MODEL of the command line; None for the last one used, else the starter. A name wins over a
    file of that name (`./smollm2` is the file). pull_missing: called with the name of a catalogue or hub
    model that is not installed. Raises ModelError's subclasses, one line each.
    """
    if spec is None:
        return _resolve_default(pull_missing)
    if not spec.strip():
        raise ModelNotFound("the model's name is empty; `edgeinfer models list` shows what there is")
    if is_hub_name(spec):
        return _from_store(_installed(spec, find_hub_model, pull_missing))
    if spec in CATALOGUE:
        return _from_store(_installed(spec, find_model, pull_missing))
    installed = find_model(spec)
    return _from_path(spec) if installed is None else _from_store(installed)


def _resolve_default(pull_missing: PullMissing | None) -> ResolvedModel:
    remembered = last_used()
    if remembered is None or remembered == STARTER:
        return resolve_model(STARTER, pull_missing=pull_missing)
    try:
        # Gigabytes are fetched for a model that was named, not for one that was remembered.
        return resolve_model(remembered, pull_missing=None if is_hub_name(remembered) else pull_missing)
    except ModelError as error:
        note = f"the model used last cannot be used ({error}); taking {STARTER} instead"
        starter = resolve_model(STARTER, pull_missing=pull_missing)
        return replace(starter, notes=(note, *starter.notes))


def _installed(
    spec: str, find: Callable[[str], InstalledModel | None], pull_missing: PullMissing | None
) -> InstalledModel:
    """The store's model of that name, fetched if it is not there. Raises ModelNotFound."""
    installed = find(spec)
    if installed is None:
        if pull_missing is None:
            raise ModelNotFound(
                f"model '{shown(spec)}' is not installed; run `edgeinfer models pull {shown(spec)}`"
            )
        pull_missing(spec)
        installed = find(spec)
    if installed is None:
        raise ModelNotFound(
            f"model '{shown(spec)}' is not installed although it was pulled; pull it again"
        )
    return installed


def _from_store(installed: InstalledModel) -> ResolvedModel:
    origin: Origin = "hub" if is_hub_name(installed.name) else "catalogue"
    model = _from_gguf(installed.path, installed.name, origin)
    files = replace(model.files, digest=installed.manifest.sha256)
    return replace(model, spec=installed.name, files=files, installed=installed)


def _from_path(spec: str) -> ResolvedModel:
    try:
        path = Path(spec).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _not_found(spec) from None
    except (OSError, ValueError, RuntimeError) as error:  # too long; a zero byte; no home for ~
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelNotFound(f"{shown(spec)}: cannot be opened ({reason}); check the path") from None
    if stat.S_ISDIR(mode):
        return _from_folder(path)
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return _from_safetensors(path)
    return _from_gguf(path, path.stem, "file")


def _from_folder(folder: Path) -> ResolvedModel:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelFileInvalid(
            f"{shown(folder)}: cannot be listed ({error.strerror}); check its permissions"
        ) from None
    found = [folder / name for name in names if name.endswith(".gguf") and not name.startswith(".")]
    candidates = [
        path
        for path in found
        if not is_later_shard(path) and not path.name.startswith("mmproj") and not _is_exit(path)
    ]
    if len(candidates) == 1:
        return _from_gguf(candidates[0], folder.resolve().name, "folder")
    if candidates:
        some = ", ".join(p.name for p in candidates[:4]) + (", …" if len(candidates) > 4 else "")
        raise ModelNotFound(
            f"{shown(folder)}: has {len(candidates)} GGUF models ({some}); give the path of one"
        )
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return _from_hf_folder(folder, "folder")
    why = only_pickles(names) or "has no .gguf model in it; give a model file or a folder with one"
    raise ModelNotFound(f"{shown(folder)}: {why}")


def _from_gguf(path: Path, name: str, origin: Origin) -> ResolvedModel:
    if _is_exit(path):
        raise UnsupportedModel(
            f"{shown(path)}: is the exit of a model, not a model; give the model, and this to --draft"
        )
    header = read_gguf_model(path)
    config = config_from_gguf(header)
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.num_bytes
    files = ModelFiles(name, header.shards, "gguf", weight_types=tuple(sorted(sizes.items())))
    return ResolvedModel(
        spec=str(path.absolute()),
        files=files,
        config=config,
        header=header,
        template=template_of(header),
        origin=origin,
    )


def _is_exit(path: Path) -> bool:
    return path.name.endswith(EXIT_SUFFIX)


def _from_safetensors(path: Path) -> ResolvedModel:
    """One file, or an index, of a folder that has the rest of the model."""
    if path.name.endswith(".safetensors"):
        read_safetensors_header(path)
    if not (path.parent / "config.json").is_file():
        raise UnsupportedModel(
            f"{shown(path)}: are weights without the config.json that says what they are; give the"
            " model's whole folder, or use a .gguf of this model"
        )
    model = _from_hf_folder(path.parent, "file")
    if path.name.endswith(".safetensors") and path not in model.files.paths:
        raise UnsupportedModel(
            f"{shown(path)}: is not part of the model that is described beside it; give a folder of its"
            " own"
        )
    return model


def _from_hf_folder(folder: Path, origin: Origin) -> ResolvedModel:
    config = config_from_hf(folder)
    found = read_safetensors_folder(folder)
    kind = found.config.get("model_type")
    _check_type(folder, kind)
    sizes: dict[str, int] = {}
    for tensor in found.tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    paths = tuple(shard.path for shard in found.shards)
    types = tuple(sorted(sizes.items()))
    return ResolvedModel(
        spec=str(folder.absolute()),
        files=ModelFiles(folder.resolve().name, paths, "safetensors", weight_types=types),
        config=config,
        header=None,
        template=template_of_folder(folder),
        origin=origin,
    )


def _check_type(folder: Path, model_type: object) -> None:
    """Some backend runs it, or it can be converted for one. Raises UnsupportedModel."""
    if isinstance(model_type, str) and model_type in MLX_MODEL_TYPES:
        return
    from edgeinfer_models.families import NAMES, is_known

    if not is_known(model_type):
        raise UnsupportedModel(
            f"{shown(folder)}: safetensors weights of the type {shown(str(model_type))} cannot be run or"
            f" converted in this version (supported: {', '.join(NAMES)}); use a .gguf of this model"
        )


def _not_found(spec: str) -> ModelNotFound:
    if os.sep in spec or spec.endswith((".gguf", ".safetensors")) or spec.startswith(("~", ".")):
        return ModelNotFound(f"{shown(spec)}: no such file or folder; check the path")
    from edgeinfer_models.converted import list_converted

    source = next((each.source for each in list_converted() if each.name == spec), None)
    if source is not None:
        return ModelNotFound(f"'{spec}' is what a model was converted to; give the model: {source}")
    known = {*CATALOGUE, *(model.name for model in list_models().models)}
    return ModelNotFound(
        f"'{shown(spec)}' is neither a model's name nor a file{suggestion(spec, sorted(known))}"
    )
