"""Looking at dead letters, redriving and discarding them: on the memory broker, with a told clock."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from sidecar.brokers.memory import MemoryBroker
from sidecar.config import Memory
from sidecar.delivery.redrive.batch import Order
from sidecar.delivery.redrive.claims import good_for
from sidecar.delivery.redrive.filters import Filter
from sidecar.delivery.redrive.letter import LetterId
from sidecar.delivery.redrive.marks import Kind, State, decode
from sidecar.errors import (
    BrokerUnavailable,
    DeadLetterMissing,
    Draining,
    InvalidRequest,
    SubscriptionMissing,
)
from sidecar.wire.attributes import new_id
from tests.delivery.stage import Moody, memory
from tests.redrive.stage import DLQ, FAST, Desked, desked, ids, letter, serving
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.broker import Broker, Log
    from sidecar.delivery.redrive.batch import Progress
    from sidecar.event import Event, Outcome

pytestmark = pytest.mark.timeout(60)


def numbers(first: int, end: int) -> list[str]:
    return [str(n) for n in range(first, end)]


# -- looking


async def test_a_list_has_what_the_headers_say() -> None:
    async with desked() as one:
        await one.store(letter(0, generation=2, first_failed="2026-01-31T12:00:00Z"))
        (found,) = await one.listed()
    it = found.letter

    assert found.state is State.OPEN
    assert (it.says("subscription"), it.says("reason"), it.attempts) == ("billing", "rejected", 3)
    assert (it.generation, it.last_failed_ns - it.first_failed_ns) == (2, 10**9)
    assert it.came_from is not None
    assert (it.came_from.stream, it.came_from.sequence) == ("memory", 1)
    assert (it.event.data, it.data_bytes) == (None, 7)
    assert it.original().headers == {"traceparent": "00-1-1-01"}


async def test_what_old_dead_letters_do_not_say_is_not_known() -> None:
    async with desked() as one:
        await one.store(letter(0, attempts="", time="", sequence="", stream=""))
        (found,) = await one.listed()
    it = found.letter

    assert (it.generation, it.attempts, it.first_failed_ns, it.last_failed_ns) == (1, 0, 0, 0)
    assert it.came_from is None


@pytest.mark.parametrize("oldest_first", [True, False])
async def test_pages_give_each_once_in_order(*, oldest_first: bool) -> None:
    """Over several logs, and in a stream that has more of others than of them."""
    first, second = memory("memory"), memory("second")
    async with desked(first, second) as one:
        one.subscription("mailing", topic="mail.>", broker="second")
        for n in range(60):
            if n % 3:
                await one.store(letter(n))
            else:
                mail = letter(n, subscription="mailing", topic="mail.in")
                await second.publish("dlq.mail.in", [mail])
            await one.publish("orders.created", *[letter(1000 * n + m) for m in range(1, 30)])
        pages = []
        token = ""
        while True:
            page = await one.page(size=7, token=token, oldest_first=oldest_first)
            pages.append(page)
            token = page.token
            if not token:
                break
    listed = [i for page in pages for i in ids(list(page.letters))]

    expected = numbers(0, 60)
    assert listed == (expected if oldest_first else expected[::-1])
    assert max(len(page.letters) for page in pages) == 7


@pytest.mark.parametrize("oldest_first", [True, False])
async def test_what_comes_while_one_turns_pages_is_not_of_the_list(*, oldest_first: bool) -> None:
    async with desked() as one:
        await one.store(*[letter(n) for n in range(6)])
        page = await one.page(size=3, oldest_first=oldest_first)
        await one.store(letter(100))
        rest = await one.listed(size=3, token=page.token, oldest_first=oldest_first)

    expected = numbers(0, 6)
    assert ids([*page.letters, *rest]) == (expected if oldest_first else expected[::-1])


@pytest.mark.parametrize("oldest_first", [True, False])
async def test_pages_with_data_are_bounded_in_bytes(*, oldest_first: bool) -> None:
    """Nothing is left out: a page ends when some 2 MiB are in it."""
    async with desked() as one:
        letters = [letter(n, data=b"x" * 900_000) for n in range(7)]
        await one.store(*letters)
        page = await one.page(size=100, with_data=True, oldest_first=oldest_first)
        rest = await one.listed(with_data=True, token=page.token, oldest_first=oldest_first)
    found = [each.letter.event for each in (*page.letters, *rest)]

    assert len(page.letters) == 3
    assert found == (letters if oldest_first else letters[::-1])


async def test_a_token_of_another_list_is_refused() -> None:
    async with desked() as one:
        await one.store(*[letter(n) for n in range(5)])
        token = (await one.page(size=2)).token
        for bad in ("x", "!!", token[:-8]):
            with pytest.raises(InvalidRequest):
                await one.page(size=2, token=bad)
        with pytest.raises(InvalidRequest):
            await one.page(Filter(key="k1"), size=2, token=token)


async def test_only_dead_letters_of_this_sidecars_subscriptions_are_listed() -> None:
    """Not what lies beside them; of others', when their topic is named."""
    async with desked() as one:
        plain = letter(1)
        await one.store(
            letter(0),
            letter(2, subscription="another"),
            type(plain)(id="1", source="/shop", type="t", time_ns=1),
        )
        ours = await one.listed()
        named = await one.listed(Filter(dead_letter_broker="memory", dead_letter_topic="dlq.>"))
        with pytest.raises(SubscriptionMissing):
            await one.listed(Filter(subscription="another"))
        with pytest.raises(DeadLetterMissing):
            await one.listed(Filter(dead_letter_broker="none", dead_letter_topic="dlq.>"))

    assert ids(ours) == ["0"]
    assert sorted(ids(named)) == ["0", "2"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(reasons=frozenset({"expired"})), [1]),
        (Filter(reasons=frozenset({"expired", "rejected"})), [0, 1, 2, 3]),
        (Filter(event_type="order.*"), [0, 1, 3]),
        (Filter(event_type="invoice.>"), [2]),
        (Filter(key="vip"), [3]),
        (Filter(error_contains="TIMED OUT"), [0]),
        (Filter(topic="orders.eu.*"), [2]),
        (Filter(subscription="billing", key="vip"), [3]),
        (Filter(after_ns=0, before_ns=1), []),
        (Filter(after_ns=2**62), []),
    ],
)
async def test_a_filter_wants_all_that_it_says(wanted: Filter, expected: list[int]) -> None:
    async with desked() as one:
        await one.store(
            letter(0, error="it Timed Out there"),
            letter(1, reason="expired"),
            letter(2, type="invoice.made.v1", topic="orders.eu.created"),
            letter(3, key="vip"),
        )
        found = await one.listed(wanted, oldest_first=True)

    assert ids(found) == [str(n) for n in expected]


