"""The benchmarks' own arithmetic: ratios, peaks, mutations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.alternate import Comparison, Side, Spread, alternate, comparison_table, table
from benchmarks.lock import one_at_a_time
from benchmarks.memory import TreePeak, run_measured
from benchmarks.mutations import Mutator, layout
from benchmarks.peers import PROGRAMS, PeerError, build


def turns(*figures: float, log: list[str], name: str) -> Callable[[], dict[str, float]]:
    left: Iterator[float] = iter(figures)

    def measure() -> dict[str, float]:
        log.append(name)
        return {"speed": next(left)}

    return measure


def test_a_spread_has_the_median_quartiles_and_extremes() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(median=3, low=2, high=4, least=1, most=5)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 7)


@pytest.mark.parametrize("figures", [[], [1.0, float("nan")], [float("inf")]])
def test_a_spread_of_nothing_or_nonsense_is_refused(figures: list[float]) -> None:
    with pytest.raises(ValueError, match="no spread"):
        Spread.of(figures)


def test_sides_take_turns_and_the_first_one_changes() -> None:
    log: list[str] = []
    a = Side("a", turns(1, 1, 1, log=log, name="a"))
    b = Side("b", turns(1, 1, 1, log=log, name="b"))
    alternate(a, b, 3)
    assert "".join(log) == "abbaab"


def test_the_ratio_is_the_median_of_the_rounds_and_not_of_the_sides() -> None:
    log: list[str] = []
    # Both sides get slower together; in each round a is 0.9 of b.
    a = Side("a", turns(90, 45, 9, log=log, name="a"))
    b = Side("b", turns(100, 50, 10, log=log, name="b"))
    (comparison,) = alternate(a, b, 3)
    assert comparison.ratio.median == pytest.approx(0.9)
    assert comparison.ratio.high - comparison.ratio.low == pytest.approx(0.0)
    assert comparison.as_json()["ratio"]["median"] == pytest.approx(0.9)


def test_an_outlier_does_not_move_the_ratio() -> None:
    comparison = Comparison("m", "a", "b", (1, 1, 1, 1, 99), (1, 1, 1, 1, 1))
    assert comparison.ratio.median == 1
    assert comparison.ratio.most == 99


@pytest.mark.parametrize("figure", [0.0, -1.0, float("nan")])
def test_a_figure_that_cannot_be_is_an_error(figure: float) -> None:
    with pytest.raises(ValueError, match="a reported speed"):
        alternate(Side("a", lambda: {"speed": figure}), Side("b", lambda: {"speed": 1.0}), 1)


def test_sides_that_measure_different_things_are_an_error() -> None:
    with pytest.raises(ValueError, match="reported"):
        alternate(Side("a", lambda: {"speed": 1.0}), Side("b", lambda: {"size": 1.0}), 1)


def test_tables_line_up() -> None:
    lines = table([("name", "n"), ("x", "1"), ("longer", "100")]).splitlines()
    assert lines == ["name      n", "------  ---", "x         1", "longer  100"]
    assert "0.500" in comparison_table([Comparison("m", "a", "b", (1.0,), (2.0,))])


def test_a_free_machine_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with one_at_a_time(tmp_path / "lock"):
            pass
    assert capsys.readouterr().err == ""


def fake_process(proc: Path, pid: int, parent: int, high_kb: int, birth: int = 7) -> None:
    folder = proc / str(pid)
    folder.mkdir(exist_ok=True)
    after_name = ["S", str(parent), *(["0"] * 17), str(birth), "0"]
    (folder / "stat").write_text(f"{pid} (a (strange) name) {' '.join(after_name)}\n")
    (folder / "status").write_text(f"Name:\tworker\nVmHWM:\t  {high_kb} kB\nVmRSS:\t 1 kB\n")
    (folder / "smaps_rollup").write_text(f"0-1 ---p\nRss:  9 kB\nPss:  {high_kb // 2} kB\n")


def remove(proc: Path, pid: int) -> None:
    for file in (proc / str(pid)).iterdir():
        file.unlink()
    (proc / str(pid)).rmdir()


def test_the_peak_of_a_tree_is_the_sum_of_each_process_own_peak(tmp_path: Path) -> None:
    fake_process(tmp_path, 10, 1, 1000)
    fake_process(tmp_path, 11, 10, 200)
    fake_process(tmp_path, 12, 11, 30)
    fake_process(tmp_path, 99, 1, 5000)
    peak = TreePeak(10)
    peak.sample(tmp_path, with_pss=True)
    assert peak.total == 1230 * 1024
    assert peak.pss == 615 * 1024
    remove(tmp_path, 12)
    fake_process(tmp_path, 11, 10, 500)
    peak.sample(tmp_path)
    assert peak.total == 1530 * 1024
    assert set(peak.peaks) == {10, 11, 12}


def test_an_orphan_stays_in_the_tree_and_a_reused_number_does_not(tmp_path: Path) -> None:
    fake_process(tmp_path, 10, 1, 1000)
    fake_process(tmp_path, 11, 10, 200)
    fake_process(tmp_path, 12, 10, 100)
    peak = TreePeak(10)
    peak.sample(tmp_path)
    remove(tmp_path, 10)
    fake_process(tmp_path, 11, 1, 300)  # orphaned, still ours
    fake_process(tmp_path, 12, 1, 9000, birth=8)  # somebody else by now
    peak.sample(tmp_path)
    assert peak.peaks == {10: 1000 * 1024, 11: 300 * 1024, 12: 100 * 1024}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_real_process_and_its_child_is_seen() -> None:
    child = "import time; x = bytearray(60_000_000); time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    run = run_measured([sys.executable, "-c", parent], timeout_s=60)
    assert (run.exit_code, run.stdout.strip()) == (0, "done")
    assert len(run.peak.peaks) == 2
    assert 60e6 < run.peak.total < 200e6
    assert run.peak.pss > 0


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("numbers", [1.0, 2.0])
    import numpy as np

    writer.add_tensor("weight", np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_layout_names_every_length_of_a_header(gguf: bytes) -> None:
    found = layout(gguf)
    values = {f.what: int.from_bytes(gguf[f.offset : f.offset + f.size], "little") for f in found.fields}
    assert values["tensor count"] == 1
    assert values["array length"] == 2
    assert values["array string length"] == 2
    assert values["tensor name length"] == len("weight")
    assert values["tensor dimension"] == 4
    assert 0 < found.header_bytes <= len(gguf) - 4 * 32 * 4


def test_mutations_are_repeatable_and_of_every_kind(gguf: bytes) -> None:
    first, second = Mutator(gguf, seed=5), Mutator(gguf, seed=5)
    made = [first.mutate(number) for number in range(400)]
    assert made[17] == second.mutate(17)
    assert {name for name, _ in made} == {kind.__name__ for kind in first.kinds}
    assert Mutator(gguf, seed=6).mutate(17) != made[17]
    changed = sum(data != gguf for _, data in made)
    assert changed > 380  # swapping equal bytes changes nothing, now and then


def test_an_existing_build_of_the_peers_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-bench").touch()
    monkeypatch.setenv("EDGEINFER_PEERS", str(tmp_path))
    assert build(["llama-bench"]) == {"llama-bench": tmp_path / "bin" / "llama-bench"}
    with pytest.raises(PeerError, match="has no llama-quantize"):
        build(["llama-bench", "llama-quantize"])


def test_an_unknown_peer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PeerError, match="llama-frobnicate: not one of llama-bench"):
        build(["llama-frobnicate"])
    assert "llama-server" in PROGRAMS
