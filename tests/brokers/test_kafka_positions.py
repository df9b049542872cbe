"""The positions of a Kafka partition: what is committed, and what a new owner makes of it."""

from __future__ import annotations

import base64
import itertools
import pickle
import random
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import ValidationError

from sidecar.broker import MAX_CRASHES, NO_FAILURES, Failures
from sidecar.brokers.kafka import positions as module
from sidecar.brokers.kafka.positions import (
    MAX_ATTEMPTS,
    MAX_GAP,
    METADATA_BYTES,
    PartitionPositions,
    fence_metadata,
    fence_of,
)
from sidecar.config import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from _typeshed import TraceFunction

BIG = 1 << 40
SECOND = 1_000_000_000


def found(positions: PartitionPositions, log: Iterable[int]) -> dict[int, Failures]:
    """What of *log*, fetched in this order, is handed out, with the failures so far."""
    asked = ((offset, positions.fetched(offset)) for offset in log)
    return {offset: failures for offset, failures in asked if failures is not None}


def handed_out(positions: PartitionPositions, log: Iterable[int]) -> dict[int, int]:
    """The same with the failed attempts alone."""
    return {offset: failures.attempts for offset, failures in found(positions, log).items()}


def committed(positions: PartitionPositions) -> tuple[int, str]:
    due = positions.commit()
    assert due is not None
    assert len(due[1].encode()) <= METADATA_BYTES
    return due


def until_wide(
    positions: PartitionPositions, offsets: Iterable[int], *, ack: bool = False
) -> list[int]:
    taken: list[int] = []
    for offset in offsets:
        if positions.too_wide:
            return taken
        assert positions.fetched(offset) == NO_FAILURES
        taken.append(offset)
        if ack:
            positions.acked(offset)
    raise AssertionError("never too wide")


# -- against the naive oracle


FAILURES = st.builds(
    Failures,
    st.integers(1, 6) | st.integers(1, MAX_ATTEMPTS),
    st.integers(0, MAX_CRASHES),
    st.just(0) | st.integers(1, 1 << 34 - 1).map(SECOND.__mul__),
)