async def test_one_is_got_by_its_id_with_its_data() -> None:
    async with desked() as one:
        await one.store(letter(0), letter(1))
        (_, listed) = await one.listed(oldest_first=True)
        name = LetterId.parse(str(listed.letter.id))
        found = await one.desk.get(name)
        missing = LetterId(name.broker, name.topic, name.partition, name.number + 1, name.life)
        other_life = LetterId(name.broker, name.topic, name.partition, name.number, "00000000")
        for bad in (missing, other_life, LetterId("none", DLQ, None, 1, name.life)):
            with pytest.raises(DeadLetterMissing):
                await one.desk.get(bad)

    assert found.letter.event == letter(1)


@pytest.mark.parametrize("text", ["", "x", "a/b/c", "memory/dlq/1", "memory/dlq/1~123", "a" * 600])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        LetterId.parse(text)


# -- redriving


async def test_what_is_redriven_is_the_event_as_it_was_and_says_what_it_was() -> None:
    """Where it came from; its own headers, without those of dead letters, and which one it was."""
    async with desked() as one:
        await one.store(letter(0, generation=3))
        (found,) = await one.listed()
        progress = await one.redrive()
        (event,) = await one.on("orders.created")
        left = await one.listed(settled=True)

    assert (progress.done, progress.matched, progress.failed, progress.waiting) == (1, 1, 0, 0)
    original = letter(0)
    assert (event.id, event.data, event.key, event.type) == (
        original.id,
        original.data,
        original.key,
        original.type,
    )
    assert event.headers == {
        "traceparent": "00-1-1-01",
        "sidecar-redrive-id": str(found.letter.id),
        "sidecar-redrive-generation": "3",
    }
    assert left == []


