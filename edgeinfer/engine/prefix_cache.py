"""Prompt prefixes in host memory and on disk: KV snapshots by block, found by the longest common prefix.

A block holds the keys and values of up to BLOCK_TOKENS positions; its key is a hash chained over all
tokens before it (as in vLLM v1), so equal keys mean equal histories and conversations with a common
prefix share blocks. Blocks of a sequence that was evicted from hang from a root of their own
(history.py). One tree knows the blocks of both places. Memory is bounded: the least recently used leaf
goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from edgeinfer.backend import BLOCK_TOKENS
from edgeinfer.engine.block_files import block_key
from edgeinfer.engine.disk_cache import DiskCache
from edgeinfer.engine.history import ROOT, Gap

MOST_GAPS = 4096  # kept; the least recently used are forgotten, and their blocks with them

__all__ = ["Block", "Match", "PrefixCache", "block_key", "common_length"]


@dataclass(slots=True, eq=False)
class Block:
    key: bytes
    parent: bytes  # the key of the block before it, or a root
    tokens: tuple[int, ...]
    payload: bytes | None  # in memory
    is_first: bool
    is_on_disk: bool = False

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return 0 if self.payload is None else self.size_of(self.payload)

    def size_of(self, payload: bytes) -> int:
        return len(payload) + 8 * len(self.tokens)

    @property
    def is_full(self) -> bool:
        return len(self.tokens) == BLOCK_TOKENS


@dataclass(frozen=True)
class Match:
    """Blocks to restore in order, and how many of their positions match the tokens asked for."""

    blocks: tuple[Block, ...]
    num_tokens: int


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
    """capacity: bytes of memory; 0 keeps nothing there. disk: where blocks survive the process."""

    def __init__(self, capacity: int, disk: DiskCache | None = None) -> None:
        self.capacity = capacity
        self.disk = disk
        self.num_bytes = 0
        self._blocks: dict[bytes, Block] = {}
        self._in_memory: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self._children: dict[bytes, list[bytes]] = {}
        self._gaps: OrderedDict[bytes, Gap] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def is_kept(self) -> bool:
        """Whether anything is."""
        return self.capacity > 0 or self.disk is not None

    # -- looking ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Learn what this process and others wrote to disk and removed from it."""
        changes = self.disk.changes() if self.disk is not None else None
        if changes is None:
            return
        for header in changes.added:
            block = self._blocks.get(header.key)
            if block is None:
                block = Block(header.key, header.parent, header.tokens, None, header.is_first)
                self._add(block)
            block.is_on_disk = True
        for key in changes.gone:
            if key in self._blocks:
                self._leave_disk(self._blocks[key])
        for gap in changes.gaps:
            self._note(gap)
        self._shrink()

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

    def payloads(self, blocks: Sequence[Block]) -> Iterator[tuple[bytes, bool] | None]:
        """Of each block what it holds, and whether that came from disk; None for the first one that is
        not there after all, and nothing after it."""
        from_disk = [block.key for block in blocks if block.payload is None]
        read = self.disk.read(from_disk) if self.disk is not None and from_disk else iter(())
        path = {block.key for block in blocks}
        for block in blocks:
            payload = block.payload
            if payload is not None:
                yield payload, False
                continue
            payload = next(read, None)
            if payload is None:
                self._leave_disk(block)
                yield None
                return
            yield payload, True
            if block.key in self._blocks and block.payload is None:
                self._keep_if_it_fits(block, payload, path)
        self._touch_disk(blocks)

    def _keep_if_it_fits(self, block: Block, payload: bytes, path: Collection[bytes]) -> None:
        """What was read from disk; what else is on the `path` stays."""
        size = block.size_of(payload)
        if size <= self.capacity:
            self._shrink(size, path)
        if self.num_bytes + size <= self.capacity:
            block.payload = payload
            self.num_bytes += size
            self._in_memory[block.key] = None

    # -- keeping ---------------------------------------------------------------------------------

    def store(
        self,
        tokens: Sequence[int],
        snapshot: Callable[[int, int], bytes],
        bytes_per_token: int,
        most_blocks: int | None = None,
        gap: Gap | None = None,
        *,
        to_disk: bool = False,
        with_tail: bool = True,
    ) -> int:
        """Keep the sequence whose positions hold `tokens`; `snapshot(start, stop)` is called for the
        blocks not here yet, or the first `most_blocks` of them. gap: what it holds no more. to_disk: it
        is worth a file for each block, a last short one too if `with_tail`. Returns how many bytes were
        added; 0 if it is here already, or there is no place for it now."""
        to_disk = to_disk and self.disk is not None
        fits = self.capacity > 0 and len(tokens) * bytes_per_token <= self.capacity
        if not (to_disk or fits):
            return 0
        added: list[tuple[Block, int, bool]] = []  # with its size, and whether it will be on disk
        path: list[Block] = []
        keys: set[bytes] = set()
        parent = ROOT if gap is None else gap.root
        if gap is not None:
            self._note(gap)
        for start in range(0, len(tokens), BLOCK_TOKENS):
            part = tuple(tokens[start : start + BLOCK_TOKENS])
            key = block_key(parent, part)
            block = self._blocks.get(key)
            if block is None:
                is_file = to_disk and (len(part) == BLOCK_TOKENS or with_tail)
                if most_blocks == 0 or not (fits or is_file):
                    break
                longer = self._extension(parent, part)
                if longer is not None:  # a tail that a kept block already covers
                    path.append(longer)
                    break
                block = Block(key, parent, part, snapshot(start, start + len(part)), start == 0)
                shorter = self._add(block)
                most_blocks = None if most_blocks is None else most_blocks - 1
                is_written = is_file and self._write(block, gap, shorter)
                if not (fits or is_written):  # too much waits to be written, or the disk is full
                    self._remove(block)
                    break
                added.append((block, block.num_bytes, is_written))
            elif to_disk and (block.is_full or with_tail):
                self._write(block, gap)
            path.append(block)
            keys.add(key)
            self._shrink(spared=keys)
            parent = key
        self._touch(path)
        if to_disk:
            self._touch_disk(path)
        self._shrink()
        return sum(size for block, size, is_written in added if is_written or block.key in self._blocks)

    def path(self, tokens: Sequence[int], gap: Gap | None = None) -> list[Block]:
        """The blocks of a sequence that was stored."""
        return list(self.match(tokens, ROOT if gap is None else gap.root).blocks)

    def forget(self, block: Block) -> None:
        """What a runtime refused is of no use to anybody, nor is what comes after it."""
        doomed = [block]
        for each in doomed:  # it grows on the way
            doomed += [self._blocks[key] for key in self._children.get(each.key, ())]
        for each in reversed(doomed):
            if self.disk is not None and each.is_on_disk:
                self.disk.remove(each.key)
            if each.key in self._blocks:
                self._remove(each)

    def _write(self, block: Block, gap: Gap | None, instead_of: tuple[bytes, ...] = ()) -> bool:
        """False if it will not be on disk."""
        if self.disk is None or block.payload is None:
            return False
        return (
            block.is_on_disk
            or self.disk.is_waiting(block.key)
            or self.disk.write(
                block.key,
                block.parent,
                block.is_first,
                block.tokens,
                block.payload,
                gap=gap,
                instead_of=instead_of,
            )
        )

    def clear(self) -> None:
        """Memory; what is on disk stays known."""
        for block in list(self._blocks.values()):
            self._leave_memory(block)
        self._gaps.clear()

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(block.num_bytes for block in self._blocks.values())
        in_memory = {key for key, block in self._blocks.items() if block.payload is not None}
        assert in_memory == set(self._in_memory)
        for key, block in self._blocks.items():
            assert key in self._children[block.parent]
            assert block.payload is not None or block.is_on_disk
            if self.disk is None:
                assert block.is_first or block.parent in self._blocks, "an orphan"
        assert sum(len(c) for c in self._children.values()) == len(self._blocks)

    def _note(self, gap: Gap) -> None:
        self._gaps[gap.key] = gap
        self._gaps.move_to_end(gap.key)
        if len(self._gaps) > MOST_GAPS:
            self._gaps.popitem(last=False)

    def _extension(self, parent: bytes, part: tuple[int, ...]) -> Block | None:
        for key in self._children.get(parent, ()):
            block = self._blocks[key]
            if len(block.tokens) > len(part) and block.tokens[: len(part)] == part:
                return block
        return None

    def _add(self, block: Block) -> tuple[bytes, ...]:
        """Returns the shorter tails of the same history, which the block makes superfluous."""
        shorter = []
        for key in self._children.get(block.parent, ()):
            other = self._blocks[key]
            if other.tokens == block.tokens[: len(other.tokens)] and key not in self._children:
                shorter.append(key)
        for key in shorter:
            self._leave_memory(self._blocks[key])
        self._blocks[block.key] = block
        self._children.setdefault(block.parent, []).append(block.key)
        if block.payload is not None:
            self.num_bytes += block.num_bytes
            self._in_memory[block.key] = None
        return tuple(shorter)

    def _remove(self, block: Block) -> None:
        del self._blocks[block.key]
        siblings = self._children[block.parent]
        siblings.remove(block.key)
        if not siblings:
            del self._children[block.parent]
        self.num_bytes -= block.num_bytes
        self._in_memory.pop(block.key, None)

    def _leave_memory(self, block: Block) -> None:
        if not block.is_on_disk:
            self._remove(block)
        elif block.payload is not None:
            self.num_bytes -= block.num_bytes
            block.payload = None
            del self._in_memory[block.key]

    def _leave_disk(self, block: Block) -> None:
        block.is_on_disk = False
        if block.payload is None and block.key in self._blocks:
            self._remove(block)

    def _touch(self, path: Sequence[Block]) -> None:
        # Leaf first, so that a parent is always more recent than its children.
        for block in reversed(path):
            if block.key in self._in_memory:
                self._in_memory.move_to_end(block.key)

    def _touch_disk(self, path: Sequence[Block]) -> None:
        if self.disk is not None:
            self.disk.touch([block.key for block in path])

    def _shrink(self, room: int = 0, spared: Collection[bytes] = ()) -> None:
        """What waits to be written is in memory anyway, and stays known until it is on disk. room: bytes
        to be free then. spared: blocks that stay."""
        while self.num_bytes + room > self.capacity:
            may_leave = (key for key in self._in_memory if key not in spared and self._may_leave(key))
            leaf = next(may_leave, None)
            if leaf is None:
                return
            self._leave_memory(self._blocks[leaf])

    def _may_leave(self, key: bytes) -> bool:
        if self._blocks[key].is_on_disk:
            return True
        is_waiting = self.disk is not None and self.disk.is_waiting(key)
        return key not in self._children and not is_waiting
