"""The memory driver: a log in this process, for tests and for trying things out."""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING, ClassVar

from sidecar.broker import (
    NO_FAILURES,
    Broker,
    BrokerState,
    Capabilities,
    Failures,
    Incoming,
    Interest,
    Log,
    Source,
    Start,
    StoredEvent,
)
from sidecar.errors import NotSupported, SourceLost, SubscriptionConflict
from sidecar.event import Durability, Event, Outcome, Position, Receipt, pattern_matcher
from sidecar.wire.timestamps import now_ns

if TYPE_CHECKING:
    import re
    from collections.abc import Hashable, Sequence

    from sidecar.config import Memory as Settings

STREAM = "memory"
PAGE_BYTES = 8 * 1024 * 1024
"""What one answer of `read` holds at most, but for one event."""


class MemoryBroker(Broker):
    """Keeps the newest events, up to a number and a size. What is stored ends with the process."""

    type: ClassVar[str] = "memory"
    capabilities: ClassVar[Capabilities] = Capabilities(
        durability=Durability.STORED,
        positions=True,
        redelivers=True,
        deduplicates=True,
        seeks=True,
        lag=True,
        dead_letters=True,
        deals=True,
        browses=True,
        deletes=True,
    )

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name)
        self._incarnation = str(now_ns())
        self._settings = settings
        self.log = _Log(settings)
        self._groups: dict[str, _Group] = {}

    async def connect(self) -> None:
        self.on_state(BrokerState(connected=True, detail="in this process"))

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        loop = asyncio.get_running_loop()
        outcomes: list[Outcome] = []
        for index, event in enumerate(events):
            identity: Hashable = (
                broker_ids[index] if broker_ids is not None else (event.source, event.id)
            )
            sequence, duplicate = self.log.append(topic, event, identity, loop.time())
            position = Position(STREAM, sequence)
            outcomes.append(
                Receipt(event.id, self.name, topic, Durability.STORED, position, duplicate)
            )
        for group in self._groups.values():
            group.wake()
        future: asyncio.Future[Sequence[Outcome]] = loop.create_future()
        future.set_result(outcomes)
        return future

    async def subscribe(self, interest: Interest) -> Source:
        group = self._groups.get(interest.name)
        if group is None:
            group = self._groups[interest.name] = _Group(self.log, interest)
        elif group.topic != interest.topic:
            raise SubscriptionConflict(
                f"subscription {interest.name!r} is on {group.topic!r} already, not on "
                f"{interest.topic!r}: name it differently",
                subscription=interest.name,
            )
        source = MemorySource(group)
        group.sources.append(source)
        return source

    async def seek(self, interest: Interest, to: Start) -> None:
        if to.position is not None and to.position.stream not in {"", STREAM}:
            raise NotSupported(f"position: the stream of broker {self.name!r} is {STREAM!r}")
        group = self._groups.get(interest.name)
        if group is not None:
            group.end_sources()
        moved = Interest(interest.name, interest.topic, interest.max_in_flight, to)
        self._groups[interest.name] = _Group(self.log, moved)

    async def logs(self, pattern: str) -> Sequence[Log]:
        first, end = self.log.first, self.log.next_sequence
        window = self._settings.duplicate_window_seconds
        log = Log(pattern, None, STREAM, first, end, self._incarnation, duplicate_seconds=window)
        return [log]

    async def read(self, log: Log, start: int, limit: int) -> Sequence[StoredEvent]:
        return self.log.read(log, start, limit)

    async def delete(self, log: Log, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.log.delete(number)

    async def close(self) -> None:
        for group in self._groups.values():
            group.end_sources()
        self.on_state(BrokerState(connected=False, detail="closed"))


class _Log:
    """Events by sequence, oldest dropped first."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Ordered: a plain dict searches for its first key past all that were removed before it.
        self.events: OrderedDict[int, tuple[str, Event, int]] = OrderedDict()
        self.next_sequence = 1
        self._bytes = 0
        self._remembered: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()

    def append(self, topic: str, event: Event, identity: Hashable, now: float) -> tuple[int, bool]:
        """The event's sequence, and whether it was there before."""
        window = self._settings.duplicate_window_seconds
        while self._remembered:
            oldest = next(iter(self._remembered))
            if self._remembered[oldest][1] + window >= now:
                break
            del self._remembered[oldest]
        known = self._remembered.get(identity)
        if known is not None:
            return known[0], True
        sequence = self.next_sequence
        self.next_sequence += 1
        self.events[sequence] = (topic, event, now_ns())
        self._remembered[identity] = (sequence, now)
        self._bytes += event.size
        while len(self.events) > self._settings.max_events or (
            self._bytes > self._settings.max_bytes and len(self.events) > 1
        ):
            _, (_, dropped, _) = self.events.popitem(last=False)
            self._bytes -= dropped.size
        return sequence, False

    @property
    def first(self) -> int:
        return next(iter(self.events), self.next_sequence)

    def read(self, log: Log, start: int, limit: int) -> list[StoredEvent]:
        matches = pattern_matcher(log.topic)
        page: list[StoredEvent] = []
        size = 0
        for sequence in range(max(start, self.first), min(log.end, self.next_sequence)):
            entry = self.events.get(sequence)
            if entry is None or not _matches(matches, entry[0]):
                continue
            size += entry[1].size
            if len(page) == limit or (page and size > PAGE_BYTES):
                break
            page.append(StoredEvent(entry[0], sequence, entry[2], entry[1]))
        return page

    def delete(self, sequence: int) -> None:
        entry = self.events.pop(sequence, None)
        if entry is not None:
            self._bytes -= entry[1].size


class _Group:
    """One subscription: where it is, what is out, what comes again."""

    def __init__(self, log: _Log, interest: Interest) -> None:
        self.topic = interest.topic
        self._matches = pattern_matcher(interest.topic)
        self._log = log
        self._max_bytes = interest.max_in_flight_bytes
        self._cursor = _first_sequence(log, interest.start)
        self._again: list[int] = []
        self._failures: dict[Hashable, Failures] = {}
        self.sources: list[MemorySource] = []

    def take(self, limit: int) -> list[Incoming]:
        """Up to *limit*, and no more bytes than the subscription holds, but for one event."""
        taken: list[Incoming] = []
        room = self._max_bytes
        while len(taken) < limit and (sequence := self._next()) is not None:
            room -= self._log.events[sequence][1].size
            if room < 0 and taken:
                heapq.heappush(self._again, sequence)
                break
            taken.append(self._incoming(sequence))
        return taken

    def _next(self) -> int | None:
        while self._again:
            sequence = heapq.heappop(self._again)
            if sequence in self._log.events:
                return sequence
        while self._cursor < self._log.next_sequence:
            sequence = self._cursor
            self._cursor += 1
            entry = self._log.events.get(sequence)
            if entry is not None and self._matches.fullmatch(entry[0]):
                return sequence
        return None

    def _incoming(self, sequence: int) -> Incoming:
        topic, event, _ = self._log.events[sequence]
        return Incoming(
            topic=topic,
            handle=sequence,
            identity=sequence,
            event=event,
            position=Position(STREAM, sequence),
            failures=self._failures.get(sequence, NO_FAILURES),
        )

    def done(self, sequence: Hashable) -> None:
        self._failures.pop(sequence, None)

    def failed(self, sequence: Hashable, failures: Failures) -> None:
        self._failures[sequence] = failures

    def give_back(self, sequences: Sequence[Hashable]) -> None:
        for sequence in sequences:
            assert isinstance(sequence, int)
            heapq.heappush(self._again, sequence)
        if sequences:
            self.wake()

    def wake(self) -> None:
        for source in self.sources:
            source.arrived.set()

    def end_sources(self) -> None:
        for source in self.sources:
            source.end()
        self.sources.clear()

    def lag(self) -> int:
        waiting = len(self._again)
        for sequence in range(self._cursor, self._log.next_sequence):
            entry = self._log.events.get(sequence)
            waiting += entry is not None and _matches(self._matches, entry[0])
        return waiting


def _matches(pattern: re.Pattern[str], topic: str) -> bool:
    return pattern.fullmatch(topic) is not None


def _first_sequence(log: _Log, start: Start) -> int:
    if start.position is not None:
        return start.position.sequence
    if start.latest:
        return log.next_sequence
    if start.time_ns is None:
        return log.first
    for sequence, (_, _, stored_ns) in log.events.items():
        if stored_ns >= start.time_ns:
            return sequence
    return log.next_sequence


class MemorySource(Source):
    def __init__(self, group: _Group) -> None:
        self._group = group
        self.arrived = asyncio.Event()
        self._out: set[Hashable] = set()
        self._ended = False

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        while True:
            if self._ended:
                raise SourceLost("the subscription was moved, or its broker closed")
            self.arrived.clear()
            taken = self._group.take(limit)
            if taken:
                self._out.update(incoming.handle for incoming in taken)
                return taken
            await self.arrived.wait()

    def ack(self, handles: Sequence[Hashable]) -> None:
        for handle in handles:
            if handle in self._out:
                self._out.discard(handle)
                self._group.done(handle)

    def failed(self, handle: Hashable, failures: Failures) -> None:
        if handle in self._out:
            self._group.failed(handle, failures)

    def release(self, handles: Sequence[Hashable]) -> None:
        back = [handle for handle in handles if handle in self._out]
        self._out.difference_update(back)
        self._group.give_back(back)

    def hold(self, handles: Sequence[Hashable]) -> None:
        """Nobody takes them from us."""

    async def lag(self) -> int | None:
        return self._group.lag()

    def end(self) -> None:
        """Moved or closed: what was out is void."""
        self._ended = True
        self._out.clear()
        self.arrived.set()

    async def close(self) -> None:
        out, self._out = self._out, set()
        if self in self._group.sources:
            self._group.sources.remove(self)
        if not self._ended:
            self._group.give_back(list(out))
        self._ended = True
        self.arrived.set()
