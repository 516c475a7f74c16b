from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.backend import BLOCK_TOKENS
from edgeinfer.engine.prefix_cache import PrefixCache, common_length

MIB = 2**20


def payloads(taken: list[tuple[int, int]] | None = None) -> Callable[[int, int], bytes]:
    def snapshot(start: int, stop: int) -> bytes:
        if taken is not None:
            taken.append((start, stop))
        return bytes(stop - start)

    return snapshot


def test_nothing_is_found_in_an_empty_cache() -> None:
    match = PrefixCache(MIB).match([1, 2, 3])
    assert (match.blocks, match.num_tokens) == ((), 0)


def test_the_next_turn_finds_all_of_the_last() -> None:
    cache = PrefixCache(MIB)
    history = list(range(600))
    cache.store(history, payloads(), 1)
    match = cache.match([*history, 7, 8])
    assert match.num_tokens == 600
    assert [len(block.tokens) for block in match.blocks] == [256, 256, 88]


def test_a_block_may_match_in_part() -> None:
    cache = PrefixCache(MIB)
    cache.store(list(range(600)), payloads(), 1)
    match = cache.match([*range(300), 9, 9, 9])
    assert match.num_tokens == 300
    assert len(match.blocks) == 2


def test_a_longer_history_stores_only_its_new_blocks() -> None:
    cache = PrefixCache(MIB)
    taken: list[tuple[int, int]] = []
    history = list(range(512))
    cache.store(history, payloads(taken), 1)
    cache.store([*history, *range(40)], payloads(taken), 1)
    assert taken == [(0, 256), (256, 512), (512, 552)]
    assert len(cache) == 3


def test_conversations_with_a_common_prefix_share_its_blocks() -> None:
    cache = PrefixCache(MIB)
    system = list(range(BLOCK_TOKENS))
    cache.store([*system, 1, 1], payloads(), 1)
    cache.store([*system, 2, 2], payloads(), 1)
    assert len(cache) == 3
    assert cache.match([*system, 2, 2, 5]).num_tokens == BLOCK_TOKENS + 2


def test_the_same_tokens_after_another_history_are_another_block() -> None:
    cache = PrefixCache(MIB)
    cache.store([*([1] * 256), *([3] * 256)], payloads(), 1)
    assert cache.match([*([2] * 256), *([3] * 256)]).num_tokens == 0


def test_a_grown_tail_replaces_the_shorter_one() -> None:
    cache = PrefixCache(MIB)
    cache.store([1, 2, 3], payloads(), 1)
    cache.store([1, 2, 3, 4, 5], payloads(), 1)
    assert len(cache) == 1
    cache.store([1, 2], payloads(), 1)  # covered already
    assert len(cache) == 1
    cache.check_integrity()


def test_memory_is_bounded_and_the_least_recently_used_leaf_goes_first() -> None:
    cache = PrefixCache(4 * 256 * 9)
    for name in (1, 2, 3):
        cache.store([name] * 256, payloads(), 1)
    cache.match([1] * 256)
    cache.store([4] * 512, payloads(), 1)
    cache.check_integrity()
    assert cache.num_bytes <= cache.capacity
    assert cache.match([1] * 256).num_tokens == 256
    assert cache.match([2] * 256).num_tokens == 0
    assert cache.match([4] * 512).num_tokens == 512


def test_no_capacity_keeps_nothing_and_takes_no_snapshot() -> None:
    taken: list[tuple[int, int]] = []
    assert PrefixCache(0).store([1, 2, 3], payloads(taken), 1) == 0
    assert taken == []


@given(st.lists(st.lists(st.integers(0, 1), max_size=700), max_size=12), st.integers(0, 40_000))
def test_what_is_found_is_a_true_prefix_and_the_cache_stays_whole(
    histories: list[list[int]], capacity: int
) -> None:
    cache = PrefixCache(capacity)
    for history in histories:
        match = cache.match(history)
        found = [token for block in match.blocks for token in block.tokens]
        assert found[: match.num_tokens] == history[: match.num_tokens]
        cache.store(history, payloads(), 1)
        cache.check_integrity()
        assert cache.num_bytes <= capacity


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_length_is_that_of_the_longest_common_prefix(a: list[int], b: list[int]) -> None:
    length = common_length(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]
