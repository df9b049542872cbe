"""Whatever the order of what sidecars do, and wherever they die, a letter is redriven once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sidecar.delivery.redrive.claims import (
    ROOM_SECONDS,
    USE_SECONDS,
    Watch,
    good_for,
    may_use,
)
from sidecar.delivery.redrive.letter import Key
from sidecar.delivery.redrive.marks import (
    Claimed,
    Kind,
    Mark,
    Marks,
    Numbers,
    State,
    Target,
    decode,
    encode,
)

if TYPE_CHECKING:
    from sidecar.delivery.redrive.marks import Held

LOG = "dlq~1"
PUBLISH_SECONDS = 5.0
GOOD_SECONDS = good_for(PUBLISH_SECONDS)
LETTERS = 3
TARGET = Target("events", "orders", {"orders~1": 7})


def mark(kind: Kind, claim: str, *numbers: int, over: str = "") -> Mark:
    targets = (TARGET,) if kind is Kind.REDRIVE else ()
    return Mark(kind, claim, 1, tuple(Claimed(LOG, n, 0, over) for n in numbers), targets)


def after(*marks: Mark) -> Marks:
    found = Marks()
    for one in marks:
        found.apply(one)
    return found


def state(marks: Marks, number: int) -> State:
    return marks.state(Key(LOG, number))


# -- the rules, one by one


def test_of_two_claims_at_the_same_time_the_first_has_it() -> None:
    marks = after(mark(Kind.REDRIVE, "a", 1, 2), mark(Kind.REDRIVE, "b", 2, 3))
    held = [marks.held(Key(LOG, n)) for n in (1, 2, 3)]

    assert [one and one.claim for one in held] == ["a", "a", "b"]


def test_only_who_has_it_ends_it() -> None:
    marks = after(mark(Kind.REDRIVE, "a", 1), mark(Kind.REDRIVEN, "b", 1))

    assert state(marks, 1) is State.CLAIMED


@pytest.mark.parametrize("end", [Kind.REDRIVEN, Kind.DISCARDED])
def test_what_is_done_stays_so(end: Kind) -> None:
    """Whatever comes late: claims, ends and releases of whoever."""
    late = [mark(kind, claim, 1) for kind in Kind for claim in ("a", "b")]
    marks = after(mark(Kind.REDRIVE, "a", 1), mark(end, "a", 1), *late)

    assert state(marks, 1) is State(end.value)


def test_what_is_released_is_open_and_there_is_no_doubt_about_it() -> None:
    marks = after(
        mark(Kind.REDRIVE, "a", 1), mark(Kind.RELEASED, "a", 1), mark(Kind.REDRIVE, "b", 1)
    )
    held = marks.held(Key(LOG, 1))

    assert held is not None
    assert held.claim == "b"
    assert len(held.doubts) == 1


def test_a_claim_is_taken_over_by_one_and_its_doubts_stay() -> None:
    """The second who takes it over comes too late; a discard publishes nothing, so adds no doubt."""
    marks = after(
        mark(Kind.REDRIVE, "a", 1),
        mark(Kind.REDRIVE, "b", 1, over="a"),
        mark(Kind.REDRIVE, "c", 1, over="a"),
        mark(Kind.DISCARD, "d", 1, over="b"),
    )
    held = marks.held(Key(LOG, 1))

    assert held is not None
    assert held.claim == "d"
    assert [doubt.target for doubt in held.doubts] == [TARGET, TARGET]


def test_letters_that_are_gone_are_forgotten() -> None:
    marks = after(
        mark(Kind.REDRIVE, "a", *range(1, 7)),
        mark(Kind.REDRIVEN, "a", 1, 2, 3),
        mark(Kind.DISCARD, "b", 9),
    )
    marks.forget_below(LOG, 5)

    assert [state(marks, n) for n in (2, 4)] == [State.OPEN, State.OPEN]
    assert [state(marks, n) for n in (5, 9)] == [State.CLAIMED, State.CLAIMED]


def test_a_mark_is_json_and_back() -> None:
    one = mark(Kind.REDRIVE, "a", 1, 2, over="b")

    assert decode(encode(one)) == one


@given(st.lists(st.integers(0, 30)), st.integers(0, 31))
def test_numbers_are_a_set(numbers: list[int], floor: int) -> None:
    """With as few runs as there can be."""
    found = Numbers(numbers)
    found.drop_below(floor)
    expected = {n for n in numbers if n >= floor}

    assert {n for n in range(32) if n in found} == expected
    assert len(found.runs) == sum(n - 1 not in expected for n in expected)


def test_a_claim_is_over_before_it_is_taken_over() -> None:
    assert USE_SECONDS + ROOM_SECONDS + PUBLISH_SECONDS < GOOD_SECONDS


# -- the whole of it


class Publishing(NamedTuple):
    """A letter on its way to the target, since when, and who waits for the answer."""

    number: int
    began: float
    owner: Sidecar


class Sidecar:
    """One that redrives, with what it knows: the marks that it has read, and what it watches."""

    def __init__(self) -> None:
        self.marks = Marks()
        self.read = 0
        self.watch = Watch()
        self.claim = ""
        self.made = 0.0
        self.knows_what_it_has = False
        self.settled: dict[int, Kind] = {}
        self.to_publish: list[int] = []
        self.publishing: Publishing | None = None


class Redriving(RuleBasedStateMachine):
    """Two sidecars, one log of marks, a target; every step of either may come at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Mark] = []
        self.target: list[int] = []
        self.now = 0.0
        self.claims = 0
        self.sidecars = [Sidecar(), Sidecar()]
        self.under_way: list[Publishing] = []

    def _catch_up(self, one: Sidecar) -> None:
        for each in self.log[one.read :]:
            one.marks.apply(each)
        one.read = len(self.log)
        one.watch.seen(one.marks.claims(), self.now)

    def _held(self, one: Sidecar, number: int) -> Held | None:
        return one.marks.held(Key(LOG, number))

    @rule(who=st.integers(0, 1), seconds=st.sampled_from([4.0, 7.5, 17.0]))
    def time_passes(self, who: int, seconds: float) -> None:
        """A publish that began is answered, or sent no more, by the end of its time."""
        self.now += seconds
        for each in [p for p in self.under_way if self.now - p.began > PUBLISH_SECONDS]:
            self._over(each)
        self._catch_up(self.sidecars[who])

    def _over(self, publishing: Publishing) -> None:
        self.under_way.remove(publishing)
        publishing.owner.publishing = None

    @rule(who=st.integers(0, 1))
    def reads(self, who: int) -> None:
        self._catch_up(self.sidecars[who])

    @rule(who=st.integers(0, 1), numbers=st.sets(st.integers(1, LETTERS), min_size=1))
    def claims_letters(self, who: int, numbers: set[int]) -> None:
        """By what it knows, which may be old: the log decides."""
        one = self.sidecars[who]
        if one.claim:
            return
        wanted = []
        for number in sorted(numbers):
            held = self._held(one, number)
            if held is None and one.marks.state(Key(LOG, number)) is State.OPEN:
                wanted.append(Claimed(LOG, number))
            elif held is not None and one.watch.may_take_over(
                held.claim, held.good_seconds, self.now
            ):
                wanted.append(Claimed(LOG, number, 0, held.claim))
        if not wanted:
            return
        self.claims += 1
        one.claim, one.made = f"claim {self.claims}", self.now
        one.knows_what_it_has = False
        ends = Target("events", "orders", {"orders~1": len(self.target)})
        self.log.append(Mark(Kind.REDRIVE, one.claim, 1, tuple(wanted), (ends,), GOOD_SECONDS))

    @rule(who=st.integers(0, 1), numbers=st.sets(st.integers(1, LETTERS), min_size=1))
    def redrives_without_a_pause(self, who: int, numbers: set[int]) -> None:
        """The same steps one after the other: most often nothing comes in between."""
        one = self.sidecars[who]
        self._catch_up(one)
        self.claims_letters(who, numbers)
        self.learns_what_it_has(who)
        while one.to_publish and one.publishing is None and may_use(one.made, self.now):
            number = one.to_publish.pop(0)
            self.target.append(number)
            one.settled[number] = Kind.REDRIVEN

    @precondition(lambda self: any(one.claim for one in self.sidecars))
    @rule(who=st.integers(0, 1))
    def learns_what_it_has(self, who: int) -> None:
        """After its claim is in the log; of what it took over it looks whether it was published."""
        one = self.sidecars[who]
        if not one.claim or one.knows_what_it_has:
            return
        self._catch_up(one)
        one.knows_what_it_has = True
        for number in range(1, LETTERS + 1):
            held = self._held(one, number)
            if held is None or held.claim != one.claim:
                continue
            *before, _ = held.doubts
            since = min(
                (end for doubt in before for end in (doubt.target.ends or {}).values()),
                default=None,
            )
            if since is not None and number in self.target[since:]:
                one.settled[number] = Kind.REDRIVEN
            else:
                one.to_publish.append(number)

    @rule(who=st.integers(0, 1))
    def begins_to_publish(self, who: int) -> None:
        one = self.sidecars[who]
        if one.to_publish and one.publishing is None:
            number = one.to_publish.pop(0)
            if may_use(one.made, self.now):
                one.publishing = Publishing(number, self.now, one)
                self.under_way.append(one.publishing)
            else:
                one.settled[number] = Kind.RELEASED

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), answered=st.booleans())
    def publishes(self, data: st.DataObject, *, answered: bool) -> None:
        """It arrives, also when its owner has died, and perhaps nobody is told: it stays claimed."""
        one = data.draw(st.sampled_from(self.under_way))
        self._over(one)
        self.target.append(one.number)
        if answered:
            one.owner.settled[one.number] = Kind.REDRIVEN

    @rule(who=st.integers(0, 1))
    def ends_its_claim(self, who: int) -> None:
        one = self.sidecars[who]
        if one.knows_what_it_has and not one.to_publish and one.publishing is None:
            for number, kind in one.settled.items():
                self.log.append(Mark(kind, one.claim, 1, (Claimed(LOG, number),)))
            one.claim, one.settled = "", {}

    @rule(who=st.integers(0, 1))
    def dies(self, who: int) -> None:
        """What is on its way to the target may still arrive, or not."""
        self.sidecars[who] = Sidecar()

    @invariant()
    def no_letter_is_published_twice(self) -> None:
        assert len(self.target) == len(set(self.target))

    @invariant()
    def what_is_done_was_published(self) -> None:
        marks = after(*self.log)
        for number in range(1, LETTERS + 1):
            if state(marks, number) is State.REDRIVEN:
                assert number in self.target

    def teardown(self) -> None:
        """Whatever happened: one who comes after all that redrives all that is left."""
        self.under_way.clear()
        self.dies(0)
        self.reads(0)
        self.now += GOOD_SECONDS
        self.claims_letters(0, set(range(1, LETTERS + 1)))
        self.learns_what_it_has(0)
        one = self.sidecars[0]
        self.target += one.to_publish
        one.settled |= dict.fromkeys(one.to_publish, Kind.REDRIVEN)
        one.to_publish.clear()
        self.ends_its_claim(0)
        marks = after(*self.log)

        assert sorted(self.target) == list(range(1, LETTERS + 1))
        assert {state(marks, n) for n in range(1, LETTERS + 1)} == {State.REDRIVEN}


TestRedriving = Redriving.TestCase
TestRedriving.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
