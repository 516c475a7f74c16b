"""Which GGUF of a repository is meant, where it has several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from edgeinfer.errors import ModelNotFound, UnsupportedModel, one_line
from edgeinfer_models.gguf_model import SHARD_NAME
from edgeinfer_models.hub_name import HubName, is_safe_path

# Q4_K_M first, as llama.cpp and Ollama choose it; then what is nearest to it in size and quality.
PREFERENCE = (
    "Q4_K_M", "Q4_0", "Q4_K_S", "Q4_K_L", "Q4_K_XL", "UD-Q4_K_XL", "IQ4_NL", "IQ4_XS", "Q4_1", "MXFP4",
    "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "Q3_K_M", "Q3_K_L", "BF16", "F16", "F32",
)  # fmt: skip

MAX_SHARDS = 1000

_TAG = re.compile(
    r"(?:^|[-._ ])((?:UD-)?(?:I?Q[1-9](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))"
    r"(?=[-._ ]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Candidate:
    """A model of a repository: one file, or the shards of one."""

    files: tuple[str, ...]  # paths in the repository, shards in order
    tag: str  # the quantization its name states, in capitals; "" if none

    @property
    def path(self) -> str:
        return self.files[0]


@dataclass(frozen=True)
class Choice:
    model: Candidate
    others: tuple[Candidate, ...] = ()  # what there was beside it, where nobody asked for this one


def choose(name: HubName, paths: Iterable[str]) -> Choice:
    """The model that `name.file` selects: a path, a file's name or a quantization (`Q4_K_M`, in any
    case); without it, the only model there is or the first of PREFERENCE.

    paths: of the repository; not trusted. Raises ModelNotFound, UnsupportedModel.
    """
    known = list(paths)
    models = candidates(known)
    if name.file:
        return Choice(_selected(name, models, known))
    if not models:
        raise _none(name, known)
    if len(models) == 1:
        return Choice(models[0])
    for tag in PREFERENCE:
        of_tag = [model for model in models if model.tag == tag]
        if len(of_tag) == 1:
            return Choice(of_tag[0], tuple(m for m in models if m is not of_tag[0]))
        if of_tag:
            raise ambiguous(name, of_tag)
    raise ambiguous(name, models)


def candidates(paths: Iterable[str]) -> list[Candidate]:
    """The models among a repository's files, by path. Projectors, importance matrices and files whose
    names are not safe are none."""
    files = {path for path in paths if is_safe_path(path) and _may_be_model(path)}
    models = []
    for path in sorted(files):
        shard = SHARD_NAME.match(PurePosixPath(path).name)
        if shard is None:
            models.append(Candidate((path,), quantization(path)))
        elif int(shard["number"]) == 1 and 1 <= int(shard["count"]) <= MAX_SHARDS:
            models.append(Candidate(shards_of(path), quantization(path)))
    return models


def matching(selector: str, models: Sequence[Candidate]) -> list[Candidate]:
    """The models that a path, a file's name or a quantization fits; all if it is empty."""
    folded = selector.casefold()
    ways = (
        [m for m in models if selector in m.files],
        [m for m in models if folded in (PurePosixPath(path).name.casefold() for path in m.files)],
        [m for m in models if m.tag.casefold() == folded],
    )
    return next((found for found in ways if found), []) if selector else list(models)


def shards_of(path: str) -> tuple[str, ...]:
    """All shards of the split model that `path` is a shard of; none if it is whole."""
    match = SHARD_NAME.match(PurePosixPath(path).name)
    if match is None:
        return ()
    count = int(match["count"])
    folder = path[: len(path) - len(match[0])]
    return tuple(f"{folder}{match['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1))


def quantization(path: str) -> str:
    """The quantization that a file's name states, or else its folder's; "" if neither does."""
    shard = SHARD_NAME.match(PurePosixPath(path).name)
    stem = shard["stem"] if shard else PurePosixPath(path).stem
    for text in (stem, PurePosixPath(path).parent.name):
        found = _TAG.findall(text)
        if found:
            return str(found[-1]).upper().replace("FP16", "F16").replace("FP32", "F32")
    return ""


def preferred(models: Sequence[Candidate]) -> list[Candidate]:
    """In the order they would be chosen in."""
    order: Mapping[str, int] = {tag: place for place, tag in enumerate(PREFERENCE)}
    return sorted(models, key=lambda model: (order.get(model.tag, len(order)), model.path))


def listed(models: Sequence[Candidate], limit: int = 12) -> str:
    """For a message: quantizations where they tell the models apart, else paths."""
    tags = [model.tag for model in models]
    names = tags if all(tags) and len(set(tags)) == len(tags) else [model.path for model in models]
    return one_line(", ".join(names[:limit]), 400) + (", …" if len(names) > limit else "")


def _may_be_model(path: str) -> bool:
    name = PurePosixPath(path).name.lower()
    if not name.endswith(".gguf") or name.startswith(".") or "mmproj" in name or ".exit." in name:
        return False
    return not ("imatrix" in name and not quantization(path))


def _selected(name: HubName, models: list[Candidate], paths: list[str]) -> Candidate:
    wanted = name.file
    if wanted in paths and not _may_be_model(wanted):
        what = "a projector for images" if "mmproj" in wanted.lower() else "not a GGUF model"
        raise UnsupportedModel(f"{name}: is {what}, which cannot be run by itself; {_offer(models)}")
    found = matching(wanted, models)
    if len(found) == 1:
        return found[0]
    if found:
        raise ambiguous(name, found)
    if not models:
        raise _none(name, paths)
    raise ModelNotFound(
        f"{name}: {name.repo} has no GGUF model of that name or quantization; {_offer(models)}"
    )


def _none(name: HubName, paths: list[str]) -> ModelNotFound | UnsupportedModel:
    repository = str(HubName(name.repo, name.revision))
    if any(path.endswith(".safetensors") for path in paths):
        return UnsupportedModel(
            f"{repository}: has safetensors weights and no GGUF file; this version cannot run them, so"
            f" look on the hub for a GGUF of the model (often called {name.repo.split('/')[1]}-GGUF)"
        )
    return ModelNotFound(f"{repository}: has no GGUF model in it; choose another repository")


def ambiguous(name: HubName, models: Sequence[Candidate]) -> ModelNotFound:
    """The refusal to choose among these."""
    paths = ", ".join(model.path for model in models[:12]) + (", …" if len(models) > 12 else "")
    example = HubName(name.repo, name.revision, models[0].path)
    return ModelNotFound(
        f"{name}: could be {len(models)} models ({one_line(paths, 300)}); name one: {example}"
    )


def _offer(models: list[Candidate]) -> str:
    return f"it has {listed(preferred(models))}" if models else "it has no GGUF model"