async def test_only_what_the_filter_wants_is_redriven_once_and_oldest_first() -> None:
    async with desked() as one:
        await one.store(*[letter(n) for n in range(300)])
        first = await one.redrive(Filter(key="k1"))
        again = await one.redrive(Filter(key="k1"))
        events = await one.on("orders.created")
        left = await one.listed(oldest_first=True)

    wanted = [str(n) for n in range(300) if n % 3 == 1]
    assert (first.done, again.done) == (100, 0)
    assert [event.id for event in events] == wanted
    assert ids(left) == [str(n) for n in range(300) if n % 3 != 1]


async def test_the_limit_is_exact_and_the_next_call_goes_on() -> None:
    async with desked() as one:
        await one.store(*[letter(n) for n in range(250)])
        done = [(await one.redrive(limit=120)).done for _ in range(3)]
        events = await one.on("orders.created")

    assert done == [120, 120, 10]
    assert [event.id for event in events] == numbers(0, 250)


async def test_a_dry_run_counts_and_does_nothing() -> None:
    async with desked() as one:
        await one.store(*[letter(n) for n in range(10)])
        redriven = await one.redrive(dry_run=True)
        discarded = await one.discard(Filter(key="k0"), dry_run=True)
        events = await one.on("orders.created")
        marks = await one.on(MemoryBroker.marks_topic)
        left = await one.listed()

    assert (redriven.done, discarded.done) == (10, 4)
    assert (events, marks, len(left)) == ([], [], 10)


async def test_it_goes_to_another_topic_when_that_is_said() -> None:
    async with desked() as one:
        await one.store(letter(0), letter(1))
        await one.redrive(to_topic="retry.{topic}")
        events = await one.on("retry.orders.created")

    assert [event.id for event in events] == ["0", "1"]


async def test_the_rate_is_kept_smoothly() -> None:
    """Ten at 50 a second take 180 ms at least: the first is at once, and none comes before its turn."""
    async with desked() as one:
        await one.store(*[letter(n) for n in range(10)])
        loop = asyncio.get_running_loop()
        one.clock.now = 0.0
        one.desk = type(one.desk)(one.brokers, one.publisher, one.hub)
        async with serving(one):
            started = loop.time()
            await one.redrive(rate=50.0)
            took = loop.time() - started

    assert took >= 0.18


async def test_one_that_fails_stays_open_and_the_others_go_on() -> None:
    async with desked() as one:
        await one.store(letter(0), letter(1, broker="gone"), letter(2, topic="_INBOX.x"), letter(3))
        progress = await one.redrive()
        events = await one.on("orders.created")
        left = await one.listed(oldest_first=True)

    assert (progress.done, progress.failed, progress.matched) == (2, 2, 4)
    assert progress.failure is not None
    assert "_INBOX" in progress.failure.message
    assert [event.id for event in events] == ["0", "3"]
    assert [(f.letter.event.id, f.state) for f in left] == [("1", State.OPEN), ("2", State.OPEN)]


async def test_discarded_ones_are_gone_and_nothing_is_published() -> None:
    async with desked() as one:
        await one.store(*[letter(n) for n in range(150)])
        progress = await one.discard(Filter(key="k2"))
        again = await one.redrive(Filter(key="k2"))
        left = await one.listed()
        events = await one.on("orders.>")

    assert (progress.done, again.done) == (50, 0)
    assert len(left) == 100
    assert events == []


async def test_what_comes_while_it_runs_is_not_of_it() -> None:
    """Events that fail again, and become dead letters again, are not redriven in a circle."""
    broker = memory()
    async with desked(broker) as one:
        await one.store(*[letter(n) for n in range(5)])
        publish = broker.publish

        def echo(
            topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
        ) -> asyncio.Future[Sequence[Outcome]]:
            if topic == "orders.created":
                publish(DLQ, [letter(100 + int(event.id)) for event in events])
            return publish(topic, events, broker_ids=broker_ids)

        broker.publish = echo  # type: ignore[method-assign]
        progress = await one.redrive()
        left = await one.listed(oldest_first=True)

    assert progress.done == 5
    assert ids(left) == numbers(100, 105)


# -- where a broker keeps what is deleted: the marks alone hide it


class Keeping(MemoryBroker):
    """It deletes nothing, as a log."""

    capabilities = msgspec.structs.replace(MemoryBroker.capabilities, deletes=False)


