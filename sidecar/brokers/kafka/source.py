"""The feed of a Kafka subscription: hands out what its group member fetched, and decides commits."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, TopicPartition

from sidecar.broker import Failures, Incoming, Interest, Source
from sidecar.brokers.kafka.client import is_missing, translate
from sidecar.errors import BrokerUnavailable, InvalidEvent, SidecarError, SourceLost
from sidecar.event import Position, has_wildcard
from sidecar.wire import kafka as binding
from sidecar.wire.cloudevents import Defaults

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence

    from confluent_kafka import Message

    from sidecar.brokers.kafka.member import Assigned, Member, Place
    from sidecar.event import Event

log = logging.getLogger(__name__)

COMMIT_SECONDS = 0.25
"""Acks are committed this often, failures at once."""
RETRY_SECONDS = 0.1
"""Before a commit that failed is tried again."""
UNANSWERED_SECONDS = 15.0
"""After so long a commit counts as failed."""
PATIENCE_SECONDS = 5.0
"""A rebalance refuses commits for a moment, and that is no news."""
REST_SECONDS = 5.0
CLOSE_SECONDS = 1.8
AWAY_SECONDS = 5.0


class Handle:
    """One event that was handed out: where it is, and the record, for when it is given back."""

    __slots__ = ("message", "offset", "partition")

    def __init__(self, partition: Assigned, message: Message, offset: int) -> None:
        self.partition = partition
        self.message = message
        self.offset = offset


class KafkaSource(Source):
    """
    The loop's side of a group member: what is handed out next, and what is committed when.

    At most one commit is under way. What is acked meanwhile goes with the next one.
    """

    def __init__(
        self,
        broker: str,
        interest: Interest,
        *,
        connected: Callable[[], bool],
        lag: Callable[[Mapping[Place, tuple[int, int]]], Awaitable[Mapping[Place, int]]],
        use_classic: Callable[[], bool],
    ) -> None:
        """*use_classic*: asked whether the old group protocol is to be used from now on."""
        self._broker = broker
        self._interest = interest
        self._max_bytes = interest.max_in_flight_bytes
        self._room = 0
        """Bytes that the fetch that is under way may still return."""
        self._connected = connected
        self._look_up_lag = lag
        self._use_classic = use_classic
        self._loop = asyncio.get_running_loop()
        self._member: Member | None = None
        self._assigned: dict[Place, Assigned] = {}
        self._again: list[Assigned] = []
        """Those with something given back."""
        self._arrived = asyncio.Event()
        self._lost: SidecarError | None = None
        self._ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._committing: asyncio.TimerHandle | None = None
        """The watch over the commit that is under way."""
        self._late = 0
        """Commits that were given up, and whose answers may still come."""
        self._uncommitted_since = 0.0
        self._uncommitted_told = False
        self._sent: list[TopicPartition] = []
        """What it commits."""
        self._recorded: list[asyncio.Future[None]] = []
        """Failures that are to be committed."""
        self._recording: list[asyncio.Future[None]] = []
        """Those of the commit that is under way."""

    @property
    def name(self) -> str:
        """Of its subscription, and so of its group."""
        return self._interest.name

    @property
    def member(self) -> Member | None:
        """None before it has one."""
        return self._member

    @property
    def is_over(self) -> bool:
        """It has left the group."""
        return self._ended.is_set()

    def feed_from(self, member: Member) -> None:
        """It joins with the first fetch: a sidecar whose app is away takes no partitions."""
        self._member = member

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function on the loop: for the member's thread."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("the loop is closed")

    # -- receiving

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        if self._member is not None:
            self._member.start()
        while True:
            if self._lost is not None:
                raise self._lost
            taken = self._take(limit)
            if taken:
                return taken
            self._arrived.clear()
            await self._arrived.wait()

    def _take(self, limit: int) -> list[Incoming]:
        taken: list[Incoming] = []
        self._room = self._max_bytes
        if self._again:
            self._take_again(taken, limit)
        assigned = self._assigned
        for partition in list(assigned.values()):
            if len(taken) >= limit:
                break
            if partition.buffer:
                self._take_from(partition, taken, limit)
        # The next one begins with another partition, so that none starves.
        if len(assigned) > 1:
            first = next(iter(assigned))
            assigned[first] = assigned.pop(first)
        return taken

    def _take_again(self, taken: list[Incoming], limit: int) -> None:
        for partition in self._again:
            while partition.again and len(taken) < limit and not partition.leaving:
                if self._room <= 0:
                    break
                message = partition.again.popleft()
                self._room -= len(message)
                offset = message.offset()
                failures = partition.positions.fetched(offset)
                if failures is not None:
                    taken.append(self._incoming(partition, message, offset, failures))
        self._again = [partition for partition in self._again if partition.again]

    def _take_from(self, partition: Assigned, taken: list[Incoming], limit: int) -> None:
        buffer, positions = partition.buffer, partition.positions
        while buffer and len(taken) < limit and self._room > 0 and not partition.leaving:
            if positions.too_wide:
                self._set_paused(partition, paused=True)
                return
            message = buffer.popleft()
            size = len(message)
            partition.bytes_out += size
            self._room -= size
            offset = message.offset()
            failures = positions.fetched(offset)
            if failures is not None:
                taken.append(self._incoming(partition, message, offset, failures))

    def _set_paused(self, partition: Assigned, *, paused: bool) -> None:
        if partition.paused is not paused and self._member is not None:
            partition.paused = paused
            self._member.pause(partition.place, paused=paused)

    def _incoming(
        self, partition: Assigned, message: Message, offset: int, failures: Failures
    ) -> Incoming:
        topic, number = partition.place
        event, problem = event_of(topic, number, message)
        return Incoming(
            topic,
            Handle(partition, message, offset),
            (topic, number, offset, partition.log),
            event,
            Position(partition=number, offset=offset),
            failures,
            problem,
            b"" if event is not None else message.value() or b"",
        )

    # -- settling

    def ack(self, handles: Sequence[Hashable]) -> None:
        for handle in handles:
            assert type(handle) is Handle
            partition = handle.partition
            if partition.gone:
                continue
            positions = partition.positions
            positions.acked(handle.offset)
            if partition.paused and not positions.too_wide:
                self._set_paused(partition, paused=False)
                self._arrived.set()
        self._commit_in(COMMIT_SECONDS)

    def failed(self, handle: Hashable, failures: Failures) -> asyncio.Future[None] | None:
        assert type(handle) is Handle
        if handle.partition.gone:
            return None
        handle.partition.positions.failed(handle.offset, failures)
        recorded: asyncio.Future[None] = self._loop.create_future()
        self._recorded.append(recorded)
        self._commit_in(0.0)
        return recorded

    def release(self, handles: Sequence[Hashable]) -> None:
        """Handed out again by us: as long as the partition is ours nobody else can."""
        touched: dict[Place, Assigned] = {}
        for handle in handles:
            assert type(handle) is Handle
            partition = handle.partition
            if not partition.gone:
                partition.positions.released(handle.offset)
                partition.again.append(handle.message)
                touched[partition.place] = partition
        for partition in touched.values():
            partition.again = deque(sorted(partition.again, key=_offset))
            if partition not in self._again:
                self._again.append(partition)
        if touched:
            self._arrived.set()

    @property
    def rest_seconds(self) -> float:
        """To leave a group and join it again costs all its members a rebalance."""
        return REST_SECONDS

    def hold(self, handles: Sequence[Hashable]) -> None:
        """A partition is ours as long as we are in the group."""

    async def lag(self) -> int | None:
        return sum((await self.lag_by_partition()).values())

    async def due(self) -> int | None:
        """Of the partitions that are ours, and that are not held up by what is not acked."""
        lag = await self.lag_by_partition()
        ours = {
            place
            for place, one in self._assigned.items()
            if not (one.leaving or one.paused or one.positions.too_wide)
        }
        return sum(events for place, events in lag.items() if place in ours)

    async def lag_by_partition(self) -> Mapping[tuple[str, int], int]:
        if not self._connected():
            raise BrokerUnavailable(
                f"broker {self._broker!r} is away, so the lag is not known", broker=self._broker
            )
        here = {
            place: (one.positions.end, one.positions.waiting)
            for place, one in self._assigned.items()
        }
        try:
            async with asyncio.timeout(AWAY_SECONDS):
                return await self._look_up_lag(here)
        except TimeoutError as error:
            raise BrokerUnavailable(
                f"broker {self._broker!r} does not say how far it is", broker=self._broker
            ) from error

    # -- committing

    def _commit_in(self, seconds: float) -> None:
        due = self._loop.time() + seconds
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(seconds, self._commit)

    def _commit(self) -> None:
        self._timer = None
        if self._committing is not None or self._lost is not None or self._member is None:
            return  # the answer of the one that is under way comes back here
        offsets = self._due(self._assigned.values())
        if not offsets:
            _tell(self._recorded)
            return
        self._member.commit(offsets)
        self._recording, self._recorded = self._recorded, []
        self._sent = offsets
        self._committing = self._loop.call_later(UNANSWERED_SECONDS, self._give_up_commit)

    def _give_up_commit(self) -> None:
        self._late += 1
        self._answered(KafkaError(KafkaError._TIMED_OUT), ())

    def _due(self, partitions: Iterable[Assigned]) -> list[TopicPartition]:
        """What to commit now, of partitions that are ours."""
        offsets = []
        for partition in partitions:
            due = None if partition.gone else partition.positions.commit()
            if due is not None:
                offsets.append(TopicPartition(*partition.place, *due))
        return offsets

    def on_committed(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        # Answers come in the order of the commits, and do not tell which they are for.
        if self._late:
            self._late -= 1
        else:
            self._answered(error, partitions)

    def on_not_committed(self, error: KafkaError | None) -> None:
        self._answered(error, ())

    def _answered(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        if self._committing is None:
            return
        self._committing.cancel()
        self._committing = None
        failed = {(p.topic, p.partition) for p in partitions if p.error is not None}
        all_of_it = error is None and bool(partitions) and not failed
        for sent in self._sent if error is None and partitions else ():
            place = (sent.topic, sent.partition)
            if place not in failed and place in self._assigned:
                # The answer does not repeat the metadata.
                self._assigned[place].positions.confirm(sent.offset, sent.metadata or "")
        recording, self._recording = self._recording, []
        self._tell_commits(error or next((p.error for p in partitions if p.error), None))
        if all_of_it:
            _tell(recording)
            if self._recorded:
                self._commit_in(0.0)
            elif any(one.positions.commit() for one in self._assigned.values()):
                self._commit_in(COMMIT_SECONDS)
        else:
            # A rebalance, or the coordinator moved: it goes with what is ours then.
            self._recorded = recording + self._recorded
            self._commit_in(RETRY_SECONDS)

    def _tell_commits(self, error: KafkaError | None) -> None:
        """Log when committing begins to fail for long, and when it works again."""
        now = self._loop.time()
        if error is None:
            if self._uncommitted_told:
                log.info("subscription %s: commits work again", self._interest.name)
            self._uncommitted_since, self._uncommitted_told = 0.0, False
            return
        self._uncommitted_since = self._uncommitted_since or now
        if now - self._uncommitted_since > PATIENCE_SECONDS and not self._uncommitted_told:
            self._uncommitted_told = True
            log.warning(
                "subscription %s: its acks cannot be committed: %s",
                self._interest.name,
                error.str(),
            )

    # -- what the member tells

    def on_assigned(self, partitions: Sequence[Assigned]) -> None:
        for partition in partitions:
            self._assigned[partition.place] = partition
        self._commit_in(0.0)

    def on_arrived(self) -> None:
        self._arrived.set()

    def on_revoke(
        self, places: Sequence[Place], done: Callable[[Sequence[TopicPartition]], None]
    ) -> None:
        leaving = self._those(places)
        for partition in leaving:
            partition.leaving = True
        settled = self.on_leaving(_identities(leaving)) if self._lost is None else None

        def finish(_: object = None) -> None:
            last = self._due(leaving)
            self.on_lost(places)
            done(last)

        if settled is None:
            finish()
        else:
            settled.add_done_callback(finish)

    def on_lost(self, places: Sequence[Place]) -> None:
        leaving = self._those(places)
        identities = _identities(leaving)
        for partition in leaving:
            partition.gone = True
            partition.buffer.clear()
            partition.again.clear()
            del self._assigned[partition.place]
        if not self._assigned:
            # Nobody waits for what is not to be committed by us any more.
            _tell(self._recorded)
        if self._lost is None and identities:
            self.on_revoked(identities)

    def _those(self, places: Sequence[Place]) -> list[Assigned]:
        return [self._assigned[place] for place in places if place in self._assigned]

    def on_moved(self, places: Sequence[Place]) -> None:
        """Leave the group, without a last commit of *places*: they are elsewhere now."""
        self.on_lost(places)
        self._lose(
            SourceLost(
                f"subscription {self._interest.name!r} was moved", subscription=self._interest.name
            )
        )
        if self._member is not None:
            self._member.leave()

    def on_failure(self, error: KafkaError) -> None:
        translated = translate(error, broker=self._broker, topic=self._interest.topic)
        # Of those that a pattern takes in one may go, and come again.
        if translated.retryable or (is_missing(error) and has_wildcard(self._interest.topic)):
            translated = SourceLost(
                f"broker {self._broker!r}: {error.str()}", subscription=self._interest.name
            )
        self._lose(translated)

    def on_unsupported(self, error: KafkaError) -> None:
        if self._use_classic():
            self._lose(SourceLost("the cluster has no group protocol 'consumer': using 'classic'"))
        else:
            self.on_failure(error)

    def on_ended(self) -> None:
        self._lose(SourceLost("the member left its group"))
        self._ended.set()

    def _lose(self, error: SidecarError) -> None:
        if self._lost is None:
            self._lost = error
        _tell(self._recorded)
        _tell(self._recording)
        self._arrived.set()

    # -- the end

    async def stop(self, give_back: Sequence[Hashable]) -> None:
        """What is given back is read again by whoever goes on from the last commit."""
        if self._member is not None:
            self._member.rest()
        self.release(give_back)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._committing is not None:
            self._committing.cancel()
            self._committing = None
        lost = self._lost is not None
        self._lose(SourceLost("closed", subscription=self._interest.name))
        if self._member is None:
            return
        self._member.leave()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._ended.wait()
        except TimeoutError:
            if not lost:
                log.warning(
                    "subscription %s: its group was not left in time: others get its events when "
                    "the session has ended",
                    self._interest.name,
                )


def _tell(recorded: list[asyncio.Future[None]]) -> None:
    told = list(recorded)
    recorded.clear()
    for future in told:
        if not future.done():
            future.set_result(None)


def _identities(partitions: Iterable[Assigned]) -> list[Hashable]:
    """Of what is handed out."""
    return [
        (*partition.place, offset, partition.log)
        for partition in partitions
        for offset in partition.positions.out
    ]


def event_of(topic: str, number: int, message: Message) -> tuple[Event | None, str]:
    """The event of a record of partition *number*; None, and why, where it is none."""
    try:
        headers, key, value = message.headers(), message.key(), message.value()
        event = binding.decode_quickly(headers, value, key)
        if event is None:
            event = binding.decode(headers, value, key, _defaults(topic, number, message))
    except InvalidEvent as error:
        return None, error.message
    except SystemError:  # confluent-kafka cannot read a header's name that is not UTF-8
        return None, "a header's name is not UTF-8"
    return event, ""


def _defaults(topic: str, partition: int, message: Message) -> Defaults:
    return Defaults(
        source=f"/{topic}",
        type=topic,
        id=f"{topic}-{partition}-{message.offset()}",
        time_ns=max(0, message.timestamp()[1]) * 1_000_000,
    )


def _offset(message: Message) -> int:
    offset: int = message.offset()
    return offset
