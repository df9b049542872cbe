"""All subscriptions of this sidecar, declared or described by apps, and settling by token."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sidecar import config
from sidecar.broker import Broker, Start
from sidecar.delivery.consumers import Delivery, PullConsumer
from sidecar.delivery.deadletters import DeadLetters
from sidecar.delivery.push.pusher import Pusher
from sidecar.delivery.subscription import Subscription, bad_token
from sidecar.errors import (
    ConfigInvalid,
    Draining,
    InvalidRequest,
    NotSupported,
    SidecarError,
    SubscriptionConflict,
    SubscriptionMissing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sidecar.event import Settlement
    from sidecar.publishing.publisher import Publisher
    from sidecar.telemetry.facts import Facts

MAX_DESCRIBED = 1000
"""Subscriptions that apps may have described at a time: their names come from outside."""
DESCRIBED_IDLE_SECONDS = 600.0
"""A described subscription that nobody used for so long is dropped."""
CROWDED_IDLE_SECONDS = 10.0
"""The same when there is no room for another one."""
SWEEP_SECONDS = 60.0
"""How often it is looked for those; what is used in between is marked then."""
LOOK_SECONDS = 0.1
"""The least that a pull waits: to subscribe, and ask the broker for what it has."""


class Hub:
    """
    Owns every Subscription: declared or described, found by name, run in one task group.

    A described one that nobody uses is dropped after DESCRIBED_IDLE_SECONDS: it has no consumer,
    nothing of it is out or held here, and it is not paused. What the broker keeps of it, as a
    durable consumer, stays there: described again, it goes on where it was. Tokens of a dropped
    one are over, and answer as BadToken.
    """

    def __init__(
        self,
        brokers: Mapping[str, Broker],
        publisher: Publisher,
        *,
        facts: Facts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*clock* tells seconds from any start; it says how long a subscription was unused."""
        self._brokers = brokers
        self._publisher = publisher
        self._facts = facts
        self._subscriptions: dict[str, Subscription] = {}
        self._clock = clock
        self._used: dict[str, float] = {}
        """When a described subscription was last seen in use."""
        self._running: dict[str, asyncio.Task[None]] = {}
        self._pushers: dict[str, Pusher] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self.draining = False

    def pusher(self, name: str) -> Pusher | None:
        """Of a subscription that has push."""
        return self._pushers.get(name)

    def all(self) -> Sequence[Subscription]:
        return list(self._subscriptions.values())

    # -- life

    async def run(self) -> None:
        """Run every subscription, and those that come; returns when drained."""
        async with asyncio.TaskGroup() as self._tasks:
            for subscription in self._subscriptions.values():
                self._start(subscription)
            self._drained = asyncio.get_running_loop().create_future()
            sweeping = self._tasks.create_task(self._keep_sweeping(), name="sweep subscriptions")
            await self._drained
            sweeping.cancel()

    def _start(self, subscription: Subscription) -> None:
        if self._tasks is not None:
            name = subscription.settings.name
            self._running[name] = self._tasks.create_task(
                subscription.run(), name=f"subscription {name}"
            )
            pusher = self._pushers.get(name)
            if pusher is not None:
                self._tasks.create_task(pusher.run(), name=f"push {name}")

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.sweep()

    def sweep(self) -> None:
        """Drop the described subscriptions that nobody used for DESCRIBED_IDLE_SECONDS."""
        self._drop_unused(DESCRIBED_IDLE_SECONDS)

    def _drop_unused(self, seconds: float) -> None:
        now = self._clock()
        for name, used in list(self._used.items()):
            if _in_use(self._subscriptions[name]):
                self._used[name] = now
            elif now - used >= seconds:
                self._forget(name)

    def _mark_used(self, name: str) -> None:
        if name in self._used:
            self._used[name] = self._clock()

    async def drain(self, seconds: float) -> int:
        """
        Stop handing over, wait for the apps to settle what is out, release the rest.

        Returns how many deliveries were out at the end of the time.
        """
        self.draining = True
        for subscription in self._subscriptions.values():
            subscription.drain()
        left = 0
        if self._running:
            _, late = await asyncio.wait(self._running.values(), timeout=seconds)
            left = sum(s.window.out for s in self._subscriptions.values())
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=3)
        for subscription in self._subscriptions.values():
            for consumer in list(subscription.consumers):
                consumer.closed(Draining("the sidecar is stopping"))
        for pusher in self._pushers.values():  # also those that are no consumer right now
            pusher.closed(Draining("the sidecar is stopping"))
        if self._tasks is not None and not self._drained.done():
            self._drained.set_result(None)
        return left

    # -- finding and making

    def declare(self, settings: config.Subscription) -> Subscription:
        """Add a subscription of the configuration."""
        return self._add(settings, declared=True)

    def get(self, name: str) -> Subscription:
        """Raises SubscriptionMissing."""
        subscription = self._subscriptions.get(name)
        if subscription is None:
            raise SubscriptionMissing(
                f"no subscription {config.shown(name)}: declare it in [[subscriptions]], or describe it when "
                "you open it",
                subscription=name[: config.MAX_NAME_LENGTH],
            )
        self._mark_used(name)
        return subscription

    def describe(self, described: dict[str, object]) -> Subscription:
        """
        The subscription that an app describes, in the keys of [[subscriptions]].

        Raises InvalidRequest for a bad description, SubscriptionConflict when one of that name is
        in use and differs.
        """
        try:
            settings = config.check_subscription(described)
        except ConfigInvalid as error:
            raise InvalidRequest(f"spec: {'; '.join(error.problems)}", field="spec") from error
        known = self._subscriptions.get(settings.name)
        if known is not None:
            if known.settings == settings:
                self._mark_used(settings.name)
                return known
            if known.declared or known.consumers or known.window.out:
                raise SubscriptionConflict(
                    f"subscription {settings.name!r} is in use with another description "
                    f"({_difference(known.settings, settings)}): use the same one, or another name",
                    subscription=settings.name,
                )
            self._forget(settings.name)
        if self.draining:
            raise Draining("the sidecar is stopping: open no new subscriptions")
        self._make_room()
        subscription = self._add(settings, declared=False)
        self._used[settings.name] = self._clock()
        self._start(subscription)
        return subscription

    def _make_room(self) -> None:
        """Raises InvalidRequest when there are as many as there may be, and none is out of use."""
        if len(self._used) >= MAX_DESCRIBED:
            self._drop_unused(CROWDED_IDLE_SECONDS)
        if len(self._used) >= MAX_DESCRIBED:
            raise InvalidRequest(
                f"apps have described {MAX_DESCRIBED} subscriptions, and all are in use, or were "
                f"within {CROWDED_IDLE_SECONDS:g} s: use fewer names, or declare them",
                field="spec",
            )

    def _forget(self, name: str) -> None:
        self._used.pop(name, None)
        # Who found it before, and attaches only now, is refused: it runs no more.
        self._subscriptions.pop(name).drain()
        task = self._running.pop(name, None)
        if task is not None:
            task.cancel()

    def _add(self, settings: config.Subscription, *, declared: bool) -> Subscription:
        name = settings.broker or self._publisher.routes.of_pattern(settings.topic).broker
        broker = self._brokers.get(name)
        if broker is None:
            raise InvalidRequest(
                f"no broker {config.shown(name)} (there are: {', '.join(self._brokers)})",
                field="broker",
            )
        start = Start(
            latest=settings.start == "latest", time_ns=config.start_time_ns(settings.start)
        )
        if start.time_ns is not None and not broker.capabilities.seeks:
            raise NotSupported(
                f"broker {name!r} keeps no events: a subscription cannot start at a time",
                subscription=settings.name,
            )
        subscription = Subscription(
            settings,
            broker,
            self._dead_letters(settings, broker),
            start=start,
            facts=self._facts,
            declared=declared,
        )
        self._subscriptions[settings.name] = subscription
        if settings.push is not None:
            self._pushers[settings.name] = Pusher(subscription, facts=self._facts)
        return subscription

    def _dead_letters(self, settings: config.Subscription, source: Broker) -> DeadLetters:
        name = settings.dead_letter.broker or source.name
        broker = self._brokers.get(name)
        if broker is None:
            raise InvalidRequest(
                f"no broker {config.shown(name)} (there are: {', '.join(self._brokers)})",
                field="dead_letter_broker",
            )
        if not broker.capabilities.dead_letters:
            raise NotSupported(
                f"broker {name!r} stores nothing, so it cannot keep the dead letters of "
                f"{settings.name!r}: name one that does as dead_letter.broker",
                subscription=settings.name,
                broker=name,
            )
        template = settings.dead_letter.topic
        if template and broker is source and config.comes_back(settings.topic, template):
            raise InvalidRequest(
                config.own_dead_letters(settings.topic, template), field="dead_letter_topic"
            )
        return DeadLetters(
            settings,
            self._publisher,
            source_broker=source.name,
            broker=name,
            topic=settings.dead_letter.topic or broker.dead_letter_topic,
        )

    # -- pull and settle

    async def pull(
        self, subscription: Subscription, max_events: int, wait: float
    ) -> Sequence[Delivery]:
        """
        Up to *max_events* deliveries, or none when nothing came within *wait* seconds.

        Raises Draining. However short the wait, what the broker has right now is looked for.
        """
        consumer = PullConsumer(max_events)
        subscription.attach(consumer)
        try:
            async with asyncio.timeout(max(wait, LOOK_SECONDS)):
                await consumer.over.wait()
        except TimeoutError:
            pass  # what was handed over at this very moment is in `taken` all the same
        except asyncio.CancelledError:
            # Handed over at the very moment the caller left: nobody has it, so nothing counts.
            subscription.detach(consumer, clean=True)
            raise
        finally:
            # What it got stays out until settled by token: only the waiting ends here.
            subscription.stopped_waiting(consumer)
            self._mark_used(subscription.settings.name)
        if consumer.why is not None:
            raise consumer.why
        return consumer.taken

    def settle(self, settlements: Sequence[Settlement]) -> list[tuple[str, SidecarError | None]]:
        """Settle deliveries of any subscription; one answer per settlement, in order."""
        results: list[tuple[str, SidecarError | None]] = []
        for settlement in settlements:
            name = settlement.token.partition(".")[0]
            subscription = self._subscriptions.get(name)
            if subscription is None:
                error: SidecarError | None = bad_token(settlement.token)
            else:
                error = subscription.settle([settlement])[0]
                self._mark_used(name)
            results.append((settlement.token, error))
        return results


def _in_use(subscription: Subscription) -> bool:
    """Somebody consumes, something is here, or somebody paused it, which is to last."""
    return bool(subscription.consumers or len(subscription.window) or subscription.paused)


def _difference(one: config.Subscription, other: config.Subscription) -> str:
    ours, theirs = one.model_dump(), other.model_dump()
    return ", ".join(key for key in ours if ours[key] != theirs[key])
