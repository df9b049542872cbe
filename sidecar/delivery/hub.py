"""All subscriptions of this sidecar, declared or described by apps, and settling by token."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sidecar import config
from sidecar.broker import Broker, Start
from sidecar.delivery.consumers import Delivery, PullConsumer
from sidecar.delivery.deadletters import DeadLetters
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
    from collections.abc import Mapping, Sequence

    from sidecar.event import Settlement
    from sidecar.publishing.publisher import Publisher
    from sidecar.telemetry.facts import Facts

MAX_DESCRIBED = 10_000
"""Subscriptions that apps may describe: their names come from outside."""
LOOK_SECONDS = 0.1
"""The least that a pull waits: to subscribe, and ask the broker for what it has."""


class Hub:
    """Owns every Subscription. Made by `open`, found by name, run in one task group."""

    def __init__(
        self, brokers: Mapping[str, Broker], publisher: Publisher, *, facts: Facts
    ) -> None:
        self._brokers = brokers
        self._publisher = publisher
        self._facts = facts
        self._subscriptions: dict[str, Subscription] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self.draining = False

    def all(self) -> Sequence[Subscription]:
        return list(self._subscriptions.values())

    # -- life

    async def run(self) -> None:
        """Run every subscription, and those that come; returns when drained."""
        async with asyncio.TaskGroup() as self._tasks:
            for subscription in self._subscriptions.values():
                self._start(subscription)
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def _start(self, subscription: Subscription) -> None:
        if self._tasks is not None:
            name = subscription.settings.name
            self._running[name] = self._tasks.create_task(
                subscription.run(), name=f"subscription {name}"
            )

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
        if len(self._subscriptions) >= MAX_DESCRIBED:
            raise InvalidRequest(f"more than {MAX_DESCRIBED} subscriptions: use fewer names")
        subscription = self._add(settings, declared=False)
        self._start(subscription)
        return subscription

    def _forget(self, name: str) -> None:
        del self._subscriptions[name]
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
            results.append((settlement.token, error))
        return results


def _difference(one: config.Subscription, other: config.Subscription) -> str:
    ours, theirs = one.model_dump(), other.model_dump()
    return ", ".join(key for key in ours if ours[key] != theirs[key])
