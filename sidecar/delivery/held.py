"""One event in the window, and what is remembered of it when it went back to its broker."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from sidecar.broker import NO_FAILURES, Failures

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from sidecar.broker import Incoming

EVENT_BYTES = 500
"""What an event takes beside its data, about: attributes, headers, and what we know of it."""


class State(enum.Enum):
    WAITING = "waiting"  # behind another of its lane
    READY = "ready"
    OUT = "out"  # handed over; its lease runs
    RETRY = "retry"  # failed; waits for its time
    LEAVING = "leaving"  # on its way to the dead letters


class Past(NamedTuple):
    """What is remembered of an event that went back to the broker, for when it comes here again."""

    failures: Failures
    retry_at: float
    """Loop time; 0: it did not wait for one."""


NOTHING = Past(NO_FAILURES, 0.0)


class Held:
    """One event in the window. Changed by Window only."""

    __slots__ = (
        "attempt",
        "consumer",
        "crashes",
        "due",
        "expires",
        "failing",
        "first_failed",
        "incoming",
        "lane",
        "number",
        "postponed",
        "size",
        "state",
        "timer",
        "token",
        "unrecorded",
    )

    def __init__(self, incoming: Incoming, lane: str, failures: Failures) -> None:
        self.incoming = incoming
        self.lane = lane
        """Which lane it is in; "" for one of its own."""
        self.attempt = failures.attempts
        """Deliveries that count so far; while out, the number of this one."""
        self.crashes = failures.crashes
        """How often the app crashed with it in its hands."""
        self.postponed = 0
        """How often in a row it was tried again without being counted."""
        self.number = 0
        """How many came before it."""
        event = incoming.event
        data = incoming.raw if event is None else event.data
        self.size = EVENT_BYTES + (len(data) if data else 0)
        self.state = State.WAITING
        self.token = ""
        self.due = 0.0
        """Loop time at which its timer ends: the lease, or the wait for the next try."""
        self.timer = 0
        """Number of the timer that runs for it, 0 for none."""
        self.failing = False
        """It has failed here, so its lane is counted apart."""
        self.consumer: object = None
        self.expires = 0
        """Not handed over at or after this, ns since 1970; 0: at any time."""
        self.first_failed = failures.first_ns
        """ns since 1970; 0: never failed."""
        self.unrecorded = False
        """The broker does not know of its last failure yet, and it waits for that."""


def most(one: Failures, other: Failures) -> Failures:
    """What two tell of the same event: the more is what happened."""
    if one in (NO_FAILURES, other):
        return other
    if other == NO_FAILURES:
        return one
    times = [time for time in (one.first_ns, other.first_ns) if time]
    return Failures(
        max(one.attempts, other.attempts), max(one.crashes, other.crashes), min(times, default=0)
    )


def handles(held: Iterable[Held]) -> list[Hashable]:
    return [one.incoming.handle for one in held]
