"""Training of exits as far as it needs no framework: openings, texts, kept tokens, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.distill.agreement import agreement
from edgeinfer.distill.kept_vocabulary import coverage_of, kept_tokens
from edgeinfer.distill.openings import ChatFrame, Library, begun_texts
from edgeinfer.distill.texts import Texts, joined, load_texts, save_texts
from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer.exits import ANSWERED, ASKED, FORCED


class ByteTokenizer:
    """`Tokenizer`, as far as openings need it: a token for each byte."""

    vocab_size, bos, eos, adds_bos = 256, None, None, False

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())


def chatml(messages: Sequence[Mapping[str, Any]]) -> str:
    turns = [f"<{each['role']}>{each['content']}</>\n" for each in messages]
    return "".join(turns) + "<assistant>"


def texts_of(rows: int, length: int = 12, *, seed: int = 0) -> Texts:
    random = np.random.default_rng(seed)
    return Texts(
        random.integers(0, 50, (rows, length)).astype(np.int32),
        random.integers(FORCED, ANSWERED + 1, (rows, length)).astype(np.uint8),
        random.integers(0, 4, rows).astype(np.uint8),
        random.choice([0.0, 0.8], rows).astype(np.float32),
    )


def text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode()


def test_a_chat_begins_inside_the_turn_of_who_asks() -> None:
    tokenizer: Any = ByteTokenizer()
    frame = ChatFrame(chatml, tokenizer)
    assert text(frame.turns.after_question) == "</>\n<assistant>"
    assert text(frame.turns.after_answer) == "</>\n<user>"
    opening = frame.opening("Be brief.", "What is", 0.5)
    assert text(opening.tokens) == "<system>Be brief.</>\n<user>What is"
    assert opening.asks and opening.temperature == 0.5


def test_a_template_that_changes_messages_is_refused() -> None:
    tokenizer: Any = ByteTokenizer()
    with pytest.raises(UnsupportedModel, match="changes messages"):
        ChatFrame(lambda messages: chatml(messages).upper(), tokenizer)


def test_openings_are_the_same_for_a_seed_and_share_no_file_with_those_held_out(tmp_path: Path) -> None:
    for index in range(40):
        own = "\n".join(f"line {row} of file {index:03}" for row in range(400))
        (tmp_path / f"module{index}.py").write_text(f'"""{own}"""\n')
    tokenizer: Any = ByteTokenizer()
    frame, library = ChatFrame(chatml, tokenizer), Library(tmp_path)

    def drawn(seed: int, *, held_out: bool) -> list[Any]:
        return begun_texts(200, frame, library, tokenizer, seed=seed, held_out=held_out, longest=64)

    first, other = drawn(1, held_out=False), drawn(2, held_out=True)
    assert first == drawn(1, held_out=False) != drawn(3, held_out=False)
    assert max(len(each.opening.tokens) for each in [*first, *other]) <= 64
    assert {each.group for each in first} == {0, 1, 2, 3}
    assert {each.opening.temperature for each in other} == {0.8, 0.0}

    def files(begun: list[Any]) -> set[str]:
        plain = [text(each.opening.tokens) for each in begun if not each.opening.asks]
        return {each.split("file ")[1][:3] for each in plain if "file " in each}

    assert files(first) and files(other) and not files(first) & files(other)


def test_without_a_library_all_texts_are_chats(tmp_path: Path) -> None:
    tokenizer: Any = ByteTokenizer()
    begun = begun_texts(
        50,
        ChatFrame(chatml, tokenizer),
        Library(tmp_path),
        tokenizer,
        seed=1,
        held_out=False,
        longest=256,
    )
    assert all(each.opening.asks for each in begun)


def test_the_head_keeps_the_most_frequent_tokens_and_those_it_must() -> None:
    tokens = np.array([[5] * 50 + [6] * 30 + [7] * 15 + [8] * 5], dtype=np.int32)
    kinds = np.full(tokens.shape, ANSWERED, dtype=np.uint8)
    texts = Texts(tokens, kinds, np.zeros(1, np.uint8), np.ones(1, np.float32))
    kept = kept_tokens(texts, 2000, [3], coverage=0.9, most=3)
    assert kept.tolist() == [3, 5, 6]
    assert coverage_of(kept, texts) == pytest.approx(0.8)
    assert len(kept_tokens(texts, 2000, [3], coverage=0.9, most=4096)) == 256
    forced = Texts(tokens, np.zeros_like(kinds), texts.groups, texts.temperatures)
    assert coverage_of(kept, forced) == 0.0


def test_agreement_counts_a_later_position_only_where_a_draft_would_have_got_there() -> None:
    #                  position:  0  1  2  3  4  5
    tokens = np.array([[9, 1, 2, 3, 8, 5]], dtype=np.int32)
    model = np.array([[1, 2, 3, 4, 5, 0]], dtype=np.int32)  # the text left it at position 4
    guess = np.array([[1, 2, 7, 4, 5, 0]], dtype=np.int32)  # wrong at position 2
    kinds = np.full(tokens.shape, ANSWERED, dtype=np.uint8)
    texts = Texts(tokens, kinds, np.zeros(1, np.uint8), np.ones(1, np.float32))
    found = agreement(model, guess, texts, [0])
    # first: 5 starts, 4 agree. second: behind 0, 1 (3 agreed, but the text went elsewhere): yes, no.
    assert found.positions == (5, 2, 1, 0)
    assert found.by_position == (pytest.approx(0.8), 0.5, 0.0, 0.0)
    assert found.accepted == pytest.approx(0.8 + 0.4)
    assert found.written == pytest.approx(3 / 5)
    kinds[0, 1] = ASKED
    assert agreement(model, guess, texts, [0]).positions[0] == 4


def test_texts_come_back_from_their_file(tmp_path: Path) -> None:
    texts = joined([texts_of(5), texts_of(3, seed=1)])
    save_texts(tmp_path / "texts", texts, "digest")
    found = load_texts(tmp_path / "texts", "digest", 50)
    for name in ("tokens", "kinds", "groups", "temperatures"):
        assert np.array_equal(getattr(found, name), getattr(texts, name))
    with pytest.raises(ModelFileInvalid, match="not of this model"):
        load_texts(tmp_path / "texts", "other", 50)
    with pytest.raises(ModelFileInvalid, match="does not have"):
        load_texts(tmp_path / "texts", "digest", 40)


def test_a_damaged_file_of_texts_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    save_texts(path, texts_of(4), "digest")
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(200):
        damaged = bytearray(whole[: int(random.integers(0, len(whole)))])
        for place in random.integers(0, max(len(damaged), 1), 3):
            if damaged:
                damaged[place % len(damaged)] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(ModelFileInvalid, match="texts"):
            load_texts(path, "digest", 50)
