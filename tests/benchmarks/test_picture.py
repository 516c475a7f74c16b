"""Comparisons become a picture that holds what they say; a bar draws it where it is asked to."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import verdict
from benchmarks.alternate import Comparison
from benchmarks.picture import Drawn, draw_comparisons
from benchmarks.verdict import Bar, run_bar

COMPARISON = Comparison("tok/s", "edgeinfer", "peer", (10.0, 12.0, 11.0), (9.0, 10.0, 11.5))


@pytest.fixture(autouse=True)
def _own_lock_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdict, "RESULTS", tmp_path / "results")


@pytest.mark.parametrize("rounds", [1, 3])
def test_both_sides_and_the_ratio_are_drawn(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "rounds.svg"
    some = Comparison("tok/s", "edgeinfer", "peer", COMPARISON.a[:rounds], COMPARISON.b[:rounds])
    draw_comparisons(path, "title", [Drawn("first", some, 1.2), Drawn("second", some)])
    root = ElementTree.fromstring(path.read_text())
    assert root.tag.endswith("svg")
    # matplotlib draws letters as shapes and keeps each text as a comment.
    text = path.read_text()
    for word in (
        "title",
        "first",
        "second",
        "edgeinfer: ",
        "peer: ",
        "to reach: 1.2",
        some.ratio.show(),
    ):
        assert word in text, word


def test_a_png_is_a_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    draw_comparisons(tmp_path / "rounds.png", "title", [Drawn("one", COMPARISON)])
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [p.name for p in tmp_path.iterdir()] == ["rounds.png"]


def test_nothing_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_comparisons(tmp_path / "rounds.svg", "title", [])


def measure(bar: Bar) -> None:
    bar.show("three rounds", [COMPARISON], 0.9)
    bar.require("fast enough", True)


def test_a_bar_draws_what_it_showed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bar", "--plot"])
    assert run_bar("99_example.py", "an example", measure) == 0
    drawn = (tmp_path / "results" / "99_example.svg").read_text()
    assert "three rounds" in drawn and "to reach: 0.9" in drawn
    assert "99_example: PASS" in capsys.readouterr().out


def test_a_bar_that_cannot_draw_says_so_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(bar: Bar) -> None:
        raise AssertionError

    monkeypatch.setattr(sys, "argv", ["bar", "--plot", "/nowhere/at/all.svg"])
    assert run_bar("99_example.py", "an example", never) == 1
    assert "cannot be written" in capsys.readouterr().err
