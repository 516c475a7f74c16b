from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.engine.detokenizer import Detokenizer


def fed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, Detokenizer]:
    detokenizer = Detokenizer(stop)
    text = "".join(detokenizer.feed(piece) for piece in pieces)
    return text + detokenizer.finish(), detokenizer


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    detokenizer = Detokenizer()
    first, second = "🐟".encode()[:2], "🐟".encode()[2:]
    assert detokenizer.feed(first) == ""
    assert detokenizer.feed(second) == "🐟"


def test_half_a_character_at_the_end_is_marked_not_lost() -> None:
    assert fed([b"ab", "é".encode()[:1]])[0] == "ab\ufffd"


def test_invalid_bytes_do_not_stop_the_stream() -> None:
    assert fed([b"a\xff", b"b"])[0] == "a\ufffdb"


def test_text_before_a_stop_string_comes_out_and_nothing_after_it() -> None:
    text, detokenizer = fed([b"one tw", b"o\nUser: three"], ("\nUser:",))
    assert text == "one two"
    assert detokenizer.stopped_by == "\nUser:"


def test_a_possible_stop_string_is_held_back_until_decided() -> None:
    detokenizer = Detokenizer(("STOP",))
    assert detokenizer.feed(b"a S") == "a "
    assert detokenizer.feed(b"T") == ""
    assert detokenizer.feed(b"AR") == "STAR"
    assert detokenizer.stopped_by is None


def test_an_undecided_end_comes_out_when_the_answer_is_over() -> None:
    assert fed([b"x ST"], ("STOP",))[0] == "x ST"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    text, detokenizer = fed([b"a.b!c"], ("!", "."))
    assert (text, detokenizer.stopped_by) == ("a", ".")


def test_a_stop_string_that_begins_like_itself_is_found() -> None:
    assert fed([b"aa", b"ab"], ("aab",))[0] == "a"


@given(
    st.text(max_size=60), st.lists(st.integers(1, 5), max_size=80), st.text("ab", min_size=1, max_size=4)
)
def test_any_cutting_into_tokens_gives_the_text_up_to_the_stop(
    text: str, sizes: list[int], stop: str
) -> None:
    data = text.encode()
    pieces, offset = [], 0
    for size in sizes:
        pieces.append(data[offset : offset + size])
        offset += size
    pieces.append(data[offset:])
    assert fed(pieces, (stop,))[0] == text.split(stop)[0]


@given(
    text=st.text(st.sampled_from("ab<tool>, "), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    stop=st.sampled_from([("o",), ("tool",), (",", "b"), ("<tool>x",), ("l>,",)]),
)
def test_no_stop_string_cuts_what_has_begun(text: str, cuts: list[int], stop: tuple[str, ...]) -> None:
    begun = text.find("<tool>")
    met = min((at for each in stop if (at := text.find(each)) >= 0), default=-1)
    whole = met < 0 or 0 <= begun <= met
    at = sorted(cut for cut in cuts if cut <= len(text))
    pieces = [text[a:b].encode() for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    detokenizer = Detokenizer(stop, ("<tool>",))
    found = "".join(detokenizer.feed(piece) for piece in pieces) + detokenizer.finish()
    assert found == (text if whole else text[:met])
    assert (detokenizer.stopped_by is None) == whole


def test_text_flows_again_once_nothing_stops_it() -> None:
    detokenizer = Detokenizer((",",), ("{",))
    assert detokenizer.feed(b"a {") == "a {"
    assert detokenizer.feed(b"b, c") == "b, c"
