"""A member of a consumer group: the thread that polls librdkafka, commits, and answers rebalances."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from sidecar.brokers.kafka.client import Conf, is_missing, leave, logged, make_consumer
from sidecar.brokers.kafka.positions import PartitionPositions, fence_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from confluent_kafka import Message

log = logging.getLogger(__name__)

Place = tuple[str, int]
"""A partition: topic and number."""

POLL_SECONDS = 0.1
BUSY_POLL_SECONDS = 0.005
"""So long a commit waits for the end of a poll."""
BUSY_SECONDS = 1.0
"""So long after an event or a commit the next commit is expected."""
BATCH = 500
MAX_BUFFERED_BYTES = 16 << 20
"""So much waits in buffers, beside the last that was fetched."""
CALL_SECONDS = 10.0
PATIENCE_SECONDS = 1.0
"""So long a full buffer only stops the polling; then its partitions are paused and polling goes on."""
FULL_SECONDS = 0.002
JOIN_SECONDS = 1.0
"""So long after it asked to join a member that leaves waits for the answer."""
FENCE_SECONDS = 1.0
"""How often it is looked whether somebody moved the group."""
ANSWER_SECONDS = 10.0
"""The loop answers a rebalance within this time, or it is not waited for."""

_LOGS = itertools.count(1)

_UNSUPPORTED = {KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE}
_PASSING = {
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TRANSPORT,
    KafkaError._RESOLVE,
    KafkaError._MAX_POLL_EXCEEDED,
    KafkaError._TIMED_OUT,
}
"""librdkafka tries on by itself."""


class Assigned:
    """One partition while it is ours. Its positions belong to the loop, its buffer is filled here."""

    __slots__ = (
        "again",
        "buffer",
        "bytes_in",
        "bytes_out",
        "gone",
        "leaving",
        "log",
        "paused",
        "place",
        "positions",
    )

    def __init__(self, place: Place, positions: PartitionPositions, log_number: int) -> None:
        self.place = place
        self.positions = positions
        self.log = log_number
        """Offsets are those of this log: a topic that is made anew has the same ones for others."""
        self.buffer: deque[Message] = deque()
        self.bytes_in = self.bytes_out = 0
        """Of all that was ever put into the buffer, by its thread, and taken out, by the loop."""
        self.again: deque[Message] = deque()
        """What was given back, ascending."""
        self.leaving = False
        """It is being revoked: nothing more of it is handed out."""
        self.gone = False
        """It is another's: nothing of it counts any more."""
        self.paused = False
        """Its gap is too wide: it is not fetched, and its buffer waits."""


class Owner(Protocol):
    """Who decides. Each is called on the event loop, by way of `Member`'s *call*."""

    def on_assigned(self, partitions: Sequence[Assigned]) -> None: ...

    def on_arrived(self) -> None: ...

    def on_revoke(
        self, places: Sequence[Place], done: Callable[[Sequence[TopicPartition]], None]
    ) -> None:
        """*done* is to be called with the last commits of these, when the app has none of them."""

    def on_lost(self, places: Sequence[Place]) -> None:
        """Others have these already."""

    def on_moved(self, places: Sequence[Place]) -> None:
        """Somebody moved the group; nothing more may be committed of these."""

    def on_committed(
        self, error: KafkaError | None, partitions: Sequence[TopicPartition]
    ) -> None: ...

    def on_not_committed(self, error: KafkaError | None) -> None:
        """The commit that was handed over last was not sent. None: there was nothing left to send."""

    def on_failure(self, error: KafkaError) -> None:
        """It will not go on by itself."""

    def on_unsupported(self, error: KafkaError) -> None:
        """It could not join, perhaps because the cluster does not know the new group protocol."""

    def on_ended(self) -> None:
        """It has left the group."""


