"""One subscription at work: a thin shell around Window that fetches, hands over and settles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from typing import TYPE_CHECKING

from sidecar.broker import Broker, Failures, Incoming, Interest, Source, Start
from sidecar.delivery.consumers import Consumer, Delivery, PullConsumer
from sidecar.delivery.deadletters import PREFIX
from sidecar.delivery.retry import delay_before, used_up
from sidecar.delivery.window import Held, State, Window, handles
from sidecar.errors import (
    AlreadySettled,
    BadToken,
    BrokerUnavailable,
    Draining,
    LeaseExpired,
    SidecarError,
    SourceLost,
)
from sidecar.event import Settlement, Verdict, pattern_matcher
from sidecar.telemetry.facts import DeadLettered, Facts, Settled
from sidecar.wire.timestamps import now_ns

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    from sidecar.config import Subscription as Settings
    from sidecar.delivery.deadletters import DeadLetters

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 5.0)
"""Pause before subscribing again: at first, and at most."""
AWAY_SECONDS = 0.5
LOOK_SECONDS = 1.0
"""How often it is looked whether nobody consumes any more."""
LOG_SECONDS = 10.0
"""Dead letters are logged this often, with their number."""
PARTING_SECONDS = 3.0
"""So long a partition that is to be another sidecar's waits for the app to settle what it has."""
WITH_THE_APP = frozenset({State.OUT, State.LEAVING})


