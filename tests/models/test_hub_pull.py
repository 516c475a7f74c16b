"""Pulling from a stand-in of the hub: whole and verified, or one line and nothing taken for a model."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.hub_stand_in import HubStandIn
from edgeinfer.errors import (
    ChecksumMismatch,
    DownloadFailed,
    HubUnreachable,
    ModelError,
    ModelFileInvalid,
    ModelNotFound,
    UnsupportedModel,
)
from edgeinfer_models import hub_download, partial, store
from edgeinfer_models.pull import pull
from edgeinfer_models.pull_progress import PullProgress
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf
from tests.models.test_gguf_model import split

FILE = "tiny-Q4_K_M.gguf"
NAME = f"hf:owner/tiny:{FILE}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "WAITS_S", (0.01,) * 5)


@pytest.fixture
def content(tiny: Path) -> bytes:
    return tiny.read_bytes()


@pytest.fixture
def repo(hub: HubStandIn, data_dir: Path, content: bytes) -> HubStandIn:
    """A hub with one model in a repository."""
    hub.add("owner/tiny", {FILE: content, "README.md": b"# Tiny"}, licence="mit")
    return hub


def no_model_is_here(data_dir: Path) -> bool:
    folders = [f for f in (data_dir / "models").glob("*") if not f.name.startswith(".")]
    staged = list((data_dir / "models").glob(".hf--*"))
    return store.list_models() == store.StoreListing((), ()) and not folders and not staged


def part_of(content: bytes) -> Path:
    return next(partial.partials_folder().glob(f"*/{hashlib.sha256(content).hexdigest()}"))


def test_a_pulled_model_is_verified_recorded_and_found_by_what_was_typed(
    repo: HubStandIn, content: bytes, data_dir: Path
) -> None:
    seen: list[PullProgress] = []
    model = pull("hf:owner/tiny", seen.append)
    assert model.path.read_bytes() == content
    assert model.path.name == FILE
    manifest = json.loads((model.folder / "manifest.json").read_text())
    assert manifest["name"] == NAME
    assert manifest["repo"] == "owner/tiny"
    assert manifest["revision"] == repo.repos["owner/tiny"].commit
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["licence"] == "mit"
    assert "shards" not in manifest
    assert {p.phase for p in seen} == {"download", "verify"}
    assert seen[-1] == PullProgress("verify", len(content), len(content))
    for spec in ("hf:owner/tiny", NAME, "hf:owner/tiny:q4_k_m", "hf:owner/tiny@main"):
        resolved = resolve_model(spec)
        assert (resolved.spec, resolved.origin, resolved.files.name) == (NAME, "hub", NAME)
        assert resolved.files.digest == manifest["sha256"]
    assert model.path.stat().st_nlink == 1, "no second copy and no second name"
    assert not list(partial.partials_folder().glob("*/*"))
    with pytest.raises(ModelNotFound):
        resolve_model("hf:owner/tiny@dev")


def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(
    repo: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", repo.TOKEN)
    repo.repos["owner/tiny"].private = True
    pull("hf:owner/tiny")
    assert [line.split()[1].split("/")[1] for line in repo.authorized] == ["api", "owner"]
    assert not any("signature" in line for line in repo.authorized)
    assert any("signature" in line for line in repo.requests)


def test_the_hub_is_told_no_more_than_the_version(repo: HubStandIn) -> None:
    pull("hf:owner/tiny")
    assert all(agent.startswith("edgeinfer/") for agent in repo.user_agents if "hf_hub" in agent)
    assert not any("torch" in agent or "agent/" in agent for agent in repo.user_agents)
    assert {line.split("/")[1] for line in repo.requests} == {"api", "owner"}


def test_pulling_again_asks_but_downloads_only_what_changed(repo: HubStandIn, tmp_path: Path) -> None:
    first = pull("hf:owner/tiny")
    assert pull("hf:owner/tiny") == first
    assert len(repo.downloads) == 1
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=7).read_bytes()
    repo.repos["owner/tiny"].files[FILE] = other
    repo.repos["owner/tiny"].commit = "b" * 40
    assert pull("hf:owner/tiny").path.read_bytes() == other
    assert len(store.list_models().models) == 1
    pull("hf:owner/tiny", force=True)
    assert [asked.start for asked in repo.downloads] == [0, 0, 0]


def test_a_revision_is_another_model_and_a_commit_is_one(repo: HubStandIn) -> None:
    repo.repos["owner/tiny"].revisions = ("main", "v1", "refs/pr/2")
    commit = repo.repos["owner/tiny"].commit
    for revision in ("v1", "refs/pr/2", commit):
        model = pull(f"hf:owner/tiny@{revision}")
        assert model.name == f"hf:owner/tiny@{revision}:{FILE}"
        assert resolve_model(f"hf:owner/tiny@{revision}").installed == model
    assert all(commit in line for line in repo.requests if "/resolve/" in line), "never a moving branch"


def test_a_damaged_copy_is_mended(repo: HubStandIn, content: bytes) -> None:
    model = pull("hf:owner/tiny")
    model.path.write_bytes(b"short")
    with pytest.raises(ModelFileInvalid, match=f"pull --force {NAME}"):
        resolve_model(NAME)
    assert pull("hf:owner/tiny").path.read_bytes() == content
    (model.folder / "manifest.json").write_text("{")
    (line,) = store.list_models().damaged
    assert store.remove_model(line.rpartition("rm ")[2].rstrip("`")) > 0


def test_a_model_in_a_folder_of_the_repository_is_kept_under_its_own_name(
    hub: HubStandIn, data_dir: Path, content: bytes
) -> None:
    hub.add("owner/deep", {"a b/c/x-Q8_0.gguf": content})
    model = pull("hf:owner/deep")
    assert model.name == "hf:owner/deep:a b/c/x-Q8_0.gguf"
    assert model.path.parent == model.folder
    assert resolve_model("hf:owner/deep:x-q8_0.gguf").files.paths == (model.path,)


# -- split models ----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "shards"
    folder.mkdir()
    return {f"Q4_K_M/{path.name}": path.read_bytes() for path in split(folder)}


def test_all_shards_are_fetched_verified_and_one_model(
    hub: HubStandIn, data_dir: Path, shards: dict[str, bytes], content: bytes
) -> None:
    hub.add("owner/split", {**shards, "other-Q8_0.gguf": content})
    seen: list[PullProgress] = []
    model = pull("hf:owner/split", seen.append)
    assert len(model.manifest.shards) == 2
    assert model.manifest.num_bytes == sum(len(data) for data in shards.values())
    for shard, data in zip(model.manifest.shards, shards.values(), strict=True):
        assert (model.folder / shard.file).read_bytes() == data
        assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert resolve_model("hf:owner/split").files.paths == tuple(
        model.folder / shard.file for shard in model.manifest.shards
    )
    assert resolve_model("hf:owner/split").files.digest == model.manifest.sha256 != ""
    assert seen[-1].done == seen[-1].total == model.manifest.num_bytes
    assert store.find_model(model.name) == model
    (model.folder / model.manifest.shards[1].file).unlink()
    assert "is missing" in store.list_models().damaged[0]
    assert pull("hf:owner/split").manifest.shards == model.manifest.shards
    assert len(hub.downloads) == 4


def test_a_damaged_shard_costs_that_shard_only(
    hub: HubStandIn, data_dir: Path, shards: dict[str, bytes]
) -> None:
    hub.add("owner/split", shards)
    last = list(shards)[1]
    real = hub.repos["owner/split"].files[last]
    hub.repos["owner/split"].claims[last] = real
    hub.repos["owner/split"].files[last] = real[:-1] + bytes([real[-1] ^ 1])
    with pytest.raises(ChecksumMismatch, match=last):
        pull("hf:owner/split")
    assert no_model_is_here(data_dir)
    hub.repos["owner/split"].files[last] = real
    pull("hf:owner/split")
    assert [asked.path for asked in hub.downloads] == [*shards, last]


def test_a_split_model_that_lacks_a_shard_is_not_begun(
    hub: HubStandIn, data_dir: Path, shards: dict[str, bytes]
) -> None:
    hub.add("owner/split", dict(list(shards.items())[:1]))
    with pytest.raises(
        ModelNotFound, match=r"lacks tiny-00002-of-00002.gguf, one of the model's 2 parts"
    ):
        pull("hf:owner/split")
    assert hub.downloads == []


# -- going on --------------------------------------------------------------------------------------


def test_a_connection_that_breaks_goes_on_by_itself_where_it_was(
    repo: HubStandIn, content: bytes
) -> None:
    points = [1000, len(content) // 2, len(content) - 1]
    repo.faults.drop_at = list(points)
    assert pull("hf:owner/tiny").path.read_bytes() == content
    assert [asked.start for asked in repo.downloads] == [0, *points]
    assert all(asked.is_range and asked.status == 206 for asked in repo.downloads[1:])


def test_a_network_that_goes_away_is_tried_again_and_then_told_with_what_is_kept(
    repo: HubStandIn, content: bytes, data_dir: Path
) -> None:
    repo.faults.hold_at = 100_000
    tries: list[int] = []

    def go_away(progress: PullProgress) -> None:
        if progress.done == 0 and not tries:
            threading.Timer(0.3, repo.close).start()
        tries.append(progress.done)

    with pytest.raises(DownloadFailed, match="the same command goes on from there") as caught:
        pull("hf:owner/tiny", go_away)
    assert f"broke off after 100,000 of {len(content):,} bytes (" in str(caught.value)
    assert len(tries) > len(hub_download.WAITS_S)
    assert partial.list_partials()[0].num_bytes == 100_000
    assert no_model_is_here(data_dir)


def test_an_interrupted_pull_says_what_is_kept_and_the_next_one_goes_on(
    repo: HubStandIn, content: bytes, data_dir: Path
) -> None:
    repo.faults.bytes_per_s = 400_000

    def interrupt(progress: PullProgress) -> None:
        if progress.done > 50_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"0\.1 of 0\.2 MB of hf:owner/tiny.* are kept"):
        pull("hf:owner/tiny", interrupt)
    assert no_model_is_here(data_dir)
    (begun,) = partial.list_partials()
    assert (begun.name, begun.total_bytes) == (NAME, len(content))
    assert 50_000 < begun.num_bytes < len(content)
    seen: list[PullProgress] = []
    repo.faults.bytes_per_s = None
    pull("hf:owner/tiny", seen.append)
    assert seen[0].done == begun.num_bytes, "the progress begins where the download does"
    assert repo.downloads[-1].start == begun.num_bytes
    assert partial.list_partials() == ()


def test_a_server_that_knows_no_ranges_is_read_from_the_start(repo: HubStandIn, content: bytes) -> None:
    repo.faults.drop_at = [100_000]
    repo.faults.no_ranges = True
    assert pull("hf:owner/tiny").path.read_bytes() == content
    assert [(asked.start, asked.status) for asked in repo.downloads] == [(0, 200), (0, 200)]


def test_bytes_of_another_revision_are_no_beginning(
    repo: HubStandIn, content: bytes, tmp_path: Path
) -> None:
    repo.faults.drop_at = [90_000]

    def stop(progress: PullProgress) -> None:
        if progress.done >= 90_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("hf:owner/tiny", stop)
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=7).read_bytes()
    repo.repos["owner/tiny"].files[FILE] = other
    assert pull("hf:owner/tiny").path.read_bytes() == other
    assert repo.downloads[-1].start == 0


def test_a_partial_file_that_is_too_long_or_wrong_is_never_published(
    repo: HubStandIn, content: bytes, data_dir: Path
) -> None:
    def stop(progress: PullProgress) -> None:
        raise KeyboardInterrupt

    for wrong in (content + b"more", b"x" * 70_000, b"x" * len(content)):
        with pytest.raises(KeyboardInterrupt):
            pull("hf:owner/tiny", stop)
        path = next(partial.partials_folder().glob("*/")) / hashlib.sha256(content).hexdigest()
        path.write_bytes(wrong)
        try:
            pull("hf:owner/tiny")
        except ChecksumMismatch:
            assert no_model_is_here(data_dir)
            assert not path.exists(), "it would never become right"
            pull("hf:owner/tiny")
        assert store.list_models().models[0].path.read_bytes() == content
        store.remove_model(NAME)


def test_two_pulls_of_one_model_download_it_once(repo: HubStandIn, content: bytes) -> None:
    repo.faults.hold_at = 64_000
    notes: list[str] = []
    models: list[store.InstalledModel] = []
    threads = [
        threading.Thread(target=lambda: models.append(pull("hf:owner/tiny", note=notes.append)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not (repo.downloads and notes) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert notes == [f"another edgeinfer is pulling {NAME}; waiting for it"]
    with pytest.raises(DownloadFailed, match="is pulling it right now"):
        partial.remove_partial(NAME)
    repo.release()
    for thread in threads:
        thread.join()
    assert len(models) == 2
    assert models[0] == models[1]
    assert len(repo.downloads) == 1


# -- what goes wrong -------------------------------------------------------------------------------

Arrange = Callable[[HubStandIn, pytest.MonkeyPatch], object]


def _claim_other_bytes(hub: HubStandIn, _: pytest.MonkeyPatch) -> None:
    repo = hub.repos["owner/tiny"]
    repo.claims[FILE] = repo.files[FILE][:-1] + b"!"


def _shrink_the_most(_: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeinfer_models.hub_pull._MOST_BYTES", 100_000)


def _fill_the_disk(_: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))


WRONG: list[tuple[str, Arrange, type[ModelError], str]] = [
    ("hf:owner/none", lambda *_: 0, ModelNotFound, "no such repository on the hub, or it is private"),
    (
        "hf:owner/none",
        lambda hub, patch: patch.setenv("HF_TOKEN", hub.TOKEN),
        ModelNotFound,
        "no such repository",
    ),
    (NAME + "x", lambda *_: 0, ModelNotFound, "has no GGUF model of that name .* it has Q4_K_M"),
    ("hf:owner/tiny@v9", lambda *_: 0, ModelNotFound, "has no branch, tag or commit 'v9'"),
    (
        NAME,
        lambda hub, _: setattr(hub.repos["owner/tiny"], "gated", True),
        DownloadFailed,
        "ask for access at .*/owner/tiny, then put an access token .* HF_TOKEN",
    ),
    (
        NAME,
        lambda hub, _: setattr(hub.repos["owner/tiny"], "private", True),
        ModelNotFound,
        "or it is private; .* HF_TOKEN",
    ),
    (
        NAME,
        lambda hub, patch: patch.setenv("HF_TOKEN", "hf_wrong"),
        DownloadFailed,
        "does not accept your access token",
    ),
    (
        NAME,
        lambda hub, patch: patch.setenv("HF_TOKEN", "hf_two words"),
        DownloadFailed,
        "has characters that no token has",
    ),
    (
        NAME,
        lambda hub, _: hub.faults.statuses.update(resolve=[403]),
        DownloadFailed,
        "ask for access at",
    ),
    (NAME, lambda hub, _: hub.faults.statuses.update(api=[429]), DownloadFailed, "too many requests"),
    (NAME, lambda hub, _: hub.faults.statuses.update(api=[418]), DownloadFailed, "answered 418"),
    (NAME, lambda hub, _: hub.faults.statuses.update(cdn=[503]), DownloadFailed, "broke off after 0"),
    (NAME, lambda hub, _: hub.faults.statuses.update(cdn=[404]), ModelNotFound, "no such repository"),
    (
        NAME,
        lambda hub, _: setattr(hub.repos["owner/tiny"], "lfs", False),
        DownloadFailed,
        "gives no SHA-256",
    ),
    (
        NAME,
        lambda hub, _: setattr(hub.faults, "flip_at", 99),
        ChecksumMismatch,
        "is not the published file",
    ),
    (
        NAME,
        _claim_other_bytes,
        ChecksumMismatch,
        "is not the published file .* is deleted; pull it again",
    ),
    (NAME, lambda hub, _: hub.close(), HubUnreachable, r"is not here, and .* cannot be reached \("),
    (
        NAME,
        lambda hub, patch: patch.setenv("HF_HUB_OFFLINE", "1"),
        HubUnreachable,
        "is not here, and offline mode is on; unset HF_HUB_OFFLINE",
    ),
    (
        NAME,
        lambda hub, _: hub.faults.statuses.update(api=[200]),
        DownloadFailed,
        "is no description of a repository; check HF_ENDPOINT and the proxy",
    ),
    (NAME, _shrink_the_most, DownloadFailed, "larger than the 0 GB that the hub gives over"),
    (NAME, _fill_the_disk, DownloadFailed, r"needs 34 MB more in .* where 1 MB are free; free some"),
]


@pytest.mark.parametrize(("spec", "arrange", "kind", "said"), WRONG)
def test_what_goes_wrong_is_one_line_and_leaves_no_model(
    repo: HubStandIn,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    arrange: Arrange,
    kind: type[ModelError],
    said: str,
) -> None:
    arrange(repo, monkeypatch)
    with pytest.raises(kind, match=said) as caught:
        pull(spec)
    assert type(caught.value) is kind
    assert str(caught.value).startswith((spec.split("@")[0][:13], "the access token"))
    assert repo.TOKEN not in str(caught.value)
    assert no_model_is_here(data_dir)


def test_an_account_without_access_is_told_so(repo: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.faults.statuses["resolve"] = [403]
    monkeypatch.setenv("HF_TOKEN", repo.TOKEN)
    with pytest.raises(DownloadFailed, match="the account of your token has no access; ask for it at"):
        pull("hf:owner/tiny")


def test_a_token_opens_a_gated_repository(repo: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.repos["owner/tiny"].gated = True
    monkeypatch.setenv("HF_TOKEN", f" {repo.TOKEN}\n")
    assert pull("hf:owner/tiny").name == NAME


def test_a_hub_that_stumbles_is_asked_again(repo: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeinfer_models.hub._WAIT_S", 0.01)
    repo.faults.statuses["api"] = [503, 503, 0]
    assert pull("hf:owner/tiny").name == NAME
    assert len([line for line in repo.requests if "/api/" in line]) == 3


def test_without_a_network_what_is_here_will_do_and_that_is_said(repo: HubStandIn) -> None:
    model = pull("hf:owner/tiny")
    repo.close()
    notes: list[str] = []
    assert pull("hf:owner/tiny", note=notes.append) == model
    assert notes[0].startswith(f"{NAME} is here; whether the hub has a newer one is not known: http")
    with pytest.raises(HubUnreachable):
        pull("hf:owner/tiny", force=True)


def test_a_disk_that_fills_up_keeps_what_came_and_the_next_pull_goes_on(
    repo: HubStandIn, content: bytes, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    real_open = Path.open

    class FillingUp:
        """A file of a disk that has room for 100,000 bytes more."""

        def __init__(self, file: object) -> None:
            self._file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def __enter__(self) -> FillingUp:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()  # type: ignore[attr-defined]

        def write(self, data: bytes) -> int:
            nonlocal written
            if written + len(data) > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            written += len(data)
            return int(self._file.write(data))  # type: ignore[attr-defined]

    def open_filling(path: Path, mode: str = "r", *more: object, **options: object) -> object:
        file = real_open(path, mode, *more, **options)  # type: ignore[call-overload]
        return FillingUp(file) if mode == "ab" else file

    monkeypatch.setattr(Path, "open", open_filling)
    with pytest.raises(DownloadFailed, match=r"No space left on device.*What came is kept") as caught:
        pull("hf:owner/tiny")
    assert str(data_dir) in str(caught.value)
    assert no_model_is_here(data_dir)
    monkeypatch.setattr(Path, "open", real_open)
    assert pull("hf:owner/tiny").path.read_bytes() == content
    assert repo.downloads[-1].start == written > 0  # how much came at once is the network's affair


def test_a_listing_that_means_harm_can_name_no_file_outside(
    repo: HubStandIn, data_dir: Path, tmp_path: Path
) -> None:
    repo.faults.listed = [
        "../../evil-Q4_0.gguf",
        "/etc/evil-Q4_0.gguf",
        "a\\..\\b-Q4_0.gguf",
        "x\nq4_0.gguf",
    ]
    assert pull("hf:owner/tiny").name == NAME, "they are no models"
    for name in repo.faults.listed:
        with pytest.raises((ModelNotFound, UnsupportedModel)):
            pull(f"hf:owner/tiny:{name}")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_data_folder_that_cannot_be_written_is_one_line(
    repo: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDGEINFER_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(DownloadFailed, match="set EDGEINFER_DATA_DIR to another folder"):
        pull("hf:owner/tiny")


def test_the_model_used_last_is_not_fetched_again_when_it_has_gone(
    repo: HubStandIn, data_dir: Path
) -> None:
    store.record_last_used(NAME)
    asked: list[str] = []
    with pytest.raises(ModelNotFound, match="smollm2"):
        resolve_model(None, pull_missing=asked.append)
    assert asked == ["smollm2"]


def test_a_missing_model_is_pulled_when_the_caller_can(repo: HubStandIn) -> None:
    assert resolve_model("hf:owner/tiny", pull_missing=pull).spec == NAME
    assert resolve_model("hf:owner/tiny").spec == NAME
    assert len(repo.downloads) == 1


def test_what_a_later_version_adds_to_a_manifest_is_passed_over(repo: HubStandIn) -> None:
    model = pull("hf:owner/tiny")
    path = model.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "signed_by": "somebody"}))
    assert store.find_model(NAME) == model


@pytest.mark.parametrize(
    "change",
    [
        {"name": "hf:owner/other:a.gguf"},
        {"file": "../x.gguf"},
        {"num_bytes": "9"},
        {"shards": [{"file": "a"}]},
        {"shards": [{"file": "../a", "num_bytes": 1, "sha256": ""}]},
        {"shards": 7},
        {"repo": 7},
    ],
)
def test_a_manifest_that_was_tampered_with_is_reported_not_trusted(
    repo: HubStandIn, change: dict[str, object]
) -> None:
    path = pull("hf:owner/tiny").folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert store.list_models().models == ()
    assert len(store.list_models().damaged) == 1
