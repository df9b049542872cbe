"""
What was done to dead letters, decided by the order of the marks: no I/O, no clock.

A mark is a claim on letters, or the end of one: redriven, discarded, or released. Who reads the
marks, from the first on, comes to the same answer as everybody else: a claim counts only if its
letter was open then, or was held by just the claim that it says it takes over. So of two who claim
at the same time one has the letter, and both know which.

What a claim that was taken over did is not known. What it may have published, and from where on in
its targets' logs that would be, stays known as long as the letter is held: `Held.doubts`.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from typing import TYPE_CHECKING

import msgspec

from sidecar.delivery.redrive.letter import Key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Kind(enum.StrEnum):
    REDRIVE = "redrive"
    """A claim, to publish them."""
    DISCARD = "discard"
    """A claim, to give them up."""
    REDRIVEN = "redriven"
    DISCARDED = "discarded"
    RELEASED = "released"
    """Nothing was done to them, for certain: they are open again."""


class State(enum.StrEnum):
    OPEN = "open"
    CLAIMED = "claimed"
    REDRIVEN = "redriven"
    DISCARDED = "discarded"


DONE = frozenset({State.REDRIVEN, State.DISCARDED})


class Target(msgspec.Struct, frozen=True, array_like=True):
    """Where a claim publishes, and how far each log there went when it was made."""

    broker: str
    topic: str
    ends: dict[str, int] | None
    """By `log_key`. None: it could not be seen, or nothing can be seen there."""


class Claimed(msgspec.Struct, frozen=True, array_like=True):
    """One letter of a mark."""

    log: str
    number: int
    target: int = 0
    """Of a redrive: where it goes, in `Mark.targets`."""
    over: str = ""
    """The claim that is taken over; empty: the letter was open."""

    @property
    def key(self) -> Key:
        return Key(self.log, self.number)


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of the marks' log, in JSON."""

    kind: Kind
    claim: str
    time_ns: int
    """By the clock of whoever made it."""
    letters: tuple[Claimed, ...]
    targets: tuple[Target, ...] = ()
    good_seconds: float = 0.0
    """Of a claim: it may be taken over by who has watched it for so long."""


class Doubt(msgspec.Struct, frozen=True):
    """A letter may have been published to *target* by a claim that was made then."""

    target: Target
    time_ns: int


class Held(msgspec.Struct, frozen=True):
    """Who has a letter, and what may have happened to it: doubts, oldest claim first."""

    claim: str
    doubts: tuple[Doubt, ...] = ()
    """Of this claim and of all that it took over."""
    good_seconds: float = 0.0


class Marks:
    """The state of each letter that any mark names; the others are open."""

    def __init__(self) -> None:
        self._held: dict[Key, Held] = {}
        self._done: dict[State, dict[str, Numbers]] = {State.REDRIVEN: {}, State.DISCARDED: {}}

    def apply(self, mark: Mark) -> None:
        """The next mark, in the order of their log. Repeated, it changes nothing."""
        for letter in mark.letters:
            key = letter.key
            held = self._held.get(key)
            if mark.kind in {Kind.REDRIVE, Kind.DISCARD}:
                if self._is_done(key) or (held.claim if held else "") != letter.over:
                    continue
                doubts = held.doubts if held else ()
                if mark.kind is Kind.REDRIVE:
                    doubts = (*doubts, Doubt(mark.targets[letter.target], mark.time_ns))
                self._held[key] = Held(mark.claim, doubts, mark.good_seconds)
            elif held is not None and held.claim == mark.claim:
                del self._held[key]
                if mark.kind is not Kind.RELEASED:
                    numbers = self._done[State(mark.kind.value)].setdefault(key.log, Numbers())
                    numbers.add(key.number)

    def _is_done(self, key: Key) -> bool:
        return any(key.number in of.get(key.log, NONE) for of in self._done.values())

    def state(self, key: Key) -> State:
        if key in self._held:
            return State.CLAIMED
        for state, numbers in self._done.items():
            if key.number in numbers.get(key.log, NONE):
                return state
        return State.OPEN

    def held(self, key: Key) -> Held | None:
        return self._held.get(key)

    def claims(self) -> Mapping[str, float]:
        """Those that hold a letter, and for how long each is good."""
        return {held.claim: held.good_seconds for held in self._held.values()}

    def forget_below(self, log: str, number: int) -> None:
        """The broker has none of these any more: what was done to them matters to nobody."""
        for key in [k for k in self._held if k.log == log and k.number < number]:
            del self._held[key]
        for of in self._done.values():
            if log in of:
                of[log].drop_below(number)


class Numbers:
    """A set of numbers that come in runs: an entry for each run, not for each number."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for number in numbers:
            self.add(number)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._firsts, number) - 1
        return at >= 0 and number <= self._lasts[at]

    def add(self, number: int) -> None:
        if number in self:
            return
        at = bisect_right(self._firsts, number)
        follows = at > 0 and self._lasts[at - 1] == number - 1
        leads = at < len(self._firsts) and self._firsts[at] == number + 1
        if follows and leads:
            self._lasts[at - 1] = self._lasts.pop(at)
            del self._firsts[at]
        elif follows:
            self._lasts[at - 1] = number
        elif leads:
            self._firsts[at] = number
        else:
            self._firsts.insert(at, number)
            self._lasts.insert(at, number)

    def drop_below(self, number: int) -> None:
        gone = bisect_right(self._lasts, number - 1)
        del self._firsts[:gone], self._lasts[:gone]
        if self._firsts and self._firsts[0] < number:
            self._firsts[0] = number

    @property
    def runs(self) -> Sequence[tuple[int, int]]:
        return list(zip(self._firsts, self._lasts, strict=True))


NONE = Numbers()

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Mark).decode
