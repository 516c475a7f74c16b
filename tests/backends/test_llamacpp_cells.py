from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgeinfer_backends.llamacpp.cells import CellTable


def table_with(*lengths: int) -> CellTable:
    table = CellTable(64)
    for sequence, length in enumerate(lengths):
        table.open(sequence)
        table.append(sequence, length)
    return table


def test_cells_are_handed_out_at_the_top() -> None:
    table = table_with(3, 2)
    assert (table.top, table.room(), table.dead) == (5, 59, 0)


def test_a_tail_at_the_top_is_given_back() -> None:
    table = table_with(3, 4)
    assert table.drop(1, 2, 4).buried == ()
    assert (table.top, table.dead) == (5, 0)


def test_a_hole_below_another_sequence_is_buried() -> None:
    table = table_with(3, 4)
    assert table.drop(0, 1, 3).buried == ((1, 3),)
    assert (table.top, table.dead, table.reclaimable()) == (7, 2, 59)


def test_a_shared_cell_stays_until_its_last_owner_drops_it() -> None:
    table = table_with(4)
    table.share(0, 1, 4)
    assert table.drop(0, 0, 4).buried == ()
    assert table.top == 4
    assert table.drop(1, 0, 4).buried == ()
    assert table.top == 0


def test_pieces_are_cut_where_owners_change() -> None:
    table = table_with(4)
    table.share(0, 1, 2)
    table.append(1, 3)
    pieces = [(p.owners, p.start, p.stop) for p in table.pieces()]
    assert pieces == [((0, 1), 0, 2), ((0,), 2, 4), ((1,), 2, 5)]


class CellMachine(RuleBasedStateMachine):
    """Random use; after every step the mirror's invariants hold, position order among them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = CellTable(40)
        self.next = 0

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.table.sequences()))

    @rule()
    def open(self) -> None:
        self.table.open(self.next)
        self.next += 1

    @precondition(lambda self: self.table.sequences())
    @rule(data=st.data(), count=st.integers(1, 8))
    def append(self, data: st.DataObject, count: int) -> None:
        sequence = self.pick(data)
        if count > self.table.reclaimable():
            return
        if count > self.table.room():
            self.compact()
        self.table.append(sequence, count)

    @precondition(lambda self: self.table.sequences())
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        length = self.table.length(sequence)
        start = data.draw(st.integers(0, length))
        stop = data.draw(st.integers(start, length))
        if stop < length and self.table.is_shared(sequence, start):
            return  # a move would take the other owner's cells along: `evict` refuses it
        self.table.drop(sequence, start, stop)
        if not self.table.has_live_cells():
            self.table.clear()

    @precondition(lambda self: self.table.sequences())
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        source = self.pick(data)
        length = data.draw(st.integers(0, self.table.length(source)))
        self.table.share(source, self.next, length)
        self.next += 1

    @rule()
    def compact(self) -> None:
        bottom = self.table.lowest_dead()
        before = {s: self.table.length(s) for s in self.table.sequences()}
        pieces = self.table.pieces(bottom)
        self.table.lift(bottom)
        for piece in pieces:
            self.table.put(piece, piece.start, piece.stop)
        assert self.table.dead == 0
        assert before == {s: self.table.length(s) for s in self.table.sequences()}

    @invariant()
    def is_whole(self) -> None:
        self.table.check_integrity()


TestCells = CellMachine.TestCase
TestCells.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
