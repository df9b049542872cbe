"""Whether what a journal tells keeps the promises, each event and each key by itself."""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from tests.drills.journal import Crashed, Delivered, Refused, Settled
from tests.drills.stage import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.drills.journal import Entry, Life, Place

EXAMPLES = 5


class State(enum.Enum):
    OUT = "out"
    NACKED = "nacked"
    ACKED = "acked"


class Told:
    """One event, as far as the journal has told of it."""

    __slots__ = ("acked_at", "again", "deliveries", "last", "state")

    def __init__(self) -> None:
        self.deliveries = 0
        self.again = 0
        """Deliveries that a crash, or an app that had not settled, excuses."""
        self.last: Delivered | None = None
        self.state = State.OUT
        self.acked_at = 0.0


class Findings(list[str]):
    """What is against a claim; the first of them are shown."""

    def __str__(self) -> str:
        shown = "".join(f"\n        {text}" for text in self[:EXAMPLES])
        return f"{len(self)}{shown}"


class Judge:
    """
    Walks a journal in its order. What it holds against the claims is in the lists.

    An event comes again, rightly, for two reasons: it was nacked, or its holder crashed. Crashed,
    the holder may also not have told the broker what was settled last. So its attempt number is
    the last one's, or one more where that was nacked. The order is judged as it is seen by
    all: an event is *open* from its first delivery until it is acked, and while it is open nothing
    later of its key is delivered; one life of a sidecar never goes back in a key.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        receipts: Mapping[int, Place],
        *,
        attempts: Callable[[int], int],
    ) -> None:
        """*attempts*: how often an event is delivered when nothing happens."""
        self.out_of_order = Findings()
        self.wrong_attempts = Findings()
        self.too_often = Findings()
        self.acked_again = Findings()
        """After an ack that counted, without a crash of who took it."""
        self.unsettled_again = Findings()
        """Given back while an app had it; not against a claim where a sidecar leaves."""
        self.copies = Findings()
        """Elsewhere at the broker than the receipt says, so there is more than one."""
        self.again_after_crash: Counter[str] = Counter()
        self.oldest_ack_lost = 0.0
        """How long before the crash of its holder an event was acked that came again."""
        self.refused = Counter(e.reason for e in entries if isinstance(e, Refused))
        self._void = {entry.token for entry in entries if isinstance(entry, Refused)}
        self._receipts = receipts
        self._events: defaultdict[int, Told] = defaultdict(Told)
        self._by_token: dict[str, Delivered] = {}
        self._open: defaultdict[int, set[int]] = defaultdict(set)
        """By key."""
        self._newest: dict[int, int] = {}
        """By key, of all that were delivered."""
        self._newest_of: dict[tuple[Life, int], int] = {}
        """By life and key."""
        self._crashes: dict[Life, float] = {}
        for entry in entries:
            self._tell(entry)
        for number, told in self._events.items():
            most = attempts(number) + told.again
            if told.deliveries > most:
                self.too_often.append(f"event {number}: {told.deliveries} deliveries, not {most}")
        self.missing = sorted(receipts.keys() - self._events.keys())
        self.unacked = sorted(
            n for n in receipts if n in self._events and self._events[n].state is not State.ACKED
        )
        self.unknown = len(self._events.keys() - receipts.keys())

    def _tell(self, entry: Entry) -> None:
        if isinstance(entry, Delivered):
            self._delivered(entry)
        elif isinstance(entry, Settled):
            self._settled(entry)
        elif isinstance(entry, Crashed):
            self._crashes[entry.life] = entry.at

    def _settled(self, entry: Settled) -> None:
        delivery = self._by_token[entry.token]
        told = self._events[delivery.event]
        if entry.token in self._void or told.last is not delivery:
            return
        told.state = State.ACKED if entry.acked else State.NACKED
        if entry.acked:
            told.acked_at = entry.at
            self._open[key_of(delivery.event)].discard(delivery.event)

    def _delivered(self, delivery: Delivered) -> None:
        told = self._events[delivery.event]
        self._by_token[delivery.token] = delivery
        self._judge_place(delivery)
        self._judge_order(delivery, told)
        self._judge_attempt(delivery, told)
        if told.last is not None:
            self._judge_again(delivery, told, told.last)
        told.deliveries += 1
        told.last, told.state = delivery, State.OUT
        self._open[key_of(delivery.event)].add(delivery.event)

    def _judge_place(self, delivery: Delivered) -> None:
        receipt = self._receipts.get(delivery.event, delivery.place)
        if receipt != delivery.place:
            self.copies.append(f"{_shown(delivery)}, and the receipt says {_at(receipt)}")

    def _judge_order(self, delivery: Delivered, told: Told) -> None:
        number, key = delivery.event, key_of(delivery.event)
        newest = self._newest.get(key, -1)
        if told.last is None and number < newest:
            self.out_of_order.append(f"{_shown(delivery)}: after {newest} of its key")
        self._newest[key] = max(number, newest)
        newest = self._newest_of.get((delivery.life, key), -1)
        if number < newest:
            self.out_of_order.append(f"{_shown(delivery)}: goes back from {newest} of its key")
        self._newest_of[delivery.life, key] = max(number, newest)
        for other in self._open[key] - {number}:
            last, state = self._events[other].last, self._events[other].state
            assert last is not None
            if other < number or (state is State.OUT and last.life not in self._crashes):
                self.out_of_order.append(f"{_shown(delivery)}: and {state.value} is {_shown(last)}")

    def _judge_attempt(self, delivery: Delivered, told: Told) -> None:
        right = {1}
        if told.last is not None:
            nacked = told.state is State.NACKED
            right = {told.last.attempt + nacked}
            if nacked and told.last.life in self._crashes:
                right.add(told.last.attempt)
        if delivery.attempt not in right:
            last = f"{told.state.value} after {_shown(told.last)}" if told.last else "never seen"
            self.wrong_attempts.append(f"{_shown(delivery)}: was {last}")

    def _judge_again(self, delivery: Delivered, told: Told, last: Delivered) -> None:
        crashed_at = self._crashes.get(last.life)
        if told.state is State.NACKED and delivery.attempt > last.attempt:
            return
        if crashed_at is not None:
            told.again += 1
            self.again_after_crash[told.state.value] += 1
            if told.state is State.ACKED:
                lost = crashed_at - told.acked_at
                self.oldest_ack_lost = max(self.oldest_ack_lost, lost)
        elif told.state is State.ACKED:
            ago = delivery.at - told.acked_at
            self.acked_again.append(f"{_shown(delivery)}: acked {ago:.3f} s before at {last.life}")
        elif told.state is State.OUT:
            told.again += 1
            ago = delivery.at - last.at
            self.unsettled_again.append(
                f"{_shown(delivery)}: {last.life} had it {ago:.3f} s before"
            )


def _shown(delivery: Delivered) -> str:
    return (
        f"{delivery.at:.3f} {delivery.life} event {delivery.event} of key {key_of(delivery.event)}, "
        f"attempt {delivery.attempt}, {_at(delivery.place)}"
    )


def _at(place: Place) -> str:
    return f"at {place[0]}/{place[1]}"