class Group(RuleBasedStateMachine):
    """
    One partition of a group, with a set of what was acked and a dict of attempts beside it.

    Whatever happens in whatever order: a new owner is handed exactly what was not acked at the
    commit it begins from, with the attempts of then.
    """

    @initialize(
        first=st.integers(0, BIG),
        holes=st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 5, 4000]), min_size=40, max_size=40),
        new=st.booleans(),
    )
    def begin(self, first: int, holes: list[int], new: bool) -> None:  # noqa: FBT001
        self.log = list(itertools.accumulate((hole + 1 for hole in holes), initial=first))
        start = max(0, first - 2)
        self.positions = PartitionPositions.at(start) if new else PartitionPositions(start)
        self.acked: set[int] = set()
        self.failures: dict[int, Failures] = {}
        self.out: set[int] = set()
        self.back: set[int] = set()
        self.next = start
        self.vanished = False
        self.commits: list[tuple[int, str, set[int], dict[int, Failures]]] = [
            (start, "", set(), {})
        ]

    def expected(self, log: Iterable[int]) -> dict[int, Failures]:
        return {o: self.failures.get(o, NO_FAILURES) for o in log if o not in self.acked | self.out}

    @rule(count=st.integers(1, 12))
    def fetch(self, count: int) -> None:
        batch = [offset for offset in self.log if offset >= self.next][:count]
        expected = self.expected(batch)
        got = found(self.positions, batch)
        self.out.update(got)
        self.back.difference_update(got)
        self.next = batch[-1] + 1 if batch else self.next

        assert got == expected

    @precondition(lambda self: self.out)
    @rule(data=st.data(), last=st.booleans())
    def ack(self, data: st.DataObject, last: bool) -> None:  # noqa: FBT001
        offset = max(self.out) if last else data.draw(st.sampled_from(sorted(self.out)))
        self.positions.acked(offset)
        self.positions.acked(offset)
        self.out.remove(offset)
        self.acked.add(offset)
        self.failures.pop(offset, None)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), failures=FAILURES)
    def fail(self, data: st.DataObject, failures: Failures) -> None:
        offset = data.draw(st.sampled_from(sorted(self.out)))
        self.positions.failed(offset, failures)
        self.failures[offset] = failures

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """What was given back cannot be settled any more."""
        offset = data.draw(st.sampled_from(sorted(self.out)))
        self.positions.released(offset)
        self.positions.acked(offset)
        self.positions.failed(offset, Failures(7))
        self.out.remove(offset)
        self.back.add(offset)

    @precondition(lambda self: self.back)
    @rule()
    def again(self) -> None:
        batch = sorted(self.back)
        got = found(self.positions, batch)
        self.out.update(got)
        self.back.clear()

        assert got == {offset: self.failures.get(offset, NO_FAILURES) for offset in batch}

    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        """The broker's compaction or retention takes a record that was not acked, nor fetched."""
        kept = self.acked | self.out | self.back
        there = [offset for offset in self.log if offset not in kept]
        if there:
            offset = data.draw(st.sampled_from(there))
            self.log.remove(offset)
            self.failures.pop(offset, None)
            self.vanished = True

    @rule(answered=st.booleans())
    def commit(self, answered: bool) -> None:  # noqa: FBT001
        due = self.positions.commit()
        if due is None:
            return
        self.commits.append((*due, set(self.acked), dict(self.failures)))
        if answered:
            self.positions.confirm(*due)
            assert self.positions.commit() is None

    @rule(back=st.sampled_from([1, 2]))
    def restart(self, back: int) -> None:
        """A new owner, from the last commit or the one before (when the last did not arrive)."""
        del self.commits[len(self.commits) - min(back, len(self.commits)) + 1 :]
        offset, metadata, acked, failures = self.commits[-1]
        self.positions = PartitionPositions(offset, metadata)
        self.acked, self.failures = set(acked), dict(failures)
        self.out, self.back = set(), set()
        self.next = self.positions.next_offset

        assert self.next == offset
        assert self.positions.commit() is None

    @invariant()
    def a_new_owner_gets_exactly_what_was_not_acked(self) -> None:
        due = self.positions.commit()
        if due is None:
            return
        offset, metadata = due
        out, self.out = self.out, set()
        expected = self.expected(self.log)
        self.out = out
        got = found(PartitionPositions(offset, metadata), [o for o in self.log if o >= offset])

        assert got == expected
        assert len(metadata.encode()) <= METADATA_BYTES

    @invariant()
    def the_commit_is_the_whole_prefix(self) -> None:
        due = self.positions.commit()
        if due is None or self.vanished:
            return
        above = [o for o in self.log if o >= due[0]]

        assert all(o in self.acked for o in self.log if o < due[0])
        assert not above or above[0] not in self.acked


TestGroup = Group.TestCase
TestGroup.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# -- the commit


def test_in_order_the_metadata_stays_empty() -> None:
    positions = PartitionPositions(5)
    commits = []
    for offset in range(5, 8):
        positions.fetched(offset)
        positions.acked(offset)
        commits.append(committed(positions))

    assert commits == [(6, ""), (7, ""), (8, "")]


def test_a_hole_below_a_fetched_offset_is_done() -> None:
    positions = PartitionPositions(5)
    handed_out(positions, [10, 20])
    positions.acked(10)

    assert committed(positions) == (20, "")


def test_a_commit_is_offered_until_it_is_confirmed() -> None:
    positions = PartitionPositions(5)
    offered = [positions.commit()]
    handed_out(positions, [5, 6])
    offered.append(positions.commit())
    positions.acked(5)
    offered += [positions.commit(), positions.commit()]
    positions.confirm(6, "")
    offered.append(positions.commit())

    assert offered == [None, None, (6, ""), (6, ""), None]


def test_a_new_start_is_committed_at_once() -> None:
    """A group that starts at the end would else miss what comes before its first ack."""
    positions = PartitionPositions.at(1234)
    first = positions.commit()
    positions.confirm(1234, "")

    assert first == (1234, "")
    assert positions.next_offset == 1234
    assert positions.commit() is None