async def test_where_nothing_is_deleted_marks_hide_what_is_done() -> None:
    async with desked(Keeping("memory", Memory(type="memory"))) as one:
        await one.store(*[letter(n) for n in range(9)])
        await one.redrive(Filter(key="k0"))
        await one.discard(Filter(key="k1"))
        left = await one.listed(oldest_first=True)
        all_ = await one.listed(oldest_first=True, settled=True)
        again = await one.redrive()
        events = await one.on("orders.created")

    assert ids(left) == ["2", "5", "8"]
    states = [State.REDRIVEN, State.DISCARDED, State.OPEN] * 3
    assert [found.state for found in all_] == states
    assert again.done == 3
    assert sorted(event.id for event in events) == ["0", "2", "3", "5", "6", "8"]


# -- two at the same time, and ends half-way


async def test_two_sidecars_at_the_same_time_redrive_each_once() -> None:
    broker = memory()
    one, other = Desked(broker), Desked(broker)
    async with serving(one, other):
        await one.store(*[letter(n) for n in range(500)])
        first, second = await asyncio.gather(one.redrive(), other.redrive())
        events = await one.on("orders.created")
        left = await one.listed(settled=True)

    assert first.done + second.done == 500
    assert min(first.done, second.done) > 0
    assert sorted((event.id for event in events), key=int) == numbers(0, 500)
    assert left == []


async def test_what_another_call_has_claimed_meanwhile_is_not_taken_over() -> None:
    """
    A slow call has chosen its next one, and waits for its turn; a second call claims it then.

    Both are calls of one sidecar, which reads the marks for both: the first one knows of the claim.
    """
    async with desked(Mortal("memory", Memory(type="memory"))) as one:
        await one.store(*[letter(n, key="slow" if n in {0, 10} else "") for n in range(11)])
        one.desk = type(one.desk)(one.brokers, one.publisher, one.hub)

        async def first_is_there() -> bool:
            return len(await one.on("orders.created")) == 1

        async with serving(one), asyncio.TaskGroup() as tasks:
            slow = tasks.create_task(one.redrive(Filter(key="slow"), rate=0.8))
            await until(first_is_there)
            second = tasks.create_task(one.redrive(rate=5.0))
        events = await one.on("orders.created")

    assert slow.result().done + second.result().done == 11
    assert sorted((event.id for event in events), key=int) == numbers(0, 11)


async def test_closed_early_it_ends_what_is_under_way_and_leaves_the_rest_open() -> None:
    async with desked() as one:
        await one.store(*[letter(n) for n in range(100)])
        one.desk = type(one.desk)(one.brokers, one.publisher, one.hub)
        async with serving(one):
            run = one.desk.run(Order(Kind.REDRIVE, Filter(), rate=20.0))
            await anext(run)
            await run.aclose()
            await one.desk.drain()
            events = await one.on("orders.created")
            left = await one.listed()

    assert 0 < len(events) < 100
    assert len(left) == 100 - len(events)
    assert {found.state for found in left} == {State.OPEN}
    assert not {event.id for event in events} & set(ids(left))


async def test_a_draining_sidecar_begins_nothing() -> None:
    async with desked() as one:
        one.publisher.draining = True
        with pytest.raises(Draining):
            await one.redrive()


class Dying(Exception):
    """Where the test kills it."""