class Parting:
    """Events that are to be another sidecar's, and that the app has."""

    def __init__(self, staying: Sequence[Held], done: asyncio.Future[None]) -> None:
        self.staying = staying
        self.done = done

    def over(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


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
        )
        self.consumers: list[Consumer] = []
        self._dead_letters = dead_letters
        self._facts = facts
        self._types = [pattern_matcher(pattern) for pattern in settings.event_types]
        self._spread = random.Random()
        self._why_not = "not subscribed yet"
        self._unstored = ""
        self._source: Source | None = None
        self._acks: list[Held] = []
        self._dispatch_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._wake = asyncio.Event()
        self._next_consumer = 0
        self._partings: list[Parting] = []
        self._tasks: asyncio.TaskGroup | None = None
        self._storing = 0
        self._unlogged = 0
        self._last_logged = -LOG_SECONDS
        self._last_used = 0.0
        self._stop = asyncio.Event()

    @property
    def draining(self) -> bool:
        return self._stop.is_set()

    @property
    def detail(self) -> str:
        """Why it is not subscribed, or what stands still; empty when all is well."""
        return self._why_not or self._unstored

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
                        source = await self.broker.subscribe(self.interest)
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
                await asyncio.wait([feed, quiet], return_when=asyncio.FIRST_COMPLETED)
                feed.cancel()
                quiet.cancel()
            if feed.done() and not feed.cancelled():
                return feed.result()
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
            try:
                batch = await source.fetch(room)
            except SidecarError as error:
                return error
            self._arrived(source, batch)

    def _arrived(self, source: Source, batch: Sequence[Incoming]) -> None:
        unwanted = []
        for incoming in batch:
            if self._is_unwanted(incoming):
                unwanted.append(incoming.handle)
                continue
            held = self.window.arrived(incoming)
            if held is not None and incoming.event is None:
                self._store_soon(held, "undecodable", incoming.problem)
        if unwanted:
            source.ack(unwanted)
        self._dispatch_soon()

    def _is_unwanted(self, incoming: Incoming) -> bool:
        """Acked before, of a type nobody asked for, or our own dead letter (the topic may be ">")."""
        if incoming.identity is not None and self.window.was_acked(incoming.identity):
            return True
        event = incoming.event
        if event is None:
            return False
        if event.headers and event.headers.get(f"{PREFIX}subscription") == self.settings.name:
            return True
        return bool(self._types) and not any(t.fullmatch(event.type) for t in self._types)

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

    async def _may_rest(self) -> bool:
        """
        Wait for dead letters that are being stored; False when somebody consumes before.

        What is neither stored nor out goes back to the broker then, for another sidecar. It may
        not stay with a source that nothing is fetched from: that would take more, for nobody.
        """
        while self._storing and not self._consumed and not self._stop.is_set():
            self._wake.clear()
            await self._wake.wait()
        return self._stop.is_set() or not self._consumed

    async def _hold(self, source: Source) -> None:
        """Keep the broker's claim on what is here, handed over or not."""
        interval = source.hold_seconds
        if interval is None:
            return
        while True:
            await asyncio.sleep(interval)
            source.hold(handles(self.window.held()))

    async def _settled(self) -> None:
        """While draining: until what is out is settled, and buried where that was its end."""
        while self.window.out or self._storing:
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

    def _leaving(self, identities: Sequence[Hashable]) -> asyncio.Future[None] | None:
        """Another sidecar is to have these: the app may settle what it has of them, for a moment."""
        staying = self.window.revoke(identities, but=WITH_THE_APP)
        self._wake.set()
        self._dispatch_soon()
        if not staying:
            return None
        loop = asyncio.get_running_loop()
        parting = Parting(staying, loop.create_future())
        self._partings.append(parting)
        loop.call_later(PARTING_SECONDS, parting.over)
        return parting.done

    def _part(self) -> None:
        """What the app settled of what is leaving is not tried again here."""
        for parting in self._partings:
            settled = [held for held in parting.staying if held.state not in WITH_THE_APP]
            self.window.revoke([held.incoming.identity for held in settled])
            parting.staying = [
                h for h in parting.staying if h.state in WITH_THE_APP and self.window.holds(h)
            ]
            if not parting.staying:
                parting.over()
        self._partings = [parting for parting in self._partings if not parting.done.done()]

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

    def attach(self, consumer: Consumer) -> None:
        """Raises Draining."""
        if self.draining:
            raise Draining("the sidecar is stopping: open no new consumers")
        self.consumers.append(consumer)
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
        left = self.window.out_to(consumer)
        if clean or self.draining:
            for held in reversed(left):
                self.window.back(held)
            if left:
                self._facts.settled(Settled(self.settings.name, "released", len(left)))
        else:
            for held in left:
                self._fail(held, "app_crash", "the consumer's stream broke", 0.0)
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
            self._part()
        if self.paused or self.draining:
            return
        window = self.window
        now = asyncio.get_running_loop().time()
        lease_end = now + self.settings.lease_seconds
        hungry = [c for c in self.consumers if c.credit > 0 and c.takes_more]
        while window.has_ready and hungry:
            share = -(-window.ready // len(hungry))
            self._next_consumer = first = (self._next_consumer + 1) % len(hungry)
            for consumer in (*hungry[first:], *hungry[:first]):
                taken = window.take(
                    min(consumer.credit, consumer.max_batch, share), consumer, lease_end
                )
                deliveries = [_delivery(held) for held in taken if not self._was_the_last(held)]
                if deliveries:
                    consumer.credit -= len(deliveries)
                    consumer.deliver(deliveries)
            # A pull takes one batch, so it has no credit left, whatever it got.
            hungry = [c for c in hungry if c.credit > 0 and c.takes_more]
        self._arm()
        if window.room:
            self._wake.set()

    def _was_the_last(self, held: Held) -> bool:
        """It had its last delivery before, and its dead letter was not stored then: store it now."""
        if not used_up(held.attempt - 1, self.settings.retry):
            return False
        held.attempt -= 1
        self._bury(held, "attempts_exhausted", "its dead letter was not stored the first time")
        return True

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
            self._fail(held, "lease_expired", "the lease ended unsettled", None)
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
            self._fail(
                held,
                "attempts_exhausted",
                settlement.reason,
                settlement.delay,
                uncounted=settlement.uncounted,
            )

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
                self._fail(held, "app_crash", error, 0.0)
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

    def _fail(
        self,
        held: Held,
        reason: str,
        error: str,
        delay: float | None,
        *,
        uncounted: bool = False,
    ) -> None:
        """A delivery failed: try again after *delay* (None: as the policy says), or give up."""
        policy = self.settings.retry
        if not held.first_failed:
            held.first_failed = now_ns()
        recorded = None
        if not uncounted and self._source is not None:
            recorded = self._source.failed(held.incoming.handle, Failures(held.attempt))
        if not uncounted and used_up(held.attempt, policy):
            self._bury(held, reason, error)
            return
        total_ns = policy.total_seconds * 1e9
        if total_ns and now_ns() - held.first_failed > total_ns:
            self._bury(held, reason, error)
            return
        if delay is None:
            delay = delay_before(held.attempt + 1, policy, self._spread)
        at = asyncio.get_running_loop().time() + delay
        known = recorded is None or recorded.done()
        self.window.retry(held, at, uncounted=uncounted, recorded=known)
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
        """Store, then ack. While it cannot be stored the event stays with the broker, its lane held."""
        pause = RETRY_SECONDS[0]
        while self.window.holds(held):
            self._storing += 1
            try:
                await self._dead_letters.store(
                    held.incoming, reason=reason, error=error, attempts=held.attempt
                )
            except SidecarError as failure:
                self._not_stored(failure)
            else:
                self._stored(held, reason)
                return
            finally:
                self._storing -= 1
                self._wake.set()
            if self.draining:
                return
            await self._sleep(pause)
            pause = min(pause * 2, RETRY_SECONDS[1])

    def _not_stored(self, failure: SidecarError) -> None:
        detail = f"a dead letter cannot be stored: {failure.message}"
        if self._unstored != detail:
            log.warning("subscription %s: %s", self.settings.name, detail)
            self._unstored = detail

    def _stored(self, held: Held, reason: str) -> None:
        self._unstored = ""
        self._log_dead_letter(reason)
        self._facts.dead_lettered(DeadLettered(self.settings.name, reason))
        if self.window.holds(held):
            self._ack(held)
            self._dispatch_soon()

    def _log_dead_letter(self, reason: str) -> None:
        self._unlogged += 1
        now = asyncio.get_running_loop().time()
        if now - self._last_logged >= LOG_SECONDS:
            log.warning(
                "subscription %s: %d dead letters stored, the last one: %s",
                self.settings.name,
                self._unlogged,
                reason,
            )
            self._unlogged, self._last_logged = 0, now

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


def bad_token(token: str) -> BadToken:
    return BadToken(
        "not the token of a delivery by this sidecar, or of one before its restart",
        token=token[:100],
    )