def test_attempts_travel_and_end_with_the_ack() -> None:
    positions = PartitionPositions(0)
    handed_out(positions, range(4))
    positions.failed(1, Failures(1))
    positions.failed(3, Failures(2))
    positions.failed(3, Failures(3))
    first = PartitionPositions(*committed(positions))
    taken_over = handed_out(first, range(5))
    first.acked(3)
    first.failed(1, Failures(0))

    assert taken_over == {0: 0, 1: 1, 2: 0, 3: 3, 4: 0}
    assert handed_out(PartitionPositions(*committed(first)), range(5)) == {0: 0, 1: 0, 2: 0, 4: 0}


def test_acks_are_handed_down_from_owner_to_owner() -> None:
    """Also by one that had not come to fetch them again."""
    first = PartitionPositions(0)
    handed_out(first, range(4))
    first.acked(1)
    first.acked(3)
    second = PartitionPositions(*committed(first))
    second.fetched(0)
    second.failed(0, Failures(1))
    third = PartitionPositions(*committed(second))

    assert handed_out(third, range(5)) == {0: 1, 2: 0, 4: 0}


def test_more_attempts_than_are_kept_cannot_be_configured() -> None:
    positions = PartitionPositions(0)
    positions.fetched(0)
    positions.failed(0, Failures(BIG, 99))

    with pytest.raises(ValidationError):
        Retry(max_attempts=MAX_ATTEMPTS + 1)
    assert handed_out(PartitionPositions(*committed(positions)), [0]) == {0: MAX_ATTEMPTS}


def test_released_offsets_come_again_and_only_they() -> None:
    positions = PartitionPositions(0)
    handed_out(positions, range(6))
    positions.failed(2, Failures(4))
    positions.released(2)
    positions.released(4)
    positions.acked(3)
    waiting, out = positions.waiting, positions.out

    assert (waiting, out, positions.end) == (2, [0, 1, 5], 6)
    assert handed_out(positions, range(2, 7)) == {2: 4, 4: 0, 6: 0}
    assert positions.waiting == 0


def test_what_vanished_before_a_new_owner_fetched_it_holds_nothing_back() -> None:
    """The broker's retention or compaction took it: nobody gets it any more."""
    former = PartitionPositions(0)
    handed_out(former, range(4))
    former.failed(1, Failures(2))
    former.acked(2)
    former.acked(3)
    positions = PartitionPositions(*committed(former))
    waiting = positions.waiting
    again = handed_out(positions, [4])

    assert waiting == 2
    assert again == {4: 0}
    assert committed(positions) == (4, "")
    assert "failing=0" in repr(positions)


# -- the mark of a move


def test_the_fence_is_handed_down_from_owner_to_owner() -> None:
    """With and without anything else to say; it takes the place of no offset."""
    moved = PartitionPositions(7, fence_metadata("0a1b2c3d"))
    handed_out(moved, range(7, 12))
    moved.acked(9)
    first = committed(moved)
    heir = PartitionPositions(*first)
    got = handed_out(heir, range(7, 13))
    for offset in got:
        heir.acked(offset)
    last = committed(heir)

    assert (moved.fence, heir.fence) == ("0a1b2c3d", "0a1b2c3d")
    assert list(got) == [7, 8, 10, 11, 12]
    assert last == (13, "sc1:0a1b2c3d;")
    assert PartitionPositions.at(5, "0a1b2c3d").commit() == (5, "sc1:0a1b2c3d;")


@pytest.mark.parametrize(
    "metadata",
    ["", "0a1b2c3d;", "sc1:", "sc1:0a1b2c3", "sc1:0a1b2c3d", "sc1:0A1B2C3D;", "sc2:0a1b2c3d;"],
)
def test_what_is_no_fence_is_none(metadata: str) -> None:
    assert fence_of(metadata) == ""


# -- the bound


SPACINGS = [1, 2, 3, 5, 10, 50, 200, 1000, 1400, 5000, 1 << 20, 1 << 40]
"""One record in so many offsets."""


