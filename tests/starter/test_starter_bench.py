"""`edgeinfer bench` on the real starter, at sizes that take a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeinfer.cli.app import run

pytestmark = pytest.mark.model


def test_the_starter_is_measured(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeat", "2", "--warmup", "0"]
    assert run(["bench", "--json", "-q", str(starter), *small, "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "llamacpp"
    assert found["settings"]["threads"] == {"decode": 1, "prefill": 1}
    assert [f["metric"] for f in found["figures"]] == ["prefill", "ttft", "decode"]
    assert all(sample > 0 for f in found["figures"] for sample in f["samples"])


def test_several_answers_of_the_starter_are_measured(
    starter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--prompt-tokens", "8", "--new-tokens", "16", "--streams", "1,3"]
    counted = ["--repeat", "1", "--warmup", "0"]
    assert run(["bench", "--json", "-q", "--suite", "concurrency", str(starter), *small, *counted]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(f["metric"], f["streams"]) for f in found["figures"]] == [
        *(("total", 1), ("worst_ttft", 1)),
        *(("total", 3), ("worst_ttft", 3)),
    ]
    assert found["cached_tokens"] == 0
