"""The life of a publish: route, wait for room, hand to the broker, gather the outcomes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

from sidecar.errors import (
    Draining,
    EventTooLarge,
    Internal,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    SidecarError,
)
from sidecar.event import Durability, Event, Outcome, check_topic
from sidecar.publishing.pending import Pending
from sidecar.telemetry.facts import Published, PublishFacts

if TYPE_CHECKING:
    from sidecar.broker import Broker
    from sidecar.config import Limits, Publishing, Route
    from sidecar.publishing.routes import Routes

log = logging.getLogger(__name__)

Outcomes = asyncio.Future[Sequence[Outcome]]


class Publisher:
    """Takes checked events from every door and answers with one outcome per event, in order."""

    def __init__(
        self,
        routes: Routes,
        brokers: Mapping[str, Broker],
        *,
        settings: Publishing,
        limits: Limits,
        facts: PublishFacts,
    ) -> None:
        self.routes = routes
        self._brokers = brokers
        self._settings = settings
        self._limits = limits
        self._facts = facts
        self.draining = False
        self._pending = {
            name: Pending(
                name,
                max_events=settings.max_pending_events,
                max_bytes=settings.max_pending_bytes,
            )
            for name in brokers
        }
        self._idle = asyncio.Event()
        self._idle.set()
        self._under_way = 0

    def pending(self, broker: str) -> Pending:
        return self._pending[broker]

    @property
    def timeout_seconds(self) -> float:
        """What a publish may take at its broker."""
        return self._settings.timeout_seconds

    async def publish(
        self,
        topic: str,
        events: Sequence[Event | SidecarError],
        *,
        timeout: float | None = None,
        min_durability: int = 0,
        wait: float | None = -1,
    ) -> Sequence[Outcome]:
        """
        Publish and wait for the outcomes. Errors in *events* come back in their places.

        *wait*: seconds to wait for room in a full queue, None for ever; -1: as configured.
        Raises InvalidTopic, InvalidRequest, Draining, QueueFull: then nothing was published.
        """
        outcomes = await self.submit(
            topic, events, timeout=timeout, min_durability=min_durability, wait=wait
        )
        return await outcomes

    async def submit(
        self,
        topic: str,
        events: Sequence[Event | SidecarError],
        *,
        timeout: float | None = None,
        min_durability: int = 0,
        wait: float | None = -1,
    ) -> Outcomes:
        """
        As publish, but return once the events are handed to their brokers, in order.

        Awaits only room in the queue: the next submit of the same caller comes behind this one.
        """
        self._check(topic, events)
        if wait is not None and wait < 0:
            wait = self._settings.full_wait_seconds
        timeout = timeout or self._settings.timeout_seconds
        groups, failed = self._routed(topic, self._sized(events), min_durability)
        if not failed and len(groups) == 1:
            return await self._hand_over(topic, groups[0], timeout, wait)
        gathered = _Gathered(len(events))
        if failed:
            gathered.put(list(failed), list(failed.values()))
            types = [_type(events[place]) for place in failed]
            self._facts.published(Published("", "", types, list(failed.values()), 0.0))
        for group in groups:
            try:
                part = await self._hand_over(topic, group, timeout, wait)
            except SidecarError as error:
                gathered.put(group.indices, [error] * len(group.events))
            else:
                gathered.follow(group.indices, part)
        return gathered.future

    async def publish_to(
        self,
        broker: str,
        topic: str,
        events: Sequence[Event],
        *,
        broker_ids: Sequence[str],
        label: str,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Sequence[Outcome]:
        """
        For the sidecar's own (dead letters): past the routes, under other broker ids.

        *label* is the topic in metrics. *wait*: seconds to wait for room, None for ever; raises
        QueueFull.
        """
        group = _Group(broker, label, events, range(len(events)))
        timeout = timeout or self._settings.timeout_seconds
        return await (await self._hand_over(topic, group, timeout, wait, broker_ids))

    def _check(self, topic: str, events: Sequence[Event | SidecarError]) -> None:
        if self.draining:
            raise Draining("the sidecar is stopping: publish to another, or again soon")
        check_topic(topic)
        if not events:
            raise InvalidRequest("events: publish at least one event", field="events")
        if len(events) > self._limits.max_batch_events:
            raise InvalidRequest(
                f"events: {len(events)} in one call, at most {self._limits.max_batch_events} "
                "(limits.max_batch_events)",
                field="events",
                limit=self._limits.max_batch_events,
            )

    def _sized(self, events: Sequence[Event | SidecarError]) -> Sequence[Event | SidecarError]:
        limit = self._limits.max_event_bytes
        # Only data can be this large: attributes and headers have bounds of their own.
        if all(type(e) is Event and (e.data is None or len(e.data) <= limit) for e in events):
            return events
        return [
            EventTooLarge(
                f"data: {len(e.data)} bytes, at most {limit} (limits.max_event_bytes)",
                field="data",
                limit=limit,
                size=len(e.data),
            )
            if isinstance(e, Event) and e.data is not None and len(e.data) > limit
            else e
            for e in events
        ]

    def _routed(
        self, topic: str, events: Sequence[Event | SidecarError], min_durability: int
    ) -> tuple[Sequence[_Group], dict[int, SidecarError]]:
        """The events by broker, and by place those that go nowhere. One broker's stay in order."""
        if _are_alike(events, any_type=self.routes.by_topic_only):
            try:
                route = self._route(topic, events[0].type, min_durability)
            except SidecarError as error:
                return (), dict.fromkeys(range(len(events)), error)
            return (_Group(route.broker, _label(route), events, range(len(events))),), {}
        places: dict[str, tuple[Route, list[int]]] = {}
        failed: dict[int, SidecarError] = {}
        for index, event in enumerate(events):
            if not isinstance(event, Event):
                failed[index] = event
                continue
            try:
                route = self._route(topic, event.type, min_durability)
            except SidecarError as error:
                failed[index] = error
            else:
                places.setdefault(route.broker, (route, []))[1].append(index)
        groups = [
            _Group(broker, _label(route), [cast("Event", events[i]) for i in indices], indices)
            for broker, (route, indices) in places.items()
        ]
        return groups, failed

    def _route(self, topic: str, event_type: str, min_durability: int) -> Route:
        """Raises NoRoute and NotSupported."""
        route = self.routes.route(topic, event_type)
        self._check_durability(route, min_durability)
        return route

    def _check_durability(self, route: Route, wanted: int) -> None:
        durability = self._brokers[route.broker].capabilities.durability
        if wanted > durability:
            raise NotSupported(
                f"broker {route.broker!r} gives durability {durability.name.lower()}, asked for "
                f"{Durability(wanted).name.lower()}",
                broker=route.broker,
            )

    async def _hand_over(
        self,
        topic: str,
        group: _Group,
        timeout: float,
        wait: float | None,
        broker_ids: Sequence[str] | None = None,
    ) -> Outcomes:
        loop = asyncio.get_running_loop()
        started = time.perf_counter()  # uvloop's own clock stands still within a turn
        count, size = len(group.events), sum(e.size for e in group.events)
        pending = self._pending[group.broker]
        self._started()
        entered = False
        try:
            if not pending.try_enter(count, size):
                await pending.enter(count, size, wait=wait)
            entered = True
            broker = self._brokers[group.broker]
            outcomes = broker.publish(topic, group.events, broker_ids=broker_ids)
        except BaseException:
            if entered:
                pending.leave(count, size)
            self._ended()
            raise
        answer: Outcomes = loop.create_future()
        timer = loop.call_later(timeout, outcomes.cancel) if not outcomes.done() else None

        def answered(done: Outcomes) -> None:
            if timer is not None:
                timer.cancel()
            pending.leave(count, size)
            self._ended()
            results = _results(done, group, timeout)
            types = [event.type for event in group.events]
            seconds = time.perf_counter() - started
            self._facts.published(Published(group.broker, group.label, types, results, seconds))
            if not answer.done():
                answer.set_result(results)

        outcomes.add_done_callback(answered)
        return answer

    # -- drain

    @property
    def under_way(self) -> int:
        """Batches that wait for room, or were handed to brokers and are not answered."""
        return self._under_way

    def _started(self) -> None:
        self._under_way += 1
        self._idle.clear()

    def _ended(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    async def flushed(self) -> None:
        """Wait until everything that was taken in is answered."""
        await self._idle.wait()


class _Group(NamedTuple):
    """The events of one call that go to one broker, and their places in the call."""

    broker: str
    label: str
    events: Sequence[Event]
    indices: Sequence[int]


class _Gathered:
    """The outcomes of one call from several brokers, put in their places."""

    def __init__(self, count: int) -> None:
        self._outcomes: list[Outcome | None] = [None] * count
        self._missing = count
        self.future: Outcomes = asyncio.get_running_loop().create_future()

    def put(self, indices: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        for index, outcome in zip(indices, outcomes, strict=True):
            self._outcomes[index] = outcome
        self._missing -= len(indices)
        if not self._missing and not self.future.done():
            self.future.set_result(self._outcomes)  # type: ignore[arg-type] # all are there

    def follow(self, indices: Sequence[int], part: Outcomes) -> None:
        part.add_done_callback(lambda done: self.put(indices, done.result()))


def _are_alike(
    events: Sequence[Event | SidecarError], *, any_type: bool
) -> TypeGuard[Sequence[Event]]:
    """All are events, and of one type where types matter: one look-up finds the way of all."""
    if not all(type(event) is Event for event in events):
        return False
    return any_type or len({cast("Event", event).type for event in events}) == 1


def _results(done: Outcomes, group: _Group, timeout: float) -> Sequence[Outcome]:
    """What a driver's future says; one that was cancelled or failed as a whole says it of each."""
    error: SidecarError
    if done.cancelled():
        error = OutcomeUnknown(
            f"broker {group.broker!r} did not answer within {timeout:g} s: the event may be stored. "
            "Publish it again with the same id",
            broker=group.broker,
        )
    elif (raised := done.exception()) is None:
        return done.result()
    elif isinstance(raised, SidecarError):
        error = raised
    else:
        log.error("broker %s: publishing failed", group.broker, exc_info=raised)
        error = Internal(f"broker {group.broker!r}: publishing failed", broker=group.broker)
    return [error] * len(group.events)


def _type(event: Event | SidecarError) -> str:
    return event.type if isinstance(event, Event) else ""


def _label(route: Route) -> str:
    """
    A route in metrics: its pattern, never the topic itself, which comes from outside.

    Of several routes to one broker, in one call, the first event's stands for all.
    """
    return route.topic or ""
