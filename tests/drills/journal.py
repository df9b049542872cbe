"""What the apps of a drill saw and said, in the order of one clock."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sidecar.v1 import event_pb2 as ev

Place = tuple[int, int]
"""Where an event is at the broker: partition and offset, or 0 and the stream's sequence."""


class Life(NamedTuple):
    """One run of a sidecar's process; a restart is another life."""

    sidecar: str
    number: int

    def __str__(self) -> str:
        return f"{self.sidecar}{self.number}"


class Delivered(NamedTuple):
    at: float
    life: Life
    event: int
    attempt: int
    place: Place
    token: str


class Settled(NamedTuple):
    """Said before it is sent, so that whatever follows from it comes later."""

    at: float
    token: str
    acked: bool


class Refused(NamedTuple):
    """A settlement that did not count, or could not be sent."""

    token: str
    reason: str


class Crashed(NamedTuple):
    at: float
    life: Life


Entry = Delivered | Settled | Refused | Crashed


class Journal:
    """All that happened, as it happened; and what the drill looks at while it runs."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.acked: set[int] = set()
        self.by_sidecar: Counter[str] = Counter()
        self.last_delivery = 0.0

    def delivered(self, delivery: Delivered) -> None:
        self.entries.append(delivery)
        self.by_sidecar[delivery.life.sidecar] += 1
        self.last_delivery = delivery.at

    def settled(self, delivery: Delivered, *, acked: bool) -> None:
        self.entries.append(Settled(delivery.at, delivery.token, acked))
        if acked:
            self.acked.add(delivery.event)

    def refused(self, token: str, reason: str) -> None:
        self.entries.append(Refused(token, reason))

    def crashed(self, at: float, life: Life) -> None:
        self.entries.append(Crashed(at, life))


def place_of(position: ev.Position) -> Place:
    if position.HasField("partition"):
        return position.partition, position.offset
    return 0, position.sequence
