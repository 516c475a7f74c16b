"""What a stream's reader saw becomes tokens a second; what would flatter is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from edgeinfer.client import (
    Client,
    Ended,
    Event,
    Generation,
    ModelInfo,
    Request,
    RunStats,
    Text,
    Token,
)
from edgeinfer.client.client import LoadProgress
from edgeinfer.engine.request import Usage
from edgeinfer.errors import MeasureFailed, PromptTooLong
from edgeinfer.measure.streams import Prompts, Stream, answer_all, total_tok_s


def even(start: float, end: float, tokens: int, every: int = 1) -> Stream:
    """A stream of evenly made tokens, told `every` few at a time, and its last."""
    step = (end - start) / (tokens - 1)
    told = [n for n in range(tokens) if n % every == 0 or n == tokens - 1]
    return Stream(start - 1.0, tuple((start + n * step, n + 1) for n in told))


def test_one_stream_counts_its_tokens_after_the_first() -> None:
    assert total_tok_s([even(10.0, 12.0, 21)]) == pytest.approx(10.0)
    assert even(10.0, 12.0, 21).ttft_s == 1.0


def test_only_the_span_in_which_all_streams_answer_counts() -> None:
    # 10 tok/s each; the second begins one second later, when the first has a second left.
    assert total_tok_s([even(0.0, 2.0, 21), even(1.0, 3.0, 21)]) == pytest.approx(20.0)


@pytest.mark.parametrize("every", [2, 3, 7, 20])
def test_telling_tokens_in_bursts_changes_nothing(every: int) -> None:
    streams = [even(0.0, 2.0, 41, every), even(0.33, 2.4, 41, every), even(0.7, 2.9, 41, every)]
    smooth = [even(0.0, 2.0, 41), even(0.33, 2.4, 41), even(0.7, 2.9, 41)]
    assert total_tok_s(streams) == pytest.approx(total_tok_s(smooth))


def test_streams_one_after_the_other_have_no_rate_together() -> None:
    with pytest.raises(MeasureFailed, match="never all answering at once"):
        total_tok_s([even(0.0, 1.0, 5), even(1.0, 2.0, 5)])


def test_no_two_prompts_begin_alike_and_a_seed_repeats_them() -> None:
    prompts = Prompts(300, seed=4)
    drawn = [prompts.draw(6) for _ in range(300)]
    assert len({prompt[0] for prompt in drawn}) == 300
    assert all(len(prompt) == 6 and max(prompt) < 300 for prompt in drawn)
    again = Prompts(300, seed=4)
    assert drawn == [again.draw(6) for _ in range(300)]


class OneEnd(Client):
    """Every request ends as told."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended

    def start(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Generation:
        assert on_event is not None
        on_event(Text("a", 1))
        on_event(self.ended)
        return Generation(lambda: None)

    def load(self, progress: LoadProgress | None = None) -> ModelInfo:
        raise NotImplementedError

    @property
    def info(self) -> ModelInfo | None:
        return None

    def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> tuple[Token, ...]:
        raise NotImplementedError

    def detokenize(self, tokens: Sequence[int]) -> str:
        raise NotImplementedError

    def count_tokens(self, request: Request) -> int:
        raise NotImplementedError

    def cancel_load(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def finished(completion: int, cached: int = 0) -> Ended:
    return Ended("finished", RunStats(usage=Usage(4, completion, cached)))


def test_a_prompt_that_was_partly_known_is_refused() -> None:
    with pytest.raises(MeasureFailed, match="2 of 4 prompt tokens came from the prompt cache"):
        answer_all(OneEnd(finished(3, cached=2)), [(1, 2, 3, 4)], 3)


def test_an_answer_of_another_length_is_refused() -> None:
    with pytest.raises(MeasureFailed, match="has 2 tokens where 3"):
        answer_all(OneEnd(finished(2)), [(1, 2, 3, 4)], 3)


def test_a_request_that_failed_is_its_error_and_a_cancelled_one_no_figure() -> None:
    failed = Ended("failed", RunStats(), "PromptTooLong", "too long")
    with pytest.raises(PromptTooLong):
        answer_all(OneEnd(failed), [(1,)], 3)
    assert answer_all(OneEnd(Ended("cancelled", RunStats())), [(1,)], 3) is None
