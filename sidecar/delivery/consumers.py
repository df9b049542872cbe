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

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Take a batch, at most `credit` and `max_batch`. Does not block or raise."""

    def closed(self, why: Exception) -> None:
        """No more deliveries will come: the subscription ended."""


class PullConsumer:
    """One Pull call: takes the first batch that comes."""

    def __init__(self, max_events: int) -> None:
        self.credit = max_events
        self.max_batch = max_events
        self.answer: asyncio.Future[Sequence[Delivery]] = asyncio.get_running_loop().create_future()

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        self.credit = 0
        if not self.answer.done():
            self.answer.set_result(deliveries)

    def closed(self, why: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(why)
