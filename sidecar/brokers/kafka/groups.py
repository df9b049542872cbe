"""Where a consumer group stands: its start, moving it for all members, and its lag. Blocking."""

from __future__ import annotations

import contextlib
import secrets
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import TopicPartition as Partition
from confluent_kafka.admin import OffsetSpec

from sidecar.brokers.kafka.client import (
    Conf,
    leave,
    logged,
    make_consumer,
    topic_missing,
    translate,
)
from sidecar.brokers.kafka.positions import FENCE_LENGTH, fence_metadata, fence_of
from sidecar.errors import BrokerRefused, BrokerUnavailable, NotSupported
from sidecar.event import has_wildcard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sidecar.broker import Interest, Start
    from sidecar.brokers.kafka.member import Member, Place
    from sidecar.brokers.kafka.topics import Topics

CALL_SECONDS = 5.0
FIRST_USE_SECONDS = 10.0
"""The cluster's first group at all has to wait until the topic of all groups' offsets is made."""
MOVE_SECONDS = 30.0
"""The others leave within a second or two; one that was killed, when its session ends."""
LOOK_SECONDS = 0.05
MOVER = " (moves the group)"
"""How the client id of a member ends that is there for that only."""

_PASSING = {
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError._WAIT_COORD,
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
}
_HAS_MEMBERS = {
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError.STALE_MEMBER_EPOCH,
    KafkaError.NON_EMPTY_GROUP,
}
"""How a group that has members answers a commit by somebody who is none."""


