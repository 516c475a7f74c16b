"""The figures under the input."""

from __future__ import annotations

from chat_driver import Drive
from fake_client import FakeClient, Script

from edgeinfer.client import Ended, Prefilled, RunStats, Started, Text
from edgeinfer.engine.request import KvStats, SpeculationStats, Timings, Usage
from edgeinfer_tui.figures import Figures
from edgeinfer_tui.status_line import status_content


async def test_the_status_line_ends_with_the_engines_own_figures(drive: Drive) -> None:
    script = Script(["a"] * 10, prompt_tokens=1200, cached_tokens=480, evicted_tokens=7)
    async with drive(FakeClient(script), size=(120, 30)) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        for figure in (
            "ready",
            "42 tok/s",
            "TTFT 250 ms",
            "context 1,203/2,048",
            "480 cached",
            "7 evicted",
            "SmolLM2-135M · llamacpp",
        ):
            assert figure in driver.status


def test_reading_the_prompt_counts_in_percent() -> None:
    figures = Figures(state="ready", context=2048)
    figures.asked(10.0)
    figures.observe(Started(1000, 100), 10.1)
    assert "reading prompt 10 %" in str(status_content(figures, 100))
    figures.observe(Prefilled(370, 1000), 10.2)
    assert "reading prompt 37 %" in str(status_content(figures, 100))


def test_the_live_rate_counts_the_tokens_after_the_first() -> None:
    figures = Figures(state="ready", context=2048)
    figures.asked(10.0)
    figures.observe(Started(100, 0), 10.0)
    figures.observe(Text("a", 1), 10.5)
    assert figures.tok_s is None
    figures.observe(Text("b", 21), 11.0)
    assert figures.tok_s == 40.0
    assert figures.ttft_s == 0.5
    assert figures.used_tokens == 121
    assert figures.state == "answering"


def test_an_answer_being_stopped_stays_so_until_it_ends() -> None:
    figures = Figures(state="ready", context=2048)
    figures.asked(1.0)
    figures.observe(Text("a", 1), 2.0)
    figures.state = "stopping"
    figures.observe(Text("b", 2), 3.0)
    assert figures.state == "stopping"
    figures.observe(Ended("cancelled", RunStats()), 4.0)
    assert figures.state == "stopped"


def test_a_failure_without_figures_keeps_the_context_known_before() -> None:
    figures = Figures(state="ready", context=2048, used_tokens=300)
    figures.asked(1.0)
    figures.observe(Ended("failed", RunStats(), "WorkerDied", "gone"), 2.0)
    assert (figures.context, figures.used_tokens) == (2048, 300)


def test_evicted_tokens_no_longer_count_as_used() -> None:
    figures = Figures(state="ready", context=2048)
    figures.asked(1.0)
    stats = RunStats(
        usage=Usage(2000, 500, 0), timings=Timings(), kv=KvStats(evicted_tokens=1000), context=2048
    )
    figures.observe(Ended("finished", stats), 2.0)
    assert figures.used_tokens == 1500


def test_what_drafts_brought_an_answer_is_told_until_the_next_is_asked_for() -> None:
    figures = Figures(state="ready", context=2048)
    figures.asked(1.0)
    stats = RunStats(
        speculation=SpeculationStats("lookup", drafted=60, accepted=42, steps=9, speedup=1.84)
    )
    figures.observe(Ended("finished", stats), 2.0)
    assert "1.8x by lookup" in str(status_content(figures, 100))
    figures.asked(3.0)
    assert "lookup" not in str(status_content(figures, 100))


def test_a_narrow_line_keeps_the_state_and_never_overflows() -> None:
    figures = Figures("answering", 0, "a-very-long-model-name" * 4, "llamacpp", 131072)
    figures.tok_s, figures.ttft_s, figures.used_tokens = 41.5, 0.25, 100000
    for width in range(1, 150):
        line = status_content(figures, width)
        assert line.cell_length <= width
        if width >= 11:
            assert "answering" in str(line)


def test_drafts_are_told_while_the_answer_comes_and_why_there_were_none() -> None:
    figures = Figures(state="ready", context=2048)
    figures.asked(1.0)
    figures.observe(Text("a", 12, num_drafted=5), 2.0)
    assert "5 of 12 drafted" in str(status_content(figures, 100))
    drafted = RunStats(speculation=SpeculationStats("lookup+exit", 9, 6, 3, speedup=1.84))
    figures.observe(Ended("finished", drafted), 3.0)
    assert "1.8x by lookup+exit" in str(status_content(figures, 100))
    figures.asked(4.0)
    none = RunStats(speculation=SpeculationStats(reason="the answer repeats nothing"))
    figures.observe(Ended("finished", none), 5.0)
    assert "no drafts: the answer repeats nothing" in str(status_content(figures, 100))
    assert "no drafts" not in str(status_content(figures, 40))
