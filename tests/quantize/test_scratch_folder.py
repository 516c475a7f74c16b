from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from edgeinfer.quantize.scratch_folder import scratch_folder


def test_what_a_killed_process_left_is_removed_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, recent, other = (
        tmp_path / name for name in ("edgeinfer-types-a", "edgeinfer-types-b", "mine-types-c")
    )
    for folder in (old, recent, other):
        folder.mkdir()
        (folder / "q4_0.gguf").write_bytes(b"GGUF")
    for folder in (old, other):
        os.utime(folder, (0, time.time() - 2 * 24 * 3600))
    with scratch_folder() as name:
        assert Path(name).parent == tmp_path
        assert {path.name for path in tmp_path.iterdir()} == {recent.name, other.name, Path(name).name}
    assert not Path(name).exists()