def widest(spacing: int, keep: int, attempts: int) -> tuple[int, bool]:
    """
    Fetch until it is too wide; ack all but every keep-th one, which fail.

    The bytes of the metadata, and whether a new owner knows all.
    """
    positions = PartitionPositions(BIG)
    taken = until_wide(positions, itertools.count(BIG, spacing))
    expected = {}
    failures = Failures(attempts, MAX_CRASHES if attempts == MAX_ATTEMPTS else 0)
    for place, offset in enumerate(taken):
        if place % keep == 0:
            expected[offset] = failures
            positions.failed(offset, failures)
        else:
            positions.acked(offset)
    due = committed(positions)
    return len(due[1]), found(PartitionPositions(*due), taken) == expected


def test_the_metadata_fits_whatever_happens_after_too_wide() -> None:
    """Also when every other one is acked, and all others have failed as often as can be."""
    cases = itertools.product(SPACINGS, [1, 2, 3, 4, 7], [1, 5, MAX_ATTEMPTS])
    results = [widest(*case) for case in cases]

    assert all(exact for _, exact in results)
    assert 3000 < max(size for size, _ in results) <= METADATA_BYTES


@settings(max_examples=40, deadline=None)
@given(
    spread=st.integers(0, 20),
    acked=st.floats(0, 1),
    failing=st.floats(0, 1),
    steps=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 1 << 32),
)
def test_the_metadata_fits_in_any_mixture(
    spread: int, acked: float, failing: float, steps: float, seed: int
) -> None:
    """Acks while fetching and after it, holes of any length: nothing is left out."""
    chance = random.Random(seed)
    positions = PartitionPositions(7)
    log: list[int] = []
    expected: dict[int, Failures] = {}
    offset = 7
    while not positions.too_wide and len(log) < 8000:
        assert positions.fetched(offset) == NO_FAILURES
        log.append(offset)
        expected[offset] = NO_FAILURES
        if chance.random() < steps and offset != log[0]:
            positions.acked(offset)
            del expected[offset]
        offset += 1 + chance.getrandbits(chance.randint(0, spread))
    for one in list(expected):
        if chance.random() < acked:
            positions.acked(one)
            del expected[one]
        elif chance.random() < failing:
            counts = chance.randint(1, MAX_ATTEMPTS), chance.randint(0, MAX_CRASHES)
            first_ns = chance.choice([0, chance.randint(1, 1 << 34) * SECOND])
            expected[one] = Failures(*counts, first_ns)
            positions.failed(one, expected[one])
    due = positions.commit() or (7, "")
    got = found(PartitionPositions(*due), [o for o in log if o >= due[0]])
    without = {one: Failures(f.attempts, f.crashes) for one, f in expected.items()}

    assert len(due[1].encode()) <= METADATA_BYTES
    assert got in (expected, without)  # times are left out where they do not fit, all of them


def test_who_does_not_ask_gets_more_again_but_never_too_much_metadata() -> None:
    positions = PartitionPositions(0)
    log = range(40_000)
    handed_out(positions, log)
    for offset in log[1::2]:
        positions.acked(offset)
    again = handed_out(PartitionPositions(*committed(positions)), log)

    assert set(again) >= set(log[::2])
    assert len(again) < len(log)


def test_too_wide_ends_when_half_is_done() -> None:
    positions = PartitionPositions(0)
    taken = until_wide(positions, itertools.count())
    answers = []
    for offset in taken:
        positions.acked(offset)
        answers.append(positions.too_wide)
    changes = sum(a != b for a, b in itertools.pairwise(answers))

    assert len(taken) > 1300
    assert changes == 1
    assert 0.4 < answers.index(False) / len(taken) < 0.6


def test_one_stuck_offset_stops_fetching_only_at_the_widest_gap() -> None:
    """A failing key holds back only itself, as long as skipping the rest again is cheap."""
    positions = PartitionPositions(0)
    positions.fetched(0)
    positions.failed(0, Failures(3))
    taken = until_wide(positions, itertools.count(1), ack=True)
    size = len(committed(positions)[1])
    positions.acked(0)

    assert taken[-1] == MAX_GAP - 1
    assert size < 40
    assert not positions.too_wide
    assert committed(positions) == (MAX_GAP, "")


