"""From a checked folder to a runtime: mlx-lm's loader on a staged folder, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeinfer.backend import Progress, RuntimeSettings
from edgeinfer.errors import EdgeInferError, LoadFailed
from edgeinfer_backends.mlx.checked_folder import CheckedFolder
from edgeinfer_backends.mlx.devices import chosen_kind, on_device, prepare_cpu
from edgeinfer_backends.mlx.model import MlxModel
from edgeinfer_backends.mlx.runtime import MlxRuntime
from edgeinfer_models.hf_tokenizer import read_hf_tokenizer


def load_runtime(folder: CheckedFolder, settings: RuntimeSettings, progress: Progress) -> MlxRuntime:
    """Raises LoadFailed, UnsupportedModel, ModelError's of the tokenizer; ValueError for settings that
    cannot be."""
    for name in ("context", "sequences", "step_tokens", "logit_rows"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(settings, name)}")
    name = folder.files.name
    kind = chosen_kind(settings)
    if kind == "cpu":
        prepare_cpu()
    tokenizer = read_hf_tokenizer(folder.folder, folder.vocab_size)
    with _mapped(name), on_device(kind):
        with folder.staged() as path:
            model = MlxModel(_build(path))
            _read_weights(name, model, progress)
        runtime = MlxRuntime(model, tokenizer, folder, settings, kind)
    if not progress(1.0):
        runtime.close()
        raise _cancelled(name)
    return runtime


def _build(path: Path) -> Any:
    """mlx-lm's model over weights that have not been read yet."""
    load_model = _mlx_lm_loader()
    model, _ = load_model(path, lazy=True, strict=True, trust_remote_code=False)
    return model


def _mlx_lm_loader() -> Callable[..., tuple[Any, Any]]:
    """Importing mlx-lm lowers the process's limits of open files for good, and fails where they are
    lower already: it does not get to."""
    import resource

    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        from mlx_lm.utils import load_model
    finally:
        resource.setrlimit = original
    loader: Callable[..., tuple[Any, Any]] = load_model
    return loader


def _read_weights(name: str, model: MlxModel, progress: Progress) -> None:
    groups = model.weight_groups()
    for done, group in enumerate(groups):
        if not progress(done / (len(groups) + 1)):
            raise _cancelled(name)
        model.evaluate(group)


def _cancelled(name: str) -> LoadFailed:
    return LoadFailed(f"loading {name} was cancelled")


@contextmanager
def _mapped(name: str) -> Iterator[None]:
    try:
        yield
    except EdgeInferError:
        raise
    except Exception as error:  # mlx raises ValueError and RuntimeError, mlx-lm whatever Python does
        raise LoadFailed(f"{name}: MLX refused the model ({type(error).__name__}: {error})") from error