class Groups:
    """
    Reads and writes the positions of groups. Every method blocks: call it in a thread.

    Each raises BrokerUnavailable and BrokerRefused.
    """

    def __init__(self, broker: str, topics: Topics, conf: Callable[[Interest], Conf]) -> None:
        """*conf*: settings of a consumer."""
        self._broker = broker
        self._topics = topics
        self._conf = conf

    # -- the start

    def begin(self, interest: Interest) -> tuple[Sequence[str], Mapping[Place, str]]:
        """
        Settle where a new group starts, before anybody joins: what comes meanwhile is not missed.

        Returns the topics there are, and the fences of their partitions. A group that has members
        has settled it before. Partitions that come later are read from their first event. Raises
        TopicMissing.
        """
        topics = self._topics.matching(interest.topic)
        if not topics and not has_wildcard(interest.topic):
            raise topic_missing(self._broker, interest.topic)  # gone again, or not known everywhere
        partitions = _partitions(topics)
        if not partitions:
            return [], {}
        with self._consumer(interest) as consumer:
            committed = self._committed(consumer, partitions)
            if not any(p.offset >= 0 for p in committed.values()):
                starts = self._offsets(consumer, partitions, interest.start)
                self._commit(consumer, starts)
        fences = {place: fence_of(p.metadata or "") for place, p in committed.items()}
        return sorted(topics), fences

    def _commit(self, consumer: Any, offsets: list[Partition]) -> bool:
        """False: the group has members, and only they can."""
        deadline = time.monotonic() + FIRST_USE_SECONDS
        while True:
            try:
                consumer.commit(offsets=offsets, asynchronous=False)
            except KafkaException as error:
                reason = error.args[0]
                if reason.code() in _HAS_MEMBERS:
                    return False
                if reason.code() not in _PASSING or time.monotonic() > deadline:
                    raise translate(reason, broker=self._broker) from error
                _pause()
            else:
                return True

    # -- moving

    def move(
        self,
        interest: Interest,
        to: Start,
        ours: Sequence[Member],
    ) -> None:
        """
        Move a group, so that nothing old is committed after it. Raises TopicMissing, NotSupported.

        The new positions are committed with a mark, the fence, by one of *ours* where there is one:
        only members may. Every member looks for it each second, and leaves when it is new to it.
        Until all members of before have left they may still commit, which takes the mark away: so
        it is over when they are gone and the mark is there, and else is done again.

        Where another move came after, its mark stands for ours: two that did theirs again, or
        waited for each other's member to leave, would both go on until their time is up.
        """
        topics = self._topics.matching(interest.topic)
        if not topics:
            raise topic_missing(self._broker, interest.topic)
        with (
            self._consumer(interest, suffix=MOVER) as consumer,
            self._consumer(interest) as looker,
        ):
            offsets = self._offsets(consumer, self._meant(interest, topics, to), to)
            fence = secrets.token_hex(FENCE_LENGTH // 2)
            marked = [
                Partition(p.topic, p.partition, p.offset, fence_metadata(fence)) for p in offsets
            ]
            self._move(interest, consumer, looker, topics=list(topics), marked=marked, ours=ours)

    def _move(
        self,
        interest: Interest,
        consumer: Any,
        looker: Any,
        *,
        topics: list[str],
        marked: list[Partition],
        ours: Sequence[Member],
    ) -> None:
        deadline = time.monotonic() + MOVE_SECONDS
        joined = False
        stale: set[str] = set()
        old: set[str] = {""}
        while time.monotonic() < deadline:
            # Those of now may not know of what is committed next.
            stale |= self._members(interest.name)
            old |= {fence_of(p.metadata or "") for p in self._committed(looker, marked).values()}
            old -= {fence_of(p.metadata or "") for p in marked}
            if _commit_by(ours, marked) or self._commit(consumer, marked):
                member = consumer if joined else None
                if self._follow(
                    interest.name, member, looker, marked, stale=stale, old=old, deadline=deadline
                ):
                    return
                continue
            if not joined:
                # Be a member for a moment, that takes no events.
                consumer.subscribe(topics, on_assign=_assign_nothing)
                joined = True
            consumer.poll(LOOK_SECONDS)
        raise BrokerRefused(
            f"group {interest.name!r} has members that do not follow: are there consumers in it "
            "that are no sidecars? Stop them, and move the subscription again",
            broker=self._broker,
            subscription=interest.name,
        )

    def _follow(
        self,
        group: str,
        joined: Any,
        looker: Any,
        marked: Sequence[Partition],
        *,
        stale: set[str],
        old: set[str],
        deadline: float,
    ) -> bool:
        """
        Wait until all *stale* members have left. False: one has committed over the marks.

        *old*: the marks that they may know of.
        """
        while time.monotonic() < deadline:
            gone = not stale & self._members(group)
            if not self._all_marked(looker, marked, old):
                return False
            if gone:
                return True
            if joined is not None:
                joined.poll(LOOK_SECONDS)
            else:
                _pause()
        return False

    def _all_marked(self, consumer: Any, marked: Sequence[Partition], old: set[str]) -> bool:
        """With our mark, or that of a move that came after."""
        found = self._committed(consumer, marked)
        return all(fence_of(found[_place(p)].metadata or "") not in old for p in marked)

    def _meant(
        self, interest: Interest, topics: Mapping[str, Sequence[int]], to: Start
    ) -> list[Partition]:
        """The partitions that are to be moved. Raises NotSupported."""
        partitions = _partitions(topics)
        if to.position is None:
            return partitions
        position = to.position
        if position.stream:
            partitions = [p for p in partitions if p.topic == position.stream]
        elif len(topics) > 1:
            raise NotSupported(
                f"position: the subscription spans {', '.join(topics)}: name the topic as its stream",
                subscription=interest.name,
            )
        meant = [p for p in partitions if p.partition == (position.partition or 0)]
        if not meant or position.offset is None:
            raise NotSupported(
                "position: name a partition that there is, and an offset from 0 on",
                subscription=interest.name,
            )
        return meant

    def _members(self, group: str) -> set[str]:
        """Their ids; not those that are there to move the group, which commit marks and no more."""
        try:
            future = self._topics.admin.describe_consumer_groups(
                [group], request_timeout=CALL_SECONDS
            )[group]
            described = future.result(timeout=2 * CALL_SECONDS)
        except TimeoutError as error:
            raise self._silent() from error
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return set()
            if error.args[0].code() in _PASSING:
                return {"?"}
            raise translate(error.args[0], broker=self._broker) from error
        return {m.member_id for m in described.members if not m.client_id.endswith(MOVER)}

    # -- offsets

    def _offsets(
        self, consumer: Any, partitions: Sequence[Partition], start: Start
    ) -> list[Partition]:
        """The offset of *start* in each partition. Raises NotSupported: it is beyond the end."""
        try:
            if start.time_ns is not None:
                asked = [
                    Partition(p.topic, p.partition, start.time_ns // 1_000_000) for p in partitions
                ]
                found = consumer.offsets_for_times(asked, timeout=CALL_SECONDS)
                return [p if p.offset >= 0 else _edge(consumer, p, latest=True) for p in found]
            position = start.position
            if position is not None and position.offset is not None:
                return [
                    _at(consumer, p, position.offset)
                    if p.partition == (position.partition or 0)
                    else _edge(consumer, p, latest=False)
                    for p in partitions
                ]
            return [_edge(consumer, p, latest=start.latest) for p in partitions]
        except KafkaException as error:
            raise translate(error.args[0], broker=self._broker) from error

    def _committed(self, consumer: Any, partitions: Sequence[Partition]) -> dict[Place, Partition]:
        """
        What *consumer*'s group has committed.

        Non-obvious: not by the admin client. A coordinator that has just moved answers "not me",
        and librdkafka then asks a consumer for the new one, which an admin client has not: the
        process ends with a segmentation fault (librdkafka issue 5040).
        """
        asked = [Partition(p.topic, p.partition) for p in partitions]
        deadline = time.monotonic() + FIRST_USE_SECONDS
        while True:
            try:
                found = consumer.committed(asked, timeout=CALL_SECONDS)
            except KafkaException as error:
                reason = error.args[0]
                if reason.code() not in _PASSING or time.monotonic() > deadline:
                    raise translate(reason, broker=self._broker) from error
                _pause()
            else:
                return {_place(partition): partition for partition in found}

    def lag(self, interest: Interest, here: Mapping[Place, tuple[int, int]]) -> Mapping[Place, int]:
        """
        Offsets that nobody fetched, of each partition.

        *here*: of the partitions that are ours, the offset above what we fetched, and how many
        below it are to be fetched again. Of the others it is what nobody acked.
        """
        partitions = _partitions(self._topics.matching(interest.topic))
        others = [p for p in partitions if _place(p) not in here]
        elsewhere: Mapping[Place, Partition] = {}
        if others:
            with self._consumer(interest) as consumer:
                elsewhere = self._committed(consumer, others)
        ends = self._topics.admin.list_offsets(
            {partition: OffsetSpec.latest() for partition in partitions},
            request_timeout=CALL_SECONDS,
        )
        lag: dict[Place, int] = {}
        for partition, future in ends.items():
            place = _place(partition)
            try:
                end = future.result(timeout=2 * CALL_SECONDS).offset
            except TimeoutError as error:
                raise self._silent() from error
            except KafkaException as error:
                raise translate(error.args[0], broker=self._broker) from error
            known = elsewhere.get(place)
            done, waiting = here.get(place) or (known.offset if known is not None else 0, 0)
            lag[place] = max(0, end - max(0, done)) + waiting
        return lag

    def _silent(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"broker {self._broker!r} does not answer", broker=self._broker)

    @contextlib.contextmanager
    def _consumer(self, interest: Interest, *, suffix: str = "") -> Iterator[Any]:
        """*suffix*: of its client id."""
        conf = self._conf(interest)
        conf["client.id"] += suffix
        consumer = make_consumer(conf | logged(lambda _error: None), broker=self._broker)
        try:
            yield consumer
        finally:
            leave(consumer)


def _assign_nothing(consumer: Any, partitions: list[Partition]) -> None:
    """Be assigned them, and fetch nothing."""
    if partitions:
        consumer.incremental_assign(partitions)
        consumer.pause(partitions)


def _commit_by(ours: Sequence[Member], marked: list[Partition]) -> bool:
    for member in ours:
        try:
            member.move(marked).result(timeout=CALL_SECONDS)
        except (KafkaException, RuntimeError, CancelledError, TimeoutError):
            continue  # it has left, or a rebalance is under way
        return True
    return False


def _partitions(topics: Mapping[str, Sequence[int]]) -> list[Partition]:
    return [Partition(topic, number) for topic, numbers in topics.items() for number in numbers]


def _place(partition: Partition) -> Place:
    return partition.topic, partition.partition


def _edge(consumer: Any, partition: Partition, *, latest: bool) -> Partition:
    low, high = consumer.get_watermark_offsets(partition, timeout=CALL_SECONDS)
    return Partition(partition.topic, partition.partition, high if latest else low)


def _at(consumer: Any, partition: Partition, offset: int) -> Partition:
    """Beyond the end nothing can be fetched: librdkafka would begin at the earliest."""
    end = _edge(consumer, partition, latest=True).offset
    if offset > end:
        raise NotSupported(
            f"position: partition {partition.partition} of {partition.topic!r} ends at {end}; "
            f"name an offset up to that, not {offset}"
        )
    return Partition(partition.topic, partition.partition, offset)


def _pause() -> None:
    time.sleep(LOOK_SECONDS)  # noqa: TID251 - in a thread