def test_a_new_owner_of_a_wide_partition_fetches_what_is_pending() -> None:
    """It adds nothing, and nothing else would ever close the gap."""
    positions = PartitionPositions(0)
    taken = until_wide(positions, itertools.count())
    positions.acked(taken[-1])
    heir = PartitionPositions(*committed(positions))
    for offset in taken[:-1]:
        assert not heir.too_wide
        assert heir.fetched(offset) == NO_FAILURES

    assert heir.fetched(taken[-1]) is None
    assert heir.next_offset == taken[-1] + 1


def test_released_offsets_are_fetched_again_however_wide_it_is() -> None:
    positions = PartitionPositions(0)
    taken = until_wide(positions, itertools.count())
    for offset in taken:
        positions.released(offset)
    again = [positions.fetched(offset) for offset in taken]

    assert again == [NO_FAILURES] * len(taken)
    assert positions.too_wide


def test_when_it_failed_first_is_kept_to_the_second_where_there_is_room() -> None:
    positions = PartitionPositions(0)
    handed_out(positions, range(5))
    positions.failed(0, Failures(1, 0, 1_700_000_000 * SECOND + 999))
    positions.failed(2, Failures(2, 2))
    positions.failed(3, Failures(3, 1, 1_700_086_400 * SECOND))
    heir = found(PartitionPositions(*committed(positions)), range(5))

    assert heir == {
        0: Failures(1, 0, 1_700_000_000 * SECOND),
        1: NO_FAILURES,
        2: Failures(2, 2),
        3: Failures(3, 1, 1_700_086_400 * SECOND),
        4: NO_FAILURES,
    }


def test_times_are_what_is_left_out_first() -> None:
    """A thousand failing offsets over a year: their counts fit, with the times they would not."""
    positions = PartitionPositions(0)
    handed_out(positions, range(1000))
    for offset in range(1000):
        first_ns = (1_700_000_000 + 31_000 * offset) * SECOND
        positions.failed(offset, Failures(MAX_ATTEMPTS, MAX_CRASHES, first_ns))
    heir = found(PartitionPositions(*committed(positions)), range(1000))

    assert heir == dict.fromkeys(range(1000), Failures(MAX_ATTEMPTS, MAX_CRASHES))


def test_what_was_written_before_there_were_crashes_and_times_is_read() -> None:
    """Three pending and a done one; the third failed five times, in a width of three bits."""
    old = int("1" + "010" + "011" + "1" + "010" + "011" + "011" + "101", 2).to_bytes(3)

    assert found(PartitionPositions(OFFSET, seal(old)), range(OFFSET, OFFSET + 5)) == {
        OFFSET: NO_FAILURES,
        OFFSET + 1: NO_FAILURES,
        OFFSET + 2: Failures(5),
        OFFSET + 4: NO_FAILURES,
    }


# -- metadata of others


def busy() -> tuple[int, str]:
    positions = PartitionPositions(100)
    handed_out(positions, range(100, 140))
    for offset in (101, 102, 105, 120, 139):
        positions.acked(offset)
    positions.failed(110, Failures(2, 1, 1_700_000_000 * SECOND))
    positions.failed(130, Failures(4, 0, 1_700_000_009 * SECOND))
    return committed(positions)


OFFSET, METADATA = busy()
LOG = range(OFFSET, OFFSET + 60)
ALL = dict.fromkeys(LOG, 0)
KNOWN = handed_out(PartitionPositions(OFFSET, METADATA), LOG)


@given(metadata=st.text() | st.text(alphabet="sc1:AB+/=").map("sc1:".__add__))
def test_foreign_metadata_says_nothing(metadata: str) -> None:
    assert handed_out(PartitionPositions(OFFSET, metadata), LOG) == ALL


@given(at=st.integers(0, len(METADATA) - 1), cut=st.integers(0, 3), put=st.text(max_size=3))
def test_damaged_metadata_says_nothing_or_the_same(at: int, cut: int, put: str) -> None:
    """The same: the last character of base64 has bits that nobody reads."""
    damaged = METADATA[:at] + put + METADATA[at + cut :]

    assert handed_out(PartitionPositions(OFFSET, damaged), LOG) in (ALL, KNOWN)


