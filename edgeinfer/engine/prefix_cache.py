"""Prompt prefixes in host memory: KV snapshots by block, found by the longest common prefix.

A block holds the keys and values of up to BLOCK_TOKENS positions; its key is a hash chained over all
tokens before it (as in vLLM v1), so equal keys mean equal histories and conversations with a common
prefix share blocks. Blocks of a sequence that was evicted from hang from a root of their own
(history.py). Memory is bounded: the least recently used leaf goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edgeinfer.backend import BLOCK_TOKENS
from edgeinfer.engine.history import ROOT, Gap, new_hash, token_bytes

MOST_GAPS = 4096  # kept; the least recently used are forgotten, and their blocks with them


@dataclass(frozen=True)
class Block:
    key: bytes
    parent: bytes  # the key of the block before it, or a root
    tokens: tuple[int, ...]
    payload: bytes
    is_first: bool

    @property
    def num_bytes(self) -> int:
        return len(self.payload) + 8 * len(self.tokens)


@dataclass(frozen=True)
class Match:
    """Blocks to restore in order, and how many of their positions match the tokens asked for."""

    blocks: tuple[Block, ...]
    num_tokens: int


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    return new_hash(parent + token_bytes(tokens)).digest()


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    low, high = 0, size  # a[:low] == b[:low]; a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixCache:
    """capacity: bytes; 0 keeps nothing."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_bytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # least recently used first
        self._children: dict[bytes, list[bytes]] = {}
        self._gaps: OrderedDict[bytes, Gap] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def gaps(self) -> Iterable[Gap]:
        """Of the conversations that were kept and evicted from."""
        return self._gaps.values()

    def match(self, tokens: Sequence[int], root: bytes = ROOT) -> Match:
        """The longest cached prefix of `tokens`; counts as use."""
        found: list[Block] = []
        parent, position = root, 0
        while True:
            wanted = tuple(tokens[position : position + BLOCK_TOKENS])
            if len(wanted) == BLOCK_TOKENS:
                block = self._blocks.get(block_key(parent, wanted))
                if block is not None:
                    found.append(block)
                    parent, position = block.key, position + BLOCK_TOKENS
                    continue
            best, length = None, 0
            for key in self._children.get(parent, ()):
                shared = common_length(self._blocks[key].tokens, wanted)
                if shared > length:
                    best, length = self._blocks[key], shared
            if best is not None:
                found.append(best)
                position += length
            break
        self._touch(found)
        return Match(tuple(found), position)

    def store(
        self,
        tokens: Sequence[int],
        snapshot: Callable[[int, int], bytes],
        bytes_per_token: int,
        most_blocks: int | None = None,
        gap: Gap | None = None,
    ) -> int:
        """Keep the sequence whose positions hold `tokens`; `snapshot(start, stop)` is called for the
        blocks not here yet, or the first `most_blocks` of them. gap: what it holds no more. Returns how
        many bytes were added; 0 if it is here already, or does not fit at all."""
        if self.capacity <= 0 or len(tokens) * bytes_per_token > self.capacity:
            return 0
        added = 0
        path: list[Block] = []
        parent = ROOT if gap is None else gap.root
        if gap is not None:
            self._gaps[gap.key] = gap
            self._gaps.move_to_end(gap.key)
            if len(self._gaps) > MOST_GAPS:
                self._gaps.popitem(last=False)
        for start in range(0, len(tokens), BLOCK_TOKENS):
            part = tuple(tokens[start : start + BLOCK_TOKENS])
            key = block_key(parent, part)
            block = self._blocks.get(key)
            if block is None:
                if most_blocks == 0:
                    break
                longer = self._extension(parent, part)
                if longer is not None:  # a tail that a kept block already covers
                    path.append(longer)
                    break
                block = Block(key, parent, part, snapshot(start, start + len(part)), start == 0)
                self._add(block)
                added += block.num_bytes
                most_blocks = None if most_blocks is None else most_blocks - 1
            path.append(block)
            parent = key
        self._touch(path)
        self._shrink()
        return added

    def clear(self) -> None:
        self._blocks.clear()
        self._children.clear()
        self._gaps.clear()
        self.num_bytes = 0

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(block.num_bytes for block in self._blocks.values())
        for key, block in self._blocks.items():
            assert key in self._children[block.parent]
            assert block.is_first or block.parent in self._blocks, "an orphan"
        assert sum(len(c) for c in self._children.values()) == len(self._blocks)

    def _extension(self, parent: bytes, part: tuple[int, ...]) -> Block | None:
        for key in self._children.get(parent, ()):
            block = self._blocks[key]
            if len(block.tokens) > len(part) and block.tokens[: len(part)] == part:
                return block
        return None

    def _add(self, block: Block) -> None:
        # A shorter tail of the same history is covered by the new block.
        for key in list(self._children.get(block.parent, ())):
            other = self._blocks[key]
            if other.tokens == block.tokens[: len(other.tokens)] and key not in self._children:
                self._remove(other)
        self._blocks[block.key] = block
        self._children.setdefault(block.parent, []).append(block.key)
        self.num_bytes += block.num_bytes

    def _remove(self, block: Block) -> None:
        del self._blocks[block.key]
        siblings = self._children[block.parent]
        siblings.remove(block.key)
        if not siblings:
            del self._children[block.parent]
        self.num_bytes -= block.num_bytes

    def _touch(self, path: Sequence[Block]) -> None:
        # Leaf first, so that a parent is always more recent than its children.
        for block in reversed(path):
            if block.key in self._blocks:
                self._blocks.move_to_end(block.key)

    def _shrink(self) -> None:
        while self.num_bytes > self.capacity:
            leaf = next(b for b in self._blocks.values() if b.key not in self._children)
            self._remove(leaf)
