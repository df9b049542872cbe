"""One subscription at work: a thin shell around Window that fetches, hands over and settles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from typing import TYPE_CHECKING

from sidecar.broker import MAX_CRASHES, Broker, Failures, Incoming, Interest, Source, Start
from sidecar.delivery.burials import Burials
from sidecar.delivery.consumers import Consumer, Delivery, PullConsumer
from sidecar.delivery.deadletters import PREFIX
from sidecar.delivery.duplicates import Duplicates
from sidecar.delivery.filters import wanted
from sidecar.delivery.held import Held, State, handles
from sidecar.delivery.parting import WITH_THE_APP, Partings
from sidecar.delivery.retry import Failure, GiveUp, RetryPolicy, used_up
from sidecar.delivery.watchdog import Watchdog
from sidecar.delivery.window import Window
from sidecar.errors import (
    AlreadySettled,
    BadToken,
    BrokerUnavailable,
    Draining,
    LeaseExpired,
    SidecarError,
    SourceLost,
)
from sidecar.event import Settlement, Verdict
from sidecar.telemetry.facts import Facts, Reestablished, Settled, Skipped
from sidecar.wire.timestamps import now_ns, parse_rfc3339

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    from sidecar.config import Subscription as Settings
    from sidecar.delivery.deadletters import DeadLetters
    from sidecar.event import Event

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 5.0)
"""Pause before subscribing again: at first, and at most."""
AWAY_SECONDS = 0.5
LOOK_SECONDS = 1.0
"""How often it is looked whether nobody consumes any more."""
SUBSCRIBE_SECONDS = 60.0
"""A broker that does not answer a new subscription for so long is asked again."""


class Subscription:
    """
    The part of a subscription that this sidecar has: its window, its consumers, its source.

    Everything but `run` and `seek` is synchronous: what happened goes into the window, and what
    follows from it (dispatching, acks to the broker) is done once per turn of the loop.

    Non-obvious: events are fetched only while somebody consumes. A sidecar whose app is away
    would otherwise keep up to max_in_flight events from the other replicas.
    """

    def __init__(
        self,
        settings: Settings,
        broker: Broker,
        dead_letters: DeadLetters,
        *,
        start: Start,
        facts: Facts,
        declared: bool,
    ) -> None:
        self.settings = settings
        self.broker = broker
        self.declared = declared
        self.paused = False
        self.interest = Interest(
            settings.name,
            settings.topic,
            settings.max_in_flight,
            start,
            max_in_flight_bytes=settings.max_in_flight_bytes,
            ordered=settings.ordering == "key",
        )
        self.token_prefix = f"{settings.name}.{secrets.token_hex(4)}."
        self.window = Window(
            ordered=settings.ordering != "none",
            max_in_flight=settings.max_in_flight,
            token_prefix=self.token_prefix,
            max_bytes=settings.max_in_flight_bytes,
            distinct=settings.duplicate_window_seconds > 0,
            suspect_from=max(1, settings.retry.max_crashes - 1),
        )
        self.consumers: list[Consumer] = []
        self.reestablished = 0
        """How often the watchdog subscribed anew."""
        self._at_most: dict[Consumer, int] = {}
        self._facts = facts
        self._wants = wanted(settings.event_types, settings.filters)
        self._policy = RetryPolicy(settings.retry, random.Random())
        self._duplicates = (
            Duplicates(settings.duplicate_window_seconds)
            if settings.duplicate_window_seconds
            else None
        )
        self._why_not = "not subscribed yet"
        self._source: Source | None = None
        self._acks: list[Held] = []
        self._dispatch_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._wake = asyncio.Event()
        self._next_consumer = 0
        self._partings = Partings(self.window)
        self._tasks: asyncio.TaskGroup | None = None
        self._last_used = 0.0
        self._arrivals = 0
        self._asking = False
        self._stop = asyncio.Event()
        self._burials = Burials(settings.name, dead_letters, facts=facts, stop=self._stop)

    @property
    def draining(self) -> bool:
        return self._stop.is_set()

    @property
    def detail(self) -> str:
        """Why it is not subscribed, or what stands still; empty when all is well."""
        return self._why_not or self._burials.problem

    @property
    def subscribed(self) -> bool:
        """At the broker, or not wanting to be as nobody consumes."""
        return not self._why_not

    @property
    def standby(self) -> bool:
        """Another sidecar has the events; this one takes over when that leaves."""
        return self._source is not None and self._source.standby

    # -- life

    async def run(self) -> None:
        """Subscribe, feed the window while somebody consumes, and subscribe again when it ends."""
        pause = RETRY_SECONDS[0]
        known = not (self.declared and self.broker.capabilities.redelivers)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while not self.draining:
                    if known and not await self._somebody():
                        break
                    try:
                        source = await self._subscribe()
                    except SidecarError as error:
                        self._not_subscribed(error)
                        await self._sleep(pause)
                        # To ask a broker that is away costs nothing, and it may be back any time.
                        away = isinstance(error, BrokerUnavailable)
                        pause = min(pause * 2, AWAY_SECONDS if away else RETRY_SECONDS[1])
                        continue
                    pause, known = RETRY_SECONDS[0], True
                    lost = await self._serve(source)
                    if lost is not None:
                        self._not_subscribed(lost)
                        await self._sleep(pause)
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _subscribe(self) -> Source:
        try:
            async with asyncio.timeout(SUBSCRIBE_SECONDS):
                return await self.broker.subscribe(self.interest)
        except TimeoutError:
            raise BrokerUnavailable(
                f"broker {self.broker.name!r} did not answer the subscription in "
                f"{SUBSCRIBE_SECONDS:g} s",
                broker=self.broker.name,
            ) from None

    def _not_subscribed(self, error: SidecarError) -> None:
        if self._why_not != error.message:
            log.warning("subscription %s: %s", self.settings.name, error.message)
            self._why_not = error.message
        if not error.retryable:
            # It may come right by itself (a topic is made), but the app should know that it waits.
            for consumer in list(self.consumers):
                consumer.closed(error)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not into a drain."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    async def _somebody(self) -> bool:
        """Wait until somebody consumes; False when the drain came first."""
        if not self._consumed:
            self._why_not = ""
        while not self._consumed:
            if self.draining:
                return False
            self._wake.clear()
            await self._wake.wait()
        return True

    async def _serve(self, source: Source) -> SidecarError | None:
        """Work with *source* until nobody consumes, it is lost (the error), or we drain."""
        self._source = source
        source.on_leaving = self._leaving
        source.on_revoked = self._revoked
        self._why_not = ""
        lost: SidecarError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                hold = tasks.create_task(self._hold(source))
                lost = await self._work(source)
                if lost is not None:
                    self._void()
                else:
                    await source.stop(self._taken_back(but=WITH_THE_APP))
                    if self.draining:
                        await self._settled()
                hold.cancel()
        finally:
            # Also when the drain's time is up, which cancels us: what is left goes back now.
            self._flush_acks()
            source.release(self._taken_back())
            self.window.forget_acked()
            self._source = None
            await source.close()
        return lost

    async def _work(self, source: Source) -> SidecarError | None:
        while True:
            async with asyncio.TaskGroup() as tasks:
                feed = tasks.create_task(self._feed(source))
                quiet = tasks.create_task(self._quiet(source.rest_seconds))
                stuck = tasks.create_task(self._stuck(source))
                await asyncio.wait([feed, quiet, stuck], return_when=asyncio.FIRST_COMPLETED)
                is_stuck = stuck.done()
                for task in (feed, quiet, stuck):
                    task.cancel()
            if feed.done() and not feed.cancelled():
                return feed.result()
            if is_stuck:
                return None
            if await self._may_rest():
                return None

    async def _feed(self, source: Source) -> SidecarError:
        """Fetch while there is room; returns why that ended."""
        few = max(1, self.settings.max_in_flight // 8)
        while True:
            room = self.window.room
            nothing_to_do = not self.window.out and not self.window.has_ready
            if not self._consumed or not (room >= few or (room and nothing_to_do)):
                self._wake.clear()
                await self._wake.wait()
                continue
            self._asking = True
            try:
                batch = await source.fetch(room)
            except SidecarError as error:
                return error
            finally:
                self._asking = False
            self._arrivals += len(batch)
            self._arrived(source, batch)

    def _arrived(self, source: Source, batch: Sequence[Incoming]) -> None:
        unwanted = []
        filtered = 0
        for incoming in batch:
            event, identity = incoming.event, incoming.identity
            if identity is not None and self.window.was_acked(identity):
                unwanted.append(incoming.handle)
                continue
            if event is not None and self._is_not_for_us(event):
                unwanted.append(incoming.handle)
                filtered += 1
                continue
            held = self.window.arrived(incoming)
            if held is None:
                continue
            if event is None:
                self._store_soon(held, "undecodable", incoming.problem)
            elif event.extensions and "expirytime" in event.extensions:
                held.expires = _time_of(event.extensions["expirytime"])
        if unwanted:
            source.ack(unwanted)
        if filtered:
            self._facts.skipped(Skipped(self.settings.name, "filtered", filtered))
        self._dispatch_soon()

    def _is_not_for_us(self, event: Event) -> bool:
        """Nobody asked for it, or it is our own dead letter (the topic may be ">")."""
        if event.headers and event.headers.get(f"{PREFIX}subscription") == self.settings.name:
            return True
        return self._wants is not None and not self._wants(event)

    @property
    def _consumed(self) -> bool:
        return bool(self.consumers) and not self.paused

    async def _quiet(self, seconds: float) -> None:
        """
        Return when nobody has consumed for so long and nothing is out, or when we drain.

        What is held goes back to the broker then, for another sidecar.
        """
        clock = asyncio.get_running_loop().time
        while not self._stop.is_set():
            wait = min(seconds, LOOK_SECONDS)
            if not self._consumed and not self.window.out:
                wait = self._last_used + seconds - clock()
                if wait <= 0:
                    return
            await self._sleep(wait)

    async def _stuck(self, source: Source) -> None:
        """Return when the broker has events for us, and gives us none."""
        if not self.settings.watchdog_seconds:
            await asyncio.get_running_loop().create_future()
        watchdog = Watchdog(self.settings.watchdog_seconds)
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(watchdog.look_seconds)
            if not watchdog.should_look(asking=self._asking, arrived=self._arrivals):
                continue
            try:
                due = await source.due()
            except SidecarError:
                due = None
            if watchdog.is_stuck(due, arrived=self._arrivals, now=clock()):
                log.warning(
                    "subscription %s: %s events are at the broker and none came for %g s: "
                    "subscribing anew",
                    self.settings.name,
                    due,
                    self.settings.watchdog_seconds,
                )
                self.reestablished += 1
                self._facts.reestablished(Reestablished(self.settings.name))
                return

    async def _may_rest(self) -> bool:
        """
        Wait for dead letters that are being stored; False when somebody consumes before.

        What is neither stored nor out goes back to the broker then, for another sidecar. It may
        not stay with a source that nothing is fetched from: that would take more, for nobody.
        """
        while self._burials.under_way and not self._consumed and not self._stop.is_set():
            self._wake.clear()
            await self._wake.wait()
        return self._stop.is_set() or not self._consumed

    async def _hold(self, source: Source) -> None:
        """Keep the broker's claim on what is here, handed over or not."""
        interval = source.hold_seconds
        if interval is None:
            return
        arrivals = self.window.arrivals
        while True:
            await asyncio.sleep(interval)
            # What came since the last time is held by having been fetched.
            source.hold(handles(self.window.held(arrivals)))
            arrivals = self.window.arrivals

    async def _settled(self) -> None:
        """While draining: until what is out is settled, and buried where that was its end."""
        while self.window.out or self._burials.under_way:
            self._wake.clear()
            await self._wake.wait()

    def _taken_back(self, *, but: Collection[State] = ()) -> Sequence[Hashable]:
        """What goes back to the broker, in its order; none of it is counted as failed."""
        out = self.window.out
        given = handles(self.window.give_back(but=but))
        if out > self.window.out:
            self._facts.settled(Settled(self.settings.name, "released", out - self.window.out))
        return given

    def _void(self) -> None:
        """The source is gone: handles mean nothing any more, and what was out will come again."""
        self._acks.clear()
        self.window.clear()
        if self._duplicates is not None:
            self._duplicates.forget()

    def _leaving(self, identities: Sequence[Hashable]) -> asyncio.Future[None] | None:
        """Another sidecar is to have these: the app may settle what it has of them, for a moment."""
        parted = self._partings.begin(identities)
        self._wake.set()
        self._dispatch_soon()
        return parted

    def _revoked(self, identities: Sequence[Hashable]) -> None:
        """Another sidecar has these now; what the app still does with them does not count."""
        self.window.revoke(identities)
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()
        self._dispatch_soon()

    def drain(self) -> None:
        """Fetch and hand over no more. `run` ends when what is out is settled; cancel it in time."""
        self._stop.set()
        self._wake.set()
        for consumer in list(self.consumers):
            if isinstance(consumer, PullConsumer):  # a stream stays open, to settle
                consumer.closed(Draining("the sidecar is stopping: pull from another, or again"))

    # -- consumers

    def attach(self, consumer: Consumer, *, at_most: int | None = None) -> None:
        """
        *at_most*: so many of its deliveries may be unsettled, and its credit follows from that.

        Raises Draining.
        """
        if self.draining:
            raise Draining("the sidecar is stopping: open no new consumers")
        self.consumers.append(consumer)
        if at_most is not None:
            self._at_most[consumer] = at_most
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()
        self._dispatch_soon()

    def detach(self, consumer: Consumer, *, clean: bool) -> None:
        """
        A consumer left. *clean*: it said so, and what it did not settle is uncounted.

        Otherwise it crashed, and those deliveries count. Either way they are ready again at once.
        """
        if consumer in self.consumers:
            self.consumers.remove(consumer)
        self._at_most.pop(consumer, None)
        left = self.window.out_to(consumer)
        if clean or self.draining:
            for held in reversed(left):
                self.window.back(held)
            if left:
                self._facts.settled(Settled(self.settings.name, "released", len(left)))
        else:
            for held in left:
                self._fail(held, Failure("app_crash", "the consumer's stream broke", 0.0))
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()
        self._dispatch_soon()

    def stopped_waiting(self, consumer: Consumer) -> None:
        """A pull is over: it takes no more, and what it took stays out until settled by token."""
        if consumer in self.consumers:
            self.consumers.remove(consumer)
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()

    def credit(self, consumer: Consumer, more: int) -> None:
        consumer.credit += more
        self._dispatch_soon()

    def written(self, consumer: Consumer) -> None:
        """A consumer that took no more takes more again."""
        self._dispatch_soon()

    def _dispatch_soon(self) -> None:
        if not self._dispatch_due:
            self._dispatch_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Hand over what is ready, shared among the consumers that have credit."""
        self._dispatch_due = False
        if self._acks:
            self._flush_acks()
        if self._partings:
            self._partings.look()
        if self.paused or self.draining:
            return
        window = self.window
        now = asyncio.get_running_loop().time()
        lease_end = now + self.settings.lease_seconds
        if self._at_most:
            self._renew_credit()
        hungry = [c for c in self.consumers if c.credit > 0 and c.takes_more]
        while window.has_ready and hungry:
            share = -(-window.ready // len(hungry))
            self._next_consumer = first = (self._next_consumer + 1) % len(hungry)
            for consumer in (*hungry[first:], *hungry[:first]):
                taken = window.take(
                    min(consumer.credit, consumer.max_batch, share), consumer, lease_end
                )
                deliveries = [
                    _delivery(held)
                    for held in taken
                    if (held.attempt == 1 and not held.expires and not self._duplicates)
                    or self._is_to_be_handed(held)
                ]
                if deliveries:
                    consumer.credit -= len(deliveries)
                    consumer.deliver(deliveries)
            # A pull takes one batch, so it has no credit left, whatever it got.
            hungry = [c for c in hungry if c.credit > 0 and c.takes_more]
        self._arm()
        if window.room:
            self._wake.set()

    def _renew_credit(self) -> None:
        """However a delivery ended, it frees one."""
        out = self.window.out_by_consumer()
        for consumer, most in self._at_most.items():
            consumer.credit = most - out[consumer]

    def _is_to_be_handed(self, held: Held) -> bool:
        """The last look before the app gets it; false: it was dealt with in another way."""
        if used_up(held.attempt - 1, self.settings.retry):
            held.attempt -= 1
            self._bury(held, "attempts_exhausted", "its dead letter was not stored the first time")
            return False
        event = held.incoming.event
        assert event is not None  # what is none is not ready
        if held.expires and now_ns() >= held.expires:
            held.attempt -= 1
            if self.settings.expired == "drop":
                self._skip(held, "expired")
            else:
                when = event.extensions["expirytime"]
                self._bury(held, "expired", f"its expirytime, {when}, has passed")
            return False
        if self._duplicates is not None and self._duplicates.has(event, self._now()):
            self._skip(held, "duplicate")
            return False
        return True

    def _skip(self, held: Held, why: str) -> None:
        self._ack(held)
        self._facts.skipped(Skipped(self.settings.name, why))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _arm(self) -> None:
        """One timer, for the earliest lease or retry."""
        due = self.window.next_time()
        if due is None:
            return
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        # Non-obvious: uvloop's handle does not tell its time when that has passed already.
        self._timer_due = due
        self._timer = asyncio.get_running_loop().call_at(due, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        # Timers may fire a moment early: the loop's clock is coarser than its time().
        for held in self.window.due(asyncio.get_running_loop().time() + 0.001):
            self._facts.settled(Settled(self.settings.name, "expired"))
            self._fail(held, Failure("lease_expired", "the lease ended unsettled"))
        self._arm()
        self._wake.set()
        self._dispatch_soon()

    # -- settling

    def settle(self, settlements: Sequence[Settlement]) -> list[SidecarError | None]:
        """What became of each settlement, in order: None when it counted."""
        results: list[SidecarError | None] = []
        acked = 0
        for settlement in settlements:
            held = self.window.find(settlement.token)
            if held is None:
                results.append(self._not_out(settlement.token))
            elif settlement.verdict is Verdict.ACK:
                if self._duplicates is not None and held.incoming.event is not None:
                    self._duplicates.acked(held.incoming.event, self._now())
                self._ack(held)
                acked += 1
                results.append(None)
            else:
                self._other(held, settlement)
                results.append(None)
        if acked:
            self._facts.settled(Settled(self.settings.name, "ack", acked))
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()
        self._dispatch_soon()
        return results

    def _ack(self, held: Held) -> None:
        self.window.done(held)
        self._acks.append(held)

    def _other(self, held: Held, settlement: Settlement) -> None:
        name = self.settings.name
        if settlement.verdict is Verdict.EXTEND:
            lease = self.settings.lease_seconds if settlement.delay is None else settlement.delay
            self.window.extend(held, asyncio.get_running_loop().time() + lease)
            self._arm()
        elif settlement.verdict is Verdict.REJECT:
            self._facts.settled(Settled(name, "reject"))
            self._bury(held, "rejected", settlement.reason)
        else:
            self._facts.settled(Settled(name, "nack"))
            failure = Failure(
                "attempts_exhausted", settlement.reason, settlement.delay, settlement.uncounted
            )
            self._fail(held, failure)

    def hand_back(self, tokens: Sequence[str]) -> None:
        """These did not reach the app: first in line again, and nothing is counted."""
        held = [h for token in tokens if (h := self.window.find(token)) is not None]
        for one in reversed(held):
            self.window.back(one)
        if held:
            self._facts.settled(Settled(self.settings.name, "released", len(held)))
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()
        self._dispatch_soon()

    def crashed(self, tokens: Sequence[str], error: str) -> None:
        """The app crashed with these in its hands: that counts, and too often is a dead letter."""
        for token in tokens:
            held = self.window.find(token)
            if held is not None:
                self._fail(held, Failure("app_crash", error, 0.0))
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()
        self._dispatch_soon()

    def _not_out(self, token: str) -> SidecarError:
        if not self.window.has_given(token):
            return bad_token(token)
        if self.window.has_expired(token):
            return LeaseExpired(
                "too late: the lease ended and the event is on its way again; extend in time, or "
                "raise lease_seconds",
                subscription=self.settings.name,
                token=token,
            )
        return AlreadySettled(
            "the delivery is over: it was settled before, handed back, or the subscription was moved",
            subscription=self.settings.name,
            token=token,
        )

    def _flush_acks(self) -> None:
        acks, self._acks = self._acks, []
        if acks and self._source is not None:
            self._source.ack(handles(acks))

    def _fail(self, held: Held, failure: Failure) -> None:
        """A delivery failed: try again, or give up, as the policy says."""
        now = now_ns()
        if not held.first_failed:
            held.first_failed = now
        if failure.reason == "app_crash":
            self.window.crashed(held)
        answer = self._policy.after(failure, held, now)
        recorded = None
        if self._source is not None and (isinstance(answer, GiveUp) or not answer.uncounted):
            failures = Failures(held.attempt, min(held.crashes, MAX_CRASHES), held.first_failed)
            recorded = self._source.failed(held.incoming.handle, failures)
        if isinstance(answer, GiveUp):
            self._bury(held, answer.reason, failure.error)
            return
        known = recorded is None or recorded.done()
        self.window.retry(
            held, self._now() + answer.delay, uncounted=answer.uncounted, recorded=known
        )
        if recorded is not None and not known:
            recorded.add_done_callback(lambda _: self._recorded(held))
        self._arm()

    def _recorded(self, held: Held) -> None:
        self.window.recorded(held)
        self._arm()

    def _bury(self, held: Held, reason: str, error: str) -> None:
        self.window.bury(held)
        self._store_soon(held, reason, error)

    def _store_soon(self, held: Held, reason: str, error: str) -> None:
        assert self._tasks is not None  # deliveries exist only while run() does
        self._tasks.create_task(self._store_dead_letter(held, reason, error))

    async def _store_dead_letter(self, held: Held, reason: str, error: str) -> None:
        try:
            stored = await self._burials.bury(
                held, reason, error, is_held=lambda: self.window.holds(held)
            )
        finally:
            self._wake.set()
        if stored and self.window.holds(held):
            self._ack(held)
            self._dispatch_soon()

    # -- operators

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self._wake.set()
        self._dispatch_soon()

    async def seek(self, to: Start) -> None:
        """Move it, for all who share it. Raises what Broker.seek raises."""
        await self.broker.seek(self.interest, to)
        # Its source ends by itself, but not before the next fetch, which a full window puts off.
        self._acks.clear()
        held = self.window.clear()
        if self._duplicates is not None:
            self._duplicates.forget()
        if self._source is not None:
            self._source.release(handles(held))
        self._last_used = asyncio.get_running_loop().time()
        self._wake.set()

    async def lag(self) -> int | None:
        if self._source is None:
            return None
        try:
            return await self._source.lag()
        except (BrokerUnavailable, SourceLost):
            return None

    async def lag_by_partition(self) -> Mapping[tuple[str, int], int]:
        """By topic and partition; empty where the broker has none, or it is not known."""
        if self._source is None:
            return {}
        try:
            return await self._source.lag_by_partition()
        except (BrokerUnavailable, SourceLost):
            return {}

    @property
    def dropped(self) -> int:
        return self._source.dropped if self._source is not None else 0


def _delivery(held: Held) -> Delivery:
    incoming = held.incoming
    event = incoming.event
    assert event is not None
    return Delivery(held.token, event, incoming.topic, held.attempt, incoming.position)


def _time_of(text: str) -> int:
    """In ns since 1970; 0 for what is no time: the event does not expire then."""
    try:
        return max(1, parse_rfc3339(text))
    except ValueError:
        return 0


def bad_token(token: str) -> BadToken:
    return BadToken(
        "not the token of a delivery by this sidecar, or of one before its restart",
        token=token[:100],
    )
