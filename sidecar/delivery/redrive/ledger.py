"""The marks of one broker: read as they grow, and written so that it is known what they did."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from sidecar.delivery.redrive.claims import Watch
from sidecar.delivery.redrive.letter import log_key
from sidecar.delivery.redrive.marks import DONE, Mark, Marks, decode, encode
from sidecar.errors import BrokerUnavailable, TopicMissing
from sidecar.event import Event, Position, Receipt
from sidecar.wire.attributes import new_id
from sidecar.wire.timestamps import now_ns

if TYPE_CHECKING:
    from collections.abc import Callable

    from sidecar.broker import Broker, Log
    from sidecar.delivery.redrive.letter import Key
    from sidecar.publishing.publisher import Publisher

log = logging.getLogger(__name__)

PAGE = 500
WRITE_SECONDS = 5.0
READ_BACK_SECONDS = 5.0
READ_BACK_PAUSE_SECONDS = 0.02


class Ledger:
    """What was done to the dead letters of one broker, as far as it was read."""

    def __init__(
        self, broker: Broker, publisher: Publisher, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.marks = Marks()
        self.watch = Watch()
        self._broker = broker
        self._topic = broker.marks_topic
        self._publisher = publisher
        self._clock = clock
        self._next: dict[str, int] = {}
        """What is read next, by `log_key`."""
        self._place: dict[int | None, str] = {}
        """The log of a position's partition."""
        self._reading = asyncio.Lock()
        self._is_kept = False

    async def catch_up(self) -> None:
        """Read what is new. Raises BrokerUnavailable, NotSupported, BrokerRefused."""
        async with self._reading:
            for each in await self._broker.logs(self._topic):
                await self._read(each)
            self.watch.seen(self.marks.claims(), self._clock())

    async def _read(self, each: Log) -> None:
        key = log_key(each)
        self._place[each.partition] = key
        at = max(self._next.get(key, 0), each.first)
        while at < each.end:
            page = await self._broker.read(each, at, PAGE)
            if not page:
                return
            for stored in page:
                if stored.event is not None:
                    self._apply(stored.event, stored.number)
            # Never to the log's end: a node that is behind shows less than there is.
            at = self._next[key] = page[-1].number + 1

    def _apply(self, event: Event, number: int) -> None:
        try:
            mark = decode(event.data or b"")
        except msgspec.DecodeError:
            log.warning("broker %s: %s has no mark at %d", self._broker.name, self._topic, number)
        else:
            self.marks.apply(mark)

    def is_free(self, key: Key) -> bool:
        """Whether a letter may be claimed: it is open, or held by a claim that may be taken over."""
        held = self.marks.held(key)
        if held is None:
            return self.marks.state(key) not in DONE
        return self.watch.may_take_over(held.claim, held.good_seconds, self._clock())

    async def add(self, mark: Mark) -> None:
        """
        Store a mark, and read all up to it: then `marks` says what it did. Twice is no harm.

        Raises the SidecarError of the try that failed; the mark may be there all the same.
        """
        try:
            await self._add(mark)
        except TopicMissing as error:
            raise TopicMissing(
                f"{error.message}. It records what was done to dead letters: one partition, and "
                "nothing may expire there before the dead letters do",
                topic=self._topic,
                broker=self._broker.name,
            ) from error

    async def _add(self, mark: Mark) -> None:
        if not self._is_kept:
            await self._broker.keep(self._topic)
            self._is_kept = True
        event = Event(
            id=new_id(),
            source="/sidecar",
            type="sidecar.dead-letter-mark",
            time_ns=now_ns(),
            data=encode(mark),
            key="marks",  # one partition, one order
            content_type="application/json",
        )
        outcomes = await self._publisher.publish_to(
            self._broker.name,
            self._topic,
            [event],
            broker_ids=[f"mark/{event.id}"],
            label=self._topic,
            timeout=WRITE_SECONDS,
            wait=WRITE_SECONDS,
        )
        outcome = outcomes[0]
        if not isinstance(outcome, Receipt):
            raise outcome
        await self._read_to(outcome.position)

    async def _read_to(self, position: Position | None) -> None:
        deadline = self._clock() + READ_BACK_SECONDS
        while True:
            await self.catch_up()
            if position is None or self._has_read(position):
                return
            if self._clock() > deadline:
                raise BrokerUnavailable(
                    f"broker {self._broker.name!r}: a mark was stored in {self._topic} and is not there "
                    f"after {READ_BACK_SECONDS:g} s",
                    broker=self._broker.name,
                )
            await asyncio.sleep(READ_BACK_PAUSE_SECONDS)

    def _has_read(self, position: Position) -> bool:
        number = position.sequence if position.offset is None else position.offset
        return self._next.get(self._place.get(position.partition, ""), 0) > number
