from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.engine.window import Window, turn_starts
from edgeinfer_backends.scripted_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def chat(*turns: str) -> list[int]:
    text = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    return TOKENIZER.encode(text, add_special=True, parse_special=True)


def test_a_window_needs_room_beside_its_sinks() -> None:
    with pytest.raises(ValueError, match="no room for 8 sinks"):
        Window(8, 8)
    assert Window.of(4096, 512, 4) == Window(512, 4)
    assert Window.of(256, 512, 4) == Window(256, 4)  # the memory there is may allow less than was asked
    assert Window.of(4096) == Window(4096, 4)


def test_a_system_prompt_stays_whole_if_it_leaves_room_to_talk() -> None:
    window = Window(400, 4)
    assert window.head(0) == 4
    assert window.head(3) == 4  # the sinks stay in any case
    assert window.head(300) == 300
    assert window.head(301) == 4


def test_nothing_leaves_while_there_is_room() -> None:
    assert Window(100, 4).num_leaving(80, 20, 4, []) == 0


def test_a_quarter_leaves_at_a_time_or_as_much_as_must() -> None:
    window = Window(104, 4)
    assert window.num_leaving(104, 1, 4, []) == 25
    assert window.num_leaving(104, 60, 4, []) == 60
    assert window.num_leaving(104, 100, 4, []) == 100  # all but the head


def test_whole_turns_leave_where_one_begins_near() -> None:
    window = Window(104, 4)
    assert window.num_leaving(104, 1, 4, [10, 34, 80]) == 30
    assert window.num_leaving(104, 1, 4, [4, 90]) == 25  # too far: too much would be lost
    assert window.num_leaving(104, 20, 4, [10, 23]) == 25  # too little to make room
    assert window.num_leaving(104, 20, 4, [10, 24]) == 20


def test_a_long_prompt_is_cut_at_a_turn_and_leaves_room_for_the_answer() -> None:
    window = Window(104, 4)
    assert window.cut(60, 4, None, []) == 4
    assert window.cut(80, 4, None, []) == 5  # 75 tokens behind the head, 25 for the answer
    assert window.cut(1000, 4, None, []) == 925
    assert window.cut(1000, 4, 10, []) == 910
    assert window.cut(1000, 4, None, [900, 930, 990]) == 930
    assert window.cut(1000, 4, None, [900, 990]) == 925  # one turn that does not fit


@given(
    size=st.integers(32, 400),
    sinks=st.integers(0, 31),
    kept=st.integers(0, 500),
    length=st.integers(1, 2000),
    turns=st.lists(st.integers(0, 2000), max_size=20).map(sorted),
    answer=st.none() | st.integers(1, 5000),
)
def test_whatever_leaves_the_rest_fits(
    size: int, sinks: int, kept: int, length: int, turns: list[int], answer: int | None
) -> None:
    window = Window(size, sinks)
    head = window.head(kept)
    assert sinks <= head < size
    cut = window.cut(length, head, answer, turns)
    if cut > head:
        assert 0 < length - cut <= size - head
    else:
        assert length <= size
    held = min(length, size)
    more = max(1, min(size - head, length))
    if held >= head:
        leaving = window.num_leaving(held, more, head, turns)
        assert 0 <= leaving <= held - head
        assert held - leaving + more <= size


def test_turns_begin_after_an_end_and_its_blanks() -> None:
    tokens = chat("system\nBe kind.", "user\nHi", "assistant\nHello")
    starts = turn_starts(tokens, TOKENIZER)
    assert len(starts) == 2  # the first one is the beginning
    for start, role in zip(starts, ("user", "assistant"), strict=True):
        assert TOKENIZER.decode_with_control(tokens[start:]).startswith(f"<|im_start|>{role}")


def test_a_text_without_turns_has_none() -> None:
    assert turn_starts(list(b"no turns here"), TOKENIZER) == []