@pytest.mark.parametrize("at", ["claimed", "published", "marked"])
async def test_what_a_dead_one_had_claimed_is_redriven_once(at: str) -> None:
    """It dies behind the claim, the publish or the mark; another waits until its claim is over."""
    broker = Keeping("memory", Memory(type="memory"))
    dying, other = Desked(broker), Desked(broker)
    publish = broker.publish
    stored: list[str] = []

    def die(
        topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        stored.append(topic)
        done = {"claimed": 1, "published": 2, "marked": 3}[at]
        if len(stored) > done:
            raise Dying
        return publish(topic, events, broker_ids=broker_ids)

    async with serving(dying, other):
        await other.store(*[letter(n) for n in range(4)])
        broker.publish = die  # type: ignore[method-assign]
        if at == "marked":
            await dying.redrive()
        else:
            with pytest.raises(Dying):
                await dying.redrive()
        broker.publish = publish  # type: ignore[method-assign]
        waiting = [found.state for found in await other.listed()]
        order = Order(Kind.REDRIVE, Filter(), rate=FAST)
        async for progress, finished in other.desk.run(order):
            assert finished or progress.waiting == 4
            other.clock.now += good_for(5)
        events = await other.on("orders.created")
        left = await other.listed()

    assert waiting == ([] if at == "marked" else [State.CLAIMED] * 4)
    assert progress.done == (0 if at == "marked" else 4)
    assert [event.id for event in events] == numbers(0, 4)
    assert left == []


class Mortal(MemoryBroker):
    """
    It kills whoever uses it at a step: before it, or when it is done and nobody was told.

    It stores whatever it is given: no window of duplicates hides what is published twice.
    """

    steps_left = -1
    after = False

    def _step(self) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            raise Dying

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        if not self.after:
            self._step()
        published = super().publish(topic, events, broker_ids=[new_id() for _ in events])
        if self.after:
            self._step()
        return published

    async def delete(self, log: Log, numbers: Sequence[int]) -> None:
        if not self.after:
            self._step()
        await super().delete(log, numbers)
        if self.after:
            self._step()


class MortalLog(Mortal):
    """The same where nothing is deleted."""

    capabilities = msgspec.structs.replace(MemoryBroker.capabilities, deletes=False)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@pytest.mark.parametrize("kind", [Mortal, MortalLog])
@pytest.mark.parametrize("after", [False, True])
async def test_wherever_it_dies_and_dies_again_each_is_redriven_once(
    kind: type[Mortal], *, after: bool
) -> None:
    """At every step in turn; the one who takes over dies too, one step later, and a third ends it."""
    step, died = 0, True
    while died:
        step, died = step + 1, False
        broker = kind("memory", Memory(type="memory"))
        broker.after = after
        sidecars = [Desked(broker) for _ in range(3)]
        async with serving(*sidecars):
            await sidecars[0].store(*[letter(n) for n in range(6)])
            for number, one in enumerate(sidecars):
                broker.steps_left = step + number if number < 2 else -1
                try:
                    await done_later(one, Order(Kind.REDRIVE, Filter(key="k1"), rate=40.0))
                except Dying:
                    died = True
            events = await sidecars[2].on("orders.created")
            left = await sidecars[2].listed(oldest_first=True)

        assert [event.id for event in events] == ["1", "4"], step
        assert ids(left) == ["0", "2", "3", "5"], step
    assert step > 4


class Blind(MemoryBroker):
    """A target that shows nothing of what it has, as core NATS."""

    capabilities = msgspec.structs.replace(MemoryBroker.capabilities, browses=False)


class Forgetting(MemoryBroker):
    """A target that loses what was stored, and forgets it too unless told otherwise."""

    may_have_gaps = True
    duplicate_seconds = 0.0

    async def logs(self, pattern: str) -> Sequence[Log]:
        return [
            msgspec.structs.replace(
                log, may_have_gaps=self.may_have_gaps, duplicate_seconds=self.duplicate_seconds
            )
            for log in await super().logs(pattern)
        ]


async def interrupted(dying: Desked) -> None:
    """A redrive that dies behind its publish."""
    broker = dying.brokers["memory"]
    publish = broker.publish
    marks = 0

    def die(
        topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        nonlocal marks
        marks += topic == MemoryBroker.marks_topic
        if marks > 1:
            raise Dying
        return publish(topic, events, broker_ids=broker_ids)

    broker.publish = die  # type: ignore[method-assign]
    with pytest.raises(Dying):
        await dying.redrive()
    broker.publish = publish  # type: ignore[method-assign]


async def redriven_later(one: Desked, wanted: Filter | None = None) -> Progress:
    """By one who waits until the claim is over."""
    return await done_later(one, Order(Kind.REDRIVE, wanted or Filter(), rate=FAST))


async def done_later(one: Desked, order: Order) -> Progress:
    progress = None
    async for told, _ in one.desk.run(order):
        progress = told
        one.clock.now += good_for(5)
    assert progress is not None
    return progress


async def emptied(target: Broker) -> None:
    (log,) = await target.logs("orders.created")
    await target.delete(log, range(log.end))


@pytest.mark.parametrize("target", [Blind, Forgetting])
async def test_where_it_cannot_be_seen_it_stays_and_says_so(target: type[MemoryBroker]) -> None:
    """Neither lost nor published twice: naming it publishes it, and discarding it gives it up."""
    broker, there = memory(), target("there", Memory(type="memory"))
    dying, other = Desked(broker, there), Desked(broker, there)
    async with serving(dying, other):
        await other.store(*[letter(n, broker="there") for n in range(3)])
        await interrupted(dying)
        if there.capabilities.browses:
            await emptied(there)
        progress = await redriven_later(other)
        left = await other.listed(oldest_first=True)
        named = await redriven_later(other, Filter(ids=frozenset({left[0].letter.id})))
        order = Order(Kind.DISCARD, Filter(ids=frozenset({left[1].letter.id})))
        discarded = await done_later(other, order)
        end = await other.listed()

    assert (progress.done, progress.failed) == (0, 3)
    assert progress.failure is not None
    assert "cannot be seen" in progress.failure.message
    assert [found.state for found in left] == [State.CLAIMED] * 3
    assert (named.done, discarded.done) == (1, 1)
    assert ids(end) == ["2"]


async def test_inside_the_brokers_window_a_second_publish_is_told_as_a_duplicate() -> None:
    """A work queue has lost what was acked, and still knows it: publishing again is no harm."""
    broker, there = memory(), Forgetting("there", Memory(type="memory"))
    there.duplicate_seconds = 120.0
    dying, other = Desked(broker, there), Desked(broker, there)
    async with serving(dying, other):
        await other.store(*[letter(n, broker="there") for n in range(3)])
        await interrupted(dying)
        await emptied(there)
        progress = await redriven_later(other)
        (log,) = await there.logs("orders.created")
        stored = await there.read(log, 0, 10)

    assert (progress.done, progress.failed) == (3, 0)
    assert not stored


async def test_a_target_that_was_trimmed_since_cannot_tell() -> None:
    broker, there = memory(), Forgetting("there", Memory(type="memory"))
    there.may_have_gaps = False
    dying, other = Desked(broker, there), Desked(broker, there)
    async with serving(dying, other):
        await other.store(letter(0, broker="there"))
        await interrupted(dying)
        await emptied(there)
        progress = await redriven_later(other)

    assert (progress.done, progress.failed) == (0, 1)


async def test_those_that_are_named_are_redriven_wherever_they_are() -> None:
    async with desked() as one:
        await one.store(*[letter(n, subscription="elsewhere") for n in range(5)])
        everywhere = Filter(dead_letter_broker="memory", dead_letter_topic="dlq.>")
        found = await one.listed(everywhere, oldest_first=True)
        progress = await one.redrive(Filter(ids=frozenset({found[3].letter.id})))
        events = await one.on("orders.created")

    assert progress.done == 1
    assert progress.scanned == 1
    assert [event.id for event in events] == ["3"]


async def test_none_that_can_go_anywhere_is_no_endless_wait() -> None:
    async with desked() as one:
        await one.store(letter(0, broker="gone"))
        progress = await one.redrive()

    assert (progress.done, progress.failed) == (0, 1)


async def test_large_ones_go_in_small_batches() -> None:
    """Their data is in memory at once: some 8 MiB, whatever the rate."""
    broker = memory()
    async with desked(broker) as one:
        await one.store(*[letter(n, data=b"x" * 3_000_000) for n in range(7)])
        progress = await one.redrive()
        claims = [decode(event.data or b"") for event in await one.on(MemoryBroker.marks_topic)]

    assert progress.done == 7
    assert [len(m.letters) for m in claims if m.kind is Kind.REDRIVE] == [3, 3, 1]


async def test_while_its_broker_is_away_it_waits_and_goes_on() -> None:
    broker = Moody("memory", Memory(type="memory"))
    async with desked(broker) as one:
        await one.store(*[letter(n) for n in range(5)])
        broker.refuses, broker.tries = True, 0
        running = asyncio.ensure_future(one.redrive())
        await until(lambda: broker.tries > 2)
        broker.refuses = False
        progress = await running
        events = await one.on("orders.created")

    assert progress.done == 5
    assert [event.id for event in events] == numbers(0, 5)


async def test_a_broker_that_stays_away_ends_it_and_nothing_is_lost() -> None:
    broker = Moody("memory", Memory(type="memory"))
    async with desked(broker) as one:
        await one.store(*[letter(n) for n in range(5)])
        broker.refuses, broker.tries = True, 0

        async def later() -> None:
            await until(lambda: broker.tries > 1)
            one.clock.now += 60

        moving = asyncio.ensure_future(later())
        with pytest.raises(BrokerUnavailable):
            await one.redrive()
        await moving
        broker.refuses = False
        left = await one.listed()

    assert len(left) == 5
