"""Who receives deliveries: a stream with credit, or one waiting pull."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.event import Event, Position


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One attempt to hand one event to the app."""

    token: str
    event: Event
    topic: str
    attempt: int
    position: Position | None


class Consumer(Protocol):
    """What a subscription hands deliveries to. Owned by a door; credit is changed by both."""

    credit: int
    max_batch: int

    @property
    def takes_more(self) -> bool:
        """What it got before is on its way to the app. Leases run from hand-over, so it must be."""

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Take a batch, at most `credit` and `max_batch`. Does not block or raise."""

    def closed(self, why: Exception) -> None:
        """No more deliveries will come: the subscription ended."""


class PullConsumer:
    """One Pull call: takes the first batch that comes."""

    def __init__(self, max_events: int) -> None:
        self.credit = max_events
        self.max_batch = max_events
        self.taken: Sequence[Delivery] = ()
        self.over = asyncio.Event()
        """Something was taken, or it was closed."""
        self.why: Exception | None = None

    @property
    def takes_more(self) -> bool:
        return True

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        self.credit = 0
        self.taken = deliveries
        self.over.set()

    def closed(self, why: Exception) -> None:
        if not self.over.is_set():
            self.credit = 0
            self.why = why
            self.over.set()
