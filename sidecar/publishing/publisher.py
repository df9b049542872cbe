"""The life of a publish: route, wait for room, hand to the broker, gather the outcomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sidecar.errors import (
    Draining,
    EventTooLarge,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    SidecarError,
)
from sidecar.event import Durability, Event, Outcome, check_topic
from sidecar.publishing.pending import Pending
from sidecar.telemetry.facts import Facts, Published

if TYPE_CHECKING:
    from sidecar.broker import Broker
    from sidecar.config import Limits, Publishing, Route
    from sidecar.publishing.routes import Routes

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
        facts: Facts,
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
        good = self._sized(events)
        groups = self._routed(topic, good, min_durability)
        if len(groups) == 1 and groups[0].indices is None:
            return await self._hand_over(topic, groups[0], timeout, wait)
        gathered = _Gathered(good)
        for group in groups:
            assert group.indices is not None
            try:
                part = await self._hand_over(topic, group, timeout, wait)
            except SidecarError as error:
                gathered.put(group.indices, [error] * len(group.events))
            else:
                gathered.follow(group.indices, part)
        return gathered.future

    async def publish_to(
        self, broker: str, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str]
    ) -> Sequence[Outcome]:
        """For the sidecar's own (dead letters): past the routes, under other broker ids."""
        group = _Group(broker, topic, events, None)
        timeout = self._settings.timeout_seconds
        return await (await self._hand_over(topic, group, timeout, None, broker_ids))

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
    ) -> list[_Group]:
        """The events by broker; one group without indices where all are good and go one way."""
        routes = self.routes
        first = events[0]
        good = all(type(e) is Event for e in events)
        if (
            good
            and isinstance(first, Event)
            and (
                routes.by_topic_only or all(e.type == first.type for e in events)  # type: ignore[union-attr]
            )
        ):
            try:
                route = routes.route(topic, first.type)
                self._check_durability(route, min_durability)
            except SidecarError as error:
                return [_Group.failed([error] * len(events))]
            return [_Group(route.broker, _label(route), events, None)]  # type: ignore[arg-type]
        by_route: dict[int, _Group] = {}
        failed = _Group.failed([])
        assert failed.indices is not None
        for index, event in enumerate(events):
            try:
                if not isinstance(event, Event):
                    raise event
                route = routes.route(topic, event.type)
                self._check_durability(route, min_durability)
            except SidecarError as error:
                failed.indices.append(index)
                failed.errors.append(error)
                continue
            group = by_route.setdefault(id(route), _Group(route.broker, _label(route), [], []))
            assert group.indices is not None
            group.events.append(event)  # type: ignore[attr-defined]
            group.indices.append(index)
        groups = list(by_route.values())
        return [*groups, failed] if failed.errors else groups

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
        if group.errors:
            failed: Outcomes = loop.create_future()
            failed.set_result(group.errors)
            self._facts.published(Published("", "", group.errors, 0.0))
            return failed
        count, size = len(group.events), sum(e.size for e in group.events)
        pending = self._pending[group.broker]
        if not pending.try_enter(count, size):
            await pending.enter(count, size, wait=wait)
        self._started()
        outcomes = self._brokers[group.broker].publish(topic, group.events, broker_ids=broker_ids)
        answer: Outcomes = loop.create_future()
        timer = loop.call_later(timeout, outcomes.cancel) if not outcomes.done() else None

        def answered(done: Outcomes) -> None:
            if timer is not None:
                timer.cancel()
            pending.leave(count, size)
            self._ended()
            results = self._unknown(group, timeout) if done.cancelled() else done.result()
            self._facts.published(
                Published(group.broker, group.label, results, time.perf_counter() - started)
            )
            if not answer.done():
                answer.set_result(results)

        outcomes.add_done_callback(answered)
        return answer

    def _unknown(self, group: _Group, timeout: float) -> Sequence[Outcome]:
        error = OutcomeUnknown(
            f"broker {group.broker!r} did not answer within {timeout:g} s: the event may be stored. "
            "Publish it again with the same id",
            broker=group.broker,
        )
        return [error] * len(group.events)

    # -- drain

    @property
    def under_way(self) -> int:
        """Batches handed to brokers and not answered."""
        return self._under_way

    def _started(self) -> None:
        self._under_way += 1
        self._idle.clear()

    def _ended(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    async def flushed(self) -> None:
        """Wait until everything that was handed over is answered."""
        await self._idle.wait()


class _Group:
    """The events of one call that go to one broker, and their places in the call."""

    __slots__ = ("broker", "errors", "events", "indices", "label")

    def __init__(
        self, broker: str, label: str, events: Sequence[Event], indices: list[int] | None
    ) -> None:
        self.broker = broker
        self.label = label
        self.events = events
        self.indices = indices
        self.errors: list[Outcome] = []

    @classmethod
    def failed(cls, errors: list[SidecarError]) -> _Group:
        group = cls("", "", [], None if errors else [])
        group.errors = list(errors)
        return group


class _Gathered:
    """The outcomes of one call from several brokers, put in their places."""

    def __init__(self, events: Sequence[Event | SidecarError]) -> None:
        self._outcomes: list[Outcome | None] = [None] * len(events)
        self._missing = len(events)
        self.future: Outcomes = asyncio.get_running_loop().create_future()

    def put(self, indices: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        for index, outcome in zip(indices, outcomes, strict=True):
            self._outcomes[index] = outcome
        self._missing -= len(indices)
        if not self._missing and not self.future.done():
            self.future.set_result(self._outcomes)  # type: ignore[arg-type] # all are there

    def follow(self, indices: Sequence[int], part: Outcomes) -> None:
        part.add_done_callback(lambda done: self.put(indices, done.result()))


def _label(route: Route) -> str:
    """A route in metrics: its pattern, never the topic itself, which comes from outside."""
    return route.topic or ""
