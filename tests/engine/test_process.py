"""How a worker process is started."""

from __future__ import annotations

import pytest

from edgeinfer.engine import process
from edgeinfer.engine.process import worker_environment


def test_a_worker_asks_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.sys, "platform", "linux")
    found = worker_environment({"PATH": "/bin"})
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert found["PATH"] == "/bin"
    assert found["GGML_NO_BACKTRACE"] == "1"


def test_the_users_own_tunables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.sys, "platform", "linux")
    both = worker_environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})["GLIBC_TUNABLES"]
    assert both == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    theirs = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert worker_environment(theirs)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.sys, "platform", "darwin")
    assert "GLIBC_TUNABLES" not in worker_environment({})