def test_every_cut_of_the_metadata_says_nothing() -> None:
    heirs = [PartitionPositions(OFFSET, METADATA[:end]) for end in range(len(METADATA))]

    assert all(handed_out(heir, LOG) == ALL for heir in heirs)


@given(offset=st.integers(0, (1 << 63) - 1).filter(lambda offset: offset != OFFSET))
def test_metadata_of_another_offset_says_nothing(offset: int) -> None:
    """Someone moved the group and kept the text: the distances in it are from elsewhere."""
    log = range(offset, offset + 60)

    assert handed_out(PartitionPositions(offset, METADATA), log) == dict.fromkeys(log, 0)


def test_a_newer_version_says_nothing() -> None:
    newer = "sc2:" + METADATA.removeprefix("sc1:")

    assert handed_out(PartitionPositions(OFFSET, newer), LOG) == ALL


def seal(payload: bytes) -> str:
    return "sc1:" + base64.b64encode(module._sum(OFFSET, payload) + payload).decode()


def numbers(*values: int) -> bytes:
    bits = "1" + "".join("0" * (value.bit_length() - 1) + f"{value:b}" for value in values)
    return int(bits, 2).to_bytes((len(bits) + 7) // 8)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        numbers(),
        numbers(2, 1),
        numbers(1, 1 << 40, 1),
        numbers(2, 1, 1 << 63, 1),
        numbers(2, 1, 1, 1, 1),
        numbers(1, 3, 2, 1),
        numbers(1, 3, 2, 4, 4, 1),
        numbers(1, 3, 1 << 30, 1, 1),
        numbers(1, 3, 2, 11, 1, 1 << 10),
        numbers(1 << 40, 1, 1),
    ],
)
def test_numbers_that_cannot_be_say_nothing(payload: bytes) -> None:
    """Too few, too many, too large: each whole by its sum, as from a version of us that errs."""
    assert handed_out(PartitionPositions(OFFSET, seal(payload)), LOG) == ALL


def test_the_smallest_numbers_are_read() -> None:
    """One pending, one done: what the ones above are variations of."""
    known = handed_out(PartitionPositions(OFFSET, seal(numbers(2, 1, 1, 1))), LOG)

    assert known == dict.fromkeys((o for o in LOG if o != OFFSET + 1), 0)


@given(payload=st.binary(max_size=200) | st.binary(max_size=40).map(b"\x01".__add__))
def test_nothing_that_is_well_sealed_raises_or_fills_the_memory(payload: bytes) -> None:
    positions = PartitionPositions(OFFSET, seal(payload))

    assert positions.next_offset == OFFSET
    assert len(pickle.dumps(positions)) < 1_000_000
    assert set(handed_out(positions, LOG)) <= set(LOG)


# -- the cost, counted


def lines_run(action: Callable[[], object]) -> int:
    """How many lines of the module *action* runs through."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        nonlocal lines
        if frame.f_code.co_filename != module.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("in_flight", [1, 100, 600])
@pytest.mark.parametrize("stuck", [False, True])
def test_an_event_costs_the_same_whatever_is_in_flight(in_flight: int, stuck: bool) -> None:  # noqa: FBT001
    positions = PartitionPositions(0)
    start = 3 * MAX_GAP + int(stuck)
    handed_out(positions, range(3 * MAX_GAP, start + in_flight))

    def go_on() -> None:
        for offset in range(start, start + 1000):
            assert not positions.too_wide
            positions.fetched(offset + in_flight)
            positions.acked(offset)

    assert lines_run(go_on) // 1000 <= 14


def test_memory_is_that_of_what_is_pending_not_of_the_gap() -> None:
    positions = PartitionPositions(0)
    positions.fetched(0)
    sizes = set()
    for offset in range(1, 200_000):
        positions.fetched(offset)
        positions.failed(offset, Failures(1))
        positions.acked(offset)
        if offset % 1000 == 0:
            sizes.add(len(pickle.dumps(positions)))

    assert max(sizes) < 400
