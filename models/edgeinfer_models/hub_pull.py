"""Getting a model of the Hugging Face hub: ask, choose, download, verify, publish.

Everything the hub says is a stranger's: names are checked, sizes are compared with the disk's, and the
bytes must have the SHA-256 that the repository lists. Nothing of it is ever run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from edgeinfer.errors import DownloadFailed, HubUnreachable, ModelFileInvalid, ModelNotFound
from edgeinfer_models.hub import Hub, HubFile, Repository
from edgeinfer_models.hub_choice import Candidate, Choice, choose, listed, preferred
from edgeinfer_models.hub_download import download, verify
from edgeinfer_models.hub_installed import find_hub_model
from edgeinfer_models.hub_name import HubName, parse_hub_name
from edgeinfer_models.partial import discard_partial, partial_folder, start_partial
from edgeinfer_models.pull_progress import NoteCallback, ProgressCallback, PullProgress
from edgeinfer_models.store import (
    InstalledModel,
    Manifest,
    Shard,
    find_model,
    models_folder,
    publish,
    split_digest,
    staging_folder,
)

_SPARE_BYTES = 32 << 20
_MOST_BYTES = 50_000_000_000  # of a file that the hub gives over plain HTTP, says its library


def pull_from_hub(
    spec: str, progress: ProgressCallback, note: NoteCallback, *, force: bool = False
) -> InstalledModel:
    """Install a model of the hub; one that is installed and still what the hub has is returned as it is.

    An interrupted download goes on where it was. Where the hub cannot be asked, what is installed under
    that name will do. Raises ModelError's subclasses; an older copy stays whatever happens.
    """
    asked = parse_hub_name(spec)
    try:
        hub = Hub()
        repository = hub.repository(asked)
    except HubUnreachable as error:
        installed = None if force else find_hub_model(spec)
        if installed is None:
            raise HubUnreachable(f"{spec}: is not here, and {error}") from None
        note(f"{installed.name} is here; whether the hub has a newer one is not known: {error}")
        return installed
    choice = choose(asked, [file.path for file in repository.files])
    name = HubName(asked.repo, asked.revision, choice.model.path)
    if choice.others:
        note(_what_was_chosen(spec, choice))
    files = _files(name, repository, choice.model)
    total = sum(file.num_bytes for file in files)
    waited = False

    def wait() -> None:
        nonlocal waited
        if not waited:
            waited = True
            note(f"another edgeinfer is pulling {name}; waiting for it")
        progress(PullProgress("wait", 0, total))

    with partial_folder(str(name), wait) as folder:
        here = None if force else _installed(name, files)
        if here is not None:
            discard_partial(folder)
            return here
        try:
            return _complete(hub, repository, name, files, folder, progress)
        except OSError as error:
            raise DownloadFailed(
                f"{name}: cannot be written to {models_folder()} ({error.strerror or error}); free some"
                " space or set EDGEINFER_DATA_DIR to another folder. What came is kept: the same command"
                " goes on from there"
            ) from None
        except KeyboardInterrupt:
            done = sum(f.stat().st_size for f in _parts(folder, files) if f.exists())
            raise KeyboardInterrupt(
                f"stopped; {done / 1e6:,.1f} of {total / 1e6:,.1f} MB of {name} are kept, and the same"
                " command goes on from there"
            ) from None


def _complete(
    hub: Hub,
    repository: Repository,
    name: HubName,
    files: Sequence[HubFile],
    folder: Path,
    progress: ProgressCallback,
) -> InstalledModel:
    """May raise OSError."""
    total = sum(file.num_bytes for file in files)
    here = start_partial(folder, str(name), {file.sha256: file.num_bytes for file in files})
    _require_space(str(name), total - here, folder)
    before = 0
    for file, part in zip(files, _parts(folder, files), strict=True):

        def report_download(done: int, before: int = before) -> None:
            progress(PullProgress("download", before + done, total))

        def report_verify(done: int, before: int = before) -> None:
            progress(PullProgress("verify", before + done, total))

        download(hub, repository, file, part, report_download)
        verify(str(name), file, part, report_verify)
        before += file.num_bytes
    with staging_folder(str(name)) as staging:
        shards = tuple(_shard(file) for file in files)
        for part, shard in zip(_parts(folder, files), shards, strict=True):
            _link(part, staging / shard.file)
        model = publish(staging, _manifest(name, repository, shards))
    discard_partial(folder)
    return model


def _manifest(name: HubName, repository: Repository, shards: tuple[Shard, ...]) -> Manifest:
    return Manifest(
        name=str(name),
        file=shards[0].file,
        num_bytes=sum(shard.num_bytes for shard in shards),
        sha256=shards[0].sha256 if len(shards) == 1 else split_digest(shards),
        source=f"Hugging Face hub, {name.repo} at {repository.commit[:12]}",
        licence=repository.licence,
        pulled_at=datetime.now(UTC).isoformat(timespec="seconds"),
        repo=name.repo,
        revision=repository.commit,
        shards=shards if len(shards) > 1 else (),
    )


def _files(name: HubName, repository: Repository, model: Candidate) -> list[HubFile]:
    """The model's files as the hub describes them. Raises ModelNotFound, DownloadFailed."""
    known = {file.path: file for file in repository.files}
    for path in model.files:
        if path not in known:
            raise ModelNotFound(
                f"{name}: the repository lacks {PurePosixPath(path).name}, one of the model's"
                f" {len(model.files)} parts; choose another of its models"
            )
        if not known[path].sha256 or not known[path].num_bytes:
            raise DownloadFailed(
                f"{name}: the hub gives no SHA-256 for {path}, so it could not be verified; download it"
                " by other means and give its path"
            )
        if known[path].num_bytes > _MOST_BYTES:
            raise DownloadFailed(
                f"{name}: {path} is larger than the {_MOST_BYTES / 1e9:.0f} GB that the hub gives over"
                " HTTP; choose a quantization that is smaller or split into parts"
            )
    return [known[path] for path in model.files]


def _installed(name: HubName, files: Sequence[HubFile]) -> InstalledModel | None:
    try:
        model = find_model(str(name))
    except ModelFileInvalid:
        return None  # damaged: that is what a pull mends
    current = model is not None and [f.sha256 for f in model.manifest.files] == [f.sha256 for f in files]
    return model if current else None


def _require_space(name: str, num_bytes: int, folder: Path) -> None:
    needed = num_bytes + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadFailed(
            f"{name}: needs {needed / 1e6:,.0f} MB more in {models_folder()} where {free / 1e6:,.0f} MB"
            " are free; free some space or set EDGEINFER_DATA_DIR to another folder"
        )


def _what_was_chosen(spec: str, choice: Choice) -> str:
    return (
        f"{spec} has {len(choice.others) + 1} models; taking {choice.model.tag} (others:"
        f" {listed(preferred(choice.others))}). To choose: {spec}:{_example(choice)}"
    )


def _example(choice: Choice) -> str:
    other = preferred(choice.others)[0]
    alone = other.tag and [m.tag for m in choice.others].count(other.tag) == 1
    return other.tag if alone else other.path


def _parts(folder: Path, files: Sequence[HubFile]) -> list[Path]:
    return [folder / file.sha256 for file in files]


def _shard(file: HubFile) -> Shard:
    return Shard(PurePosixPath(file.path).name, file.num_bytes, file.sha256)


def _link(part: Path, target: Path) -> None:
    """The same bytes under a second name, so that a kill before they are published loses nothing."""
    try:
        os.link(part, target)
    except OSError:  # a file system without links
        part.rename(target)