class Member:
    """
    A thread and its consumer. It decides nothing: the owner does, on the loop.

    Non-obvious: librdkafka calls `_on_…` within poll() and close(), so in this thread. A rebalance
    waits for the loop here; the loop never waits for the thread without awaiting. And only this
    thread uses the consumer: confluent-kafka lets a second one wait, with the interpreter's lock in
    its hands.
    """

    def __init__(
        self,
        name: str,
        conf: Conf,
        owner: Owner,
        *,
        broker: str,
        call: Callable[..., None],
        max_buffered: int,
        max_buffered_bytes: int,
        topics: Sequence[str],
        matching: Callable[[], Mapping[str, Sequence[int]]] | None,
        matching_seconds: float,
        fences: Mapping[Place, str],
    ) -> None:
        """
        *call* runs a function on the loop. *matching*, for patterns, looks up the topics to
        subscribe to, beyond the *topics* of now. *fences*: the marks of the last moves, as they
        were when this began (see Groups.move). Raises BrokerRefused: see make_consumer.
        """
        self._name = name
        self._owner = owner
        self._call = call
        self._max_buffered = max_buffered
        self._max_buffered_bytes = max_buffered_bytes
        self._topics = list(topics)
        self._matching = matching
        self._matching_seconds = matching_seconds
        self._routes: dict[Place, Assigned] = {}
        """The partitions of this thread: those of the owner, a moment ahead or behind."""
        self._pauses: deque[tuple[Place, bool]] = deque()
        self._fences = dict(fences)
        self._logs: dict[Place, int] = {}
        self._jobs: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._commits: deque[list[TopicPartition]] = deque()
        self._stop = threading.Event()
        self._resting = False
        self._paused = False
        """All partitions are: the buffer is full, or we rest."""
        self._moved = False
        self._joined = False
        self._busy_until = 0.0
        self._joining_until = 0.0
        """So long a member that leaves waits for the answer to its join."""
        self.consumer: Any = make_consumer(
            conf | logged(self._on_error) | {"on_commit": self._on_commit}, broker=broker
        )
        self._thread = threading.Thread(target=self._run, name=f"kafka-{name}", daemon=True)

    # -- told by the owner, on the loop

    def start(self) -> None:
        """Join the group; the first call does."""
        if not self._has_begun:
            self._thread.start()

    @property
    def _has_begun(self) -> bool:
        return self._thread.ident is not None

    def rest(self) -> None:
        """Fetch nothing more; stay in the group, and commit."""
        self._resting = True

    def pause(self, place: Place, *, paused: bool) -> None:
        self._pauses.append((place, paused))

    def commit(self, offsets: list[TopicPartition]) -> None:
        """Send them soon; `Owner.on_committed` is told what became of it."""
        self._commits.append(offsets)

    def move(self, offsets: list[TopicPartition]) -> Future[object]:
        """
        Commit these in place of all that we know, then leave. From any thread.

        Raises RuntimeError when it has not joined.
        """
        if not self._has_begun:
            raise RuntimeError("not in the group")

        def job() -> None:
            self.consumer.commit(offsets=offsets, asynchronous=False)
            self._tell_moved([(p.topic, p.partition) for p in offsets])

        future: Future[object] = Future()
        self._jobs.append((job, future))
        return future

    def leave(self) -> None:
        """Leave the group, with a last word on each partition; `Owner.on_ended` is told."""
        self._stop.set()
        self.start()

    # -- the thread

    def _run(self) -> None:
        try:
            if self._topics and not self._stop.is_set():
                self._joining_until = time.monotonic() + JOIN_SECONDS
                self._subscribe()
            self._work()
            self._wait_joined()
        except Exception:
            log.exception("subscription %s: consuming failed", self._name)
            self._call(self._owner.on_failure, KafkaError(KafkaError._FAIL, "consuming failed"))
        finally:
            while self._jobs:
                self._jobs.popleft()[1].cancel()
            try:
                leave(self.consumer)
            except (KafkaException, RuntimeError):
                log.exception("subscription %s: leaving the group failed", self._name)
            self._call(self._owner.on_ended)

    def _wait_joined(self) -> None:
        """
        Let the join that is under way be answered before we leave.

        Non-obvious: a consumer of the protocol "consumer" that is closed between its first heartbeat
        and the answer leaves without a word. Its partitions are nobody's until its session ends,
        which takes 45 s unless the cluster is told otherwise.
        """
        while not self._joined and time.monotonic() < self._joining_until:
            self.consumer.poll(BUSY_POLL_SECONDS)

    def _subscribe(self) -> None:
        self.consumer.subscribe(
            self._topics,
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )

    def _work(self) -> None:
        full_since = 0.0
        now = time.monotonic()
        fence_at, topics_at = now + FENCE_SECONDS, now + self._matching_seconds
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= fence_at:
                self._look_for_fence()
                fence_at = now + FENCE_SECONDS
            if self._matching is not None and now >= topics_at:
                self._look_for_topics(self._matching)
                topics_at = now + self._matching_seconds
            self._do_jobs()
            self._do_commits()
            self._do_pauses()
            buffered, size = self._buffered(), self._buffered_bytes()
            full = buffered >= self._max_buffered or size >= self._max_buffered_bytes
            half = max(1, self._max_buffered // 2)
            if not self._paused and (self._resting or full):
                # Short: only wait, or librdkafka would throw away what it fetched ahead.
                full_since = full_since or now
                if not self._resting and now - full_since < PATIENCE_SECONDS:
                    self._stop.wait(FULL_SECONDS)
                    continue
                self.consumer.pause(self.consumer.assignment())
                self._paused = True
            elif (
                self._paused
                and not self._resting
                and buffered < half
                and size < max(1, self._max_buffered_bytes // 2)
            ):
                self.consumer.resume(self._resumable())
                self._paused, full_since = False, 0.0
            elif not self._paused:
                full_since = 0.0
            self._consume()

    def _buffered(self) -> int:
        """What waits to be fetched; not what waits because its partition's gap is too wide."""
        return sum(len(one.buffer) for one in self._routes.values() if not one.paused)

    def _buffered_bytes(self) -> int:
        """The same in bytes of data."""
        return sum(one.bytes_in - one.bytes_out for one in self._routes.values() if not one.paused)

    def _consume(self) -> None:
        # consume() waits until it has all it was asked for: one first, then what is there.
        busy = time.monotonic() < self._busy_until
        first = self.consumer.poll(BUSY_POLL_SECONDS if busy else POLL_SECONDS)
        if first is None:
            return
        self._busy_until = time.monotonic() + BUSY_SECONDS
        room = 0 if self._paused else self._max_buffered - self._buffered() - 1
        messages = [first]
        if room > 0:
            messages += self.consumer.consume(min(BATCH, room), 0)
        arrived = False
        for message in messages:
            error = message.error()
            if error is not None:
                self._on_message_error(message, error)
                continue
            assigned = self._routes.get((message.topic(), message.partition()))
            if assigned is not None:
                assigned.bytes_in += len(message)
                assigned.buffer.append(message)
                arrived = True
        if arrived:
            self._call(self._owner.on_arrived)

    def _do_commits(self) -> None:
        while self._commits:
            offsets = self._commits.popleft()
            if not offsets:  # all of them were revoked meanwhile
                self._call(self._owner.on_not_committed, None)
                continue
            self._busy_until = time.monotonic() + BUSY_SECONDS
            try:
                if not self._moved:
                    self.consumer.commit(offsets=offsets, asynchronous=True)
                    continue
                error = KafkaError(KafkaError._STATE)
            except KafkaException as exception:
                error = exception.args[0]
            self._call(self._owner.on_not_committed, error)

    def _do_jobs(self) -> None:
        while self._jobs:
            job, future = self._jobs.popleft()
            try:
                future.set_result(job())
            except (KafkaException, RuntimeError) as error:
                future.set_exception(error)

    def _resumable(self) -> list[TopicPartition]:
        return [
            partition
            for partition in self.consumer.assignment()
            if (one := self._routes.get((partition.topic, partition.partition))) is not None
            and not one.paused
        ]

    def _do_pauses(self) -> None:
        while self._pauses:
            place, paused = self._pauses.popleft()
            if place not in self._routes or self._paused:
                continue
            partition = [TopicPartition(*place)]
            with contextlib.suppress(KafkaException):  # revoked at this very moment
                (self.consumer.pause if paused else self.consumer.resume)(partition)

    # -- errors

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._on_fatal(error)

    def _on_fatal(self, error: KafkaError) -> None:
        """
        librdkafka does not say what was fatal, but in words. Before the first partition it is most
        likely the group protocol.
        """
        if not self._joined or error.code() in _UNSUPPORTED:
            self._call(self._owner.on_unsupported, error)
        else:
            self._call(self._owner.on_failure, error)

    def _on_message_error(self, message: Message, error: KafkaError) -> None:
        if error.code() == KafkaError._PARTITION_EOF or error.code() in _PASSING:
            return
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._on_fatal(error)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            self._reset(message)
        elif is_missing(error) or not error.retriable():
            self._call(self._owner.on_failure, error)

    def _reset(self, message: Message) -> None:
        """
        Our position is not in the log: retention was quicker than the app, or the log was cut.

        From the earliest on, whichever it was: so nothing that is still there is passed over.
        """
        place = (message.topic() or "", message.partition() or 0)
        assigned = self._routes.get(place)
        if assigned is None:
            return
        low, high = self.consumer.get_watermark_offsets(TopicPartition(*place), CALL_SECONDS)
        log.error(
            "subscription %s: position %d of %s/%d is not in the log any more, which has %d to %d: "
            "going on at %d",
            self._name,
            assigned.positions.next_offset,
            *place,
            low,
            high,
            low,
        )
        fence = assigned.positions.fence
        self._call(self._owner.on_lost, [place])
        self._logs[place] = next(_LOGS)
        self._install([(place, PartitionPositions.at(low, fence))])
        # Non-obvious: librdkafka has stopped it for good, and seeks no more.
        self.consumer.incremental_unassign([TopicPartition(*place)])
        self._assign([TopicPartition(*place, low)])

    # -- rebalances

    def _on_assign(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        self._joined = True
        if not partitions:
            return
        try:
            committed = consumer.committed(partitions, timeout=CALL_SECONDS)
            fresh = [self._begin(consumer, partition) for partition in committed]
        except KafkaException as error:
            # Nothing is fetched that way; whoever subscribes again asks again.
            self._call(self._owner.on_failure, error.args[0])
            consumer.incremental_assign(partitions)
            consumer.pause(partitions)
            return
        moved = self._moved_of(committed)
        if moved:
            self._tell_moved(moved)
        self._install(fresh)
        self._assign([TopicPartition(*place, positions.next_offset) for place, positions in fresh])

    def _begin(self, consumer: Any, partition: TopicPartition) -> tuple[Place, PartitionPositions]:
        """Where to go on, as committed. Raises KafkaException."""
        place = (partition.topic, partition.partition)
        if partition.offset >= 0:
            return place, PartitionPositions(partition.offset, partition.metadata or "")
        # Not there when the group began (see Groups.begin), or made anew since: all that it has is
        # new.
        self._logs[place] = next(_LOGS)
        low, _ = consumer.get_watermark_offsets(TopicPartition(*place), CALL_SECONDS)
        return place, PartitionPositions.at(low)

    def _assign(self, partitions: list[TopicPartition]) -> None:
        self.consumer.incremental_assign(partitions)
        # Non-obvious: paused by us when it was revoked, it would be paused when it comes again.
        (self.consumer.pause if self._paused else self.consumer.resume)(partitions)

    def _install(self, fresh: Sequence[tuple[Place, PartitionPositions]]) -> None:
        partitions = [
            Assigned(place, positions, self._logs.get(place, 0)) for place, positions in fresh
        ]
        self._routes.update((one.place, one) for one in partitions)
        self._call(self._owner.on_assigned, partitions)

    def _on_revoke(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        """Commit the last word on the partitions, then let them go."""
        places = [(p.topic, p.partition) for p in partitions]
        commits: list[TopicPartition] = []
        answered = threading.Event()

        def done(last: Sequence[TopicPartition]) -> None:
            commits.extend(last)
            answered.set()

        self._call(self._owner.on_revoke, places, done)
        if not answered.wait(ANSWER_SECONDS):
            log.error("subscription %s: no answer to a rebalance in time", self._name)
        self._forget(places)
        if commits:
            try:
                consumer.commit(offsets=list(commits), asynchronous=False)
            except KafkaException as error:
                log.warning(
                    "subscription %s: the last commit of revoked partitions failed: %s",
                    self._name,
                    error,
                )
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        """Others have them already: forget them, and commit nothing."""
        places = [(p.topic, p.partition) for p in partitions]
        log.warning("subscription %s: lost %d partitions", self._name, len(places))
        self._forget(places)
        self._call(self._owner.on_lost, places)
        consumer.incremental_unassign(partitions)

    def _forget(self, places: Sequence[Place]) -> None:
        """
        Non-obvious: what the owner wanted to commit of them before may still wait here, and is older
        than their last word. Sent after it, it would take it back: they were not acked, then.
        """
        for place in places:
            self._routes.pop(place, None)
        for offsets in list(self._commits):
            offsets[:] = [p for p in offsets if (p.topic, p.partition) not in places]

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """An asynchronous commit was answered."""
        self._call(self._owner.on_committed, error, partitions)

    # -- looking

    def _look_for_fence(self) -> None:
        """Did somebody move the group? Then nothing of the old places is committed any more."""
        if not self._fences or self._moved:
            return
        places = [TopicPartition(*place) for place in self._fences]
        try:
            committed = self.consumer.committed(places, timeout=FENCE_SECONDS)
        except KafkaException:
            return
        moved = self._moved_of(committed)
        if moved:
            self._tell_moved(moved)

    def _moved_of(self, committed: Sequence[TopicPartition]) -> list[Place]:
        moved = []
        for partition in committed:
            place = (partition.topic, partition.partition)
            if partition.offset >= 0:
                fence = fence_of(partition.metadata or "")
                if self._fences.setdefault(place, fence) != fence:
                    moved.append(place)
        return moved

    def _tell_moved(self, places: list[Place]) -> None:
        self._moved = True
        self._call(self._owner.on_moved, places)

    def _look_for_topics(self, matching: Callable[[], Mapping[str, Sequence[int]]]) -> None:
        """Topics that the pattern newly matches are subscribed to, and those that are gone no more."""
        try:
            topics = sorted(matching())
        except Exception as error:  # noqa: BLE001 - whatever it is, the next look is soon
            log.debug("subscription %s: topics not looked up: %s", self._name, error)
            return
        if topics != self._topics:
            self._topics = topics
            if topics:
                self._subscribe()
            else:
                self.consumer.unsubscribe()
