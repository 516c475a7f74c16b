"""The suites over the scripted backend: what is run, in turns, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.client import Client, LocalClient, OpenOptions
from edgeinfer.measure.bench import Bench, BenchPlan, Trial
from edgeinfer.measure.figures import Figure


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"step_s": 0.002}))
    options = OpenOptions(model=str(script), backend="scripted", context=128, sequences=3, cache_bytes=0)
    with LocalClient(options) as client:
        yield client


def test_trials_take_turns_after_a_warm_up_that_does_not_count(client: Client) -> None:
    plan = BenchPlan("speed", (8, 16), (4,), repeat=2, warmup=1)
    ran: list[str] = []
    bench = Bench(client, plan, client.load().vocab_size, lambda trial, *_: ran.append(str(trial)))
    bench.run()
    assert ran == ["prefill of 8", "prefill of 16", "decode of 4"] * 3
    assert bench.is_complete
    found = [(f.metric, f.size, f.unit, len(f.samples)) for f in bench.figures]
    assert found == [
        ("prefill", 8, "tok/s", 2),
        ("ttft", 8, "s", 2),
        ("prefill", 16, "tok/s", 2),
        ("ttft", 16, "s", 2),
        ("decode", 4, "tok/s", 2),
    ]
    assert all(sample > 0 for figure in bench.figures for sample in figure.samples)


def test_concurrency_has_the_total_and_the_slowest_first_token(client: Client) -> None:
    plan = BenchPlan("concurrency", (8,), (12,), (1, 3), repeat=2, warmup=0)
    assert (plan.sequences, plan.cells_per_sequence) == (3, 20)
    bench = Bench(client, plan, client.load().vocab_size)
    bench.run()
    found = [(f.metric, f.streams, len(f.samples)) for f in bench.figures]
    assert found == [("total", 1, 2), ("worst_ttft", 1, 2), ("total", 3, 2), ("worst_ttft", 3, 2)]


def test_stopping_between_runs_keeps_what_there_is(client: Client) -> None:
    plan = BenchPlan("speed", (8,), (4,), repeat=3, warmup=0)

    def stop_at_the_fourth(trial: Trial, number: int, total: int) -> None:
        assert total == 6
        if number == 4:
            bench.stop()

    bench = Bench(client, plan, client.load().vocab_size, stop_at_the_fourth)
    bench.run()
    assert not bench.is_complete
    assert {f.metric: len(f.samples) for f in bench.figures} == {"prefill": 2, "ttft": 2, "decode": 1}


def test_a_bench_stopped_at_once_has_no_figure(client: Client) -> None:
    bench = Bench(client, BenchPlan(), client.load().vocab_size)
    bench.stop()
    bench.run()
    assert bench.figures == [] and not bench.is_complete


def test_a_figure_has_median_and_quartiles() -> None:
    figure = Figure("decode", 1, 64, 1, (5.0, 1.0, 2.0, 4.0, 3.0))
    assert (figure.median, figure.quartiles) == (3.0, (2.0, 4.0))
    assert Figure("ttft", 8, 1, 1, (0.5,)).quartiles == (0.5, 0.5)
    assert figure.as_json()["samples"] == [5.0, 1.0, 2.0, 4.0, 3.0]
