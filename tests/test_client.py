"""The client of the package against a running sidecar: calls, streams, and a sidecar that dies."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Protocol

import pytest

from sidecar.client import (
    CallFailed,
    Durability,
    Event,
    PublishFailed,
    Receipt,
    RetryPolicy,
    SettleFailed,
    Settlement,
    Sidecar,
    SubscriptionSpec,
    Verdict,
    new_event,
)
from tests.cli.command import command, environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

QUICK = RetryPolicy(max_attempts=3, initial_seconds=0.01, max_seconds=0.01, jitter=0)


class Running(Protocol):
    """What the tests use of the fixture `sidecar`."""

    grpc_socket: Path
    grpc_address: str


@pytest.fixture
def topic() -> str:
    """A topic of its own, with a first token of its own: it gets a stream of its own."""
    return f"client{uuid.uuid4().hex[:12]}.made"


@pytest.fixture
def spec(topic: str) -> SubscriptionSpec:
    return SubscriptionSpec(topic.replace(".", "-"), topic, retry=QUICK)


@pytest.fixture
async def client(sidecar: Running) -> AsyncIterator[Sidecar]:
    async with Sidecar(f"unix:{sidecar.grpc_socket}") as connected:
        yield connected


def numbered(topic: str, numbers: range, key: str = "k") -> list[Event]:
    return [new_event("counted", n, id=f"{topic}-{n}", key=key) for n in numbers]


def number_of(event: Event) -> int:
    assert event.data is not None
    return int(event.data)


# -- publish


async def test_publish_answers_each_event_in_order(client: Sidecar, topic: str) -> None:
    """A bad event fails alone."""
    bad = new_event("", headers={"ce-no": "1"})
    good = numbered(topic, range(2))
    first, failed, last = await client.publish(topic, [good[0], bad, good[1]])

    assert isinstance(first, Receipt)
    assert isinstance(last, Receipt)
    assert isinstance(failed, PublishFailed)
    assert [first.event_id, last.event_id] == [f"{topic}-0", f"{topic}-1"]
    assert (first.topic, first.durability, first.duplicate) == (topic, Durability.STORED, False)
    assert (failed.reason, failed.code, failed.retryable) == (
        "EVENT_INVALID",
        "INVALID_ARGUMENT",
        False,
    )


async def test_a_call_that_fails_says_why(client: Sidecar) -> None:
    with pytest.raises(CallFailed, match=r"TOPIC_INVALID: .*orders\.created") as failed:
        await client.publish("not a topic", [new_event("made")])

    assert failed.value.code == "INVALID_ARGUMENT"
    assert failed.value.metadata == {"field": "topic"}
    assert not failed.value.retryable


async def test_nobody_there_is_unavailable_without_a_reason(tmp_path: Path) -> None:
    """An empty reason tells that no sidecar said it."""
    async with Sidecar(f"unix:{tmp_path}/nobody.sock") as client:
        with pytest.raises(CallFailed) as failed:
            await client.status()

        assert (failed.value.code, failed.value.reason) == ("UNAVAILABLE", "")
        assert failed.value.retryable


async def test_a_stream_answers_each_batch_in_order(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    """Also the batch that fails as a whole: one failure for each of its events."""
    batches = [(topic, numbered(topic, range(n * 10, n * 10 + 10))) for n in range(50)]
    batches[7] = ("not a topic", batches[7][1])
    answers = [answer async for answer in client.publish_stream(batches, window=8)]
    kept = [n for n in range(500) if n not in range(70, 80)]
    consumed = [number_of(event) for event in await consumed_of(client, spec, 490)]

    assert [len(answer) for answer in answers] == [10] * 50
    assert {getattr(result, "reason", None) for result in answers[7]} == {"TOPIC_INVALID"}
    assert [
        getattr(result, "event_id", None)
        for n, answer in enumerate(answers)
        if n != 7
        for result in answer
    ] == [f"{topic}-{n}" for n in kept]
    assert consumed == kept


async def test_a_stream_takes_no_more_batches_than_its_window(client: Sidecar, topic: str) -> None:
    taken = 0

    def batches() -> Iterator[tuple[str, list[Event]]]:
        nonlocal taken
        for n in range(40):
            taken += 1
            yield topic, numbered(topic, range(n, n + 1))

    ahead = []
    answered = 0
    async for _ in client.publish_stream(batches(), window=4):
        answered += 1
        ahead.append(taken - answered)

    assert answered == 40
    assert max(ahead) <= 4


async def test_an_error_of_the_batches_comes_after_the_answers_before_it(
    client: Sidecar, topic: str
) -> None:
    async def batches() -> AsyncIterator[tuple[str, list[Event]]]:
        yield topic, numbered(topic, range(3))
        raise LookupError("no more")

    async with contextlib.aclosing(client.publish_stream(batches())) as answers:
        first = await anext(answers)
        with pytest.raises(LookupError, match="no more"):
            await anext(answers)

    assert len(first) == 3


async def test_a_stream_may_be_left_in_the_middle(client: Sidecar, topic: str) -> None:
    async def without_end() -> AsyncIterator[tuple[str, list[Event]]]:
        yield topic, numbered(topic, range(1))
        await asyncio.Event().wait()

    async with contextlib.aclosing(client.publish_stream(without_end())) as answers:
        [receipt] = await anext(answers)

    assert isinstance(receipt, Receipt)
    assert isinstance((await client.publish(topic, numbered(topic, range(1, 2))))[0], Receipt)


# -- consume


async def consumed_of(client: Sidecar, spec: SubscriptionSpec, count: int) -> list[Event]:
    events = []
    async with client.subscribe(spec, limit=count) as deliveries:
        async for delivery in deliveries:
            events.append(delivery.event)
            delivery.ack()
    return events


async def test_an_event_is_the_same_on_both_ends(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    event = Event(
        id=topic,
        source="/here",
        type="made",
        time_ns=1_700_000_000_123_456_789,
        data=b"\x00\xff",
        key="k",
        content_type="application/octet-stream",
        subject="s",
        schema="https://example.com/schema",
        extensions={"tenant": "acme"},
        headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
    )
    [receipt] = await client.publish(topic, [event])
    async with client.subscribe(spec, limit=1) as deliveries:
        [delivery] = [delivery async for delivery in deliveries]
        delivery.ack()

    assert isinstance(receipt, Receipt)
    assert delivery.event == event
    assert (delivery.topic, delivery.attempt) == (topic, 1)
    assert delivery.position == receipt.position


async def test_no_data_stays_no_data(client: Sidecar, topic: str, spec: SubscriptionSpec) -> None:
    """Empty data is data, where its content type says what it is empty of."""
    events = [
        new_event("made", None, key="k"),
        new_event("made", b"", key="k", content_type="text/plain"),
    ]
    await client.publish(topic, events)

    assert [event.data for event in await consumed_of(client, spec, 2)] == [None, b""]


async def test_a_nack_brings_the_second_attempt(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    """And neighbours of other keys are not held back by it."""
    await client.publish(
        topic, [*numbered(topic, range(1), "a"), *numbered(topic, range(1, 2), "b")]
    )
    seen = []
    async with client.subscribe(spec, limit=3) as deliveries:
        async for delivery in deliveries:
            number = number_of(delivery.event)
            seen.append((number, delivery.attempt))
            if (number, delivery.attempt) == (0, 1):
                delivery.nack(reason="not-yet")
            else:
                delivery.ack()

    assert sorted(seen) == [(0, 1), (0, 2), (1, 1)]


async def test_an_uncounted_nack_is_no_attempt(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    await client.publish(topic, numbered(topic, range(1)))
    attempts = []
    async with client.subscribe(spec, limit=2) as deliveries:
        async for delivery in deliveries:
            attempts.append(delivery.attempt)
            if len(attempts) == 1:
                delivery.nack(delay=0, uncounted=True)
            else:
                delivery.ack()

    assert attempts == [1, 1]


async def test_a_rejected_event_is_a_dead_letter_with_its_reason(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    await client.publish(topic, numbered(topic, range(1)))
    async with client.subscribe(spec, limit=1) as deliveries:
        async for delivery in deliveries:
            delivery.reject("hopeless")
        letters = SubscriptionSpec(f"{spec.name}-dlq", f"dlq.{topic}")
        [letter] = await consumed_of(client, letters, 1)

    assert letter.id == f"{topic}-0"
    assert "hopeless" in letter.headers.values()


async def test_never_more_than_the_credit_is_unsettled(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    """Each settlement makes room for one."""
    count, credit = 60, 5
    await client.publish(
        topic, [new_event("counted", n, id=f"{topic}-{n}", key=str(n)) for n in range(count)]
    )
    most, got = 0, 0
    async with client.subscribe(spec, credit=credit) as deliveries:
        while got < count:
            held = [await anext(deliveries)]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    async for delivery in deliveries:
                        held.append(delivery)  # noqa: PERF401 - it is cut short
            most = max(most, len(held))
            got += len(held)
            for delivery in held:
                delivery.ack()

    assert got == count
    assert most == credit


async def test_a_wait_that_is_cancelled_loses_nothing(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    async with client.subscribe(spec) as deliveries:
        await deliveries.wait_opened()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(deliveries)
        await client.publish(topic, numbered(topic, range(1)))
        delivery = await anext(deliveries)
        delivery.ack()

        assert (number_of(delivery.event), delivery.attempt) == (0, 1)


async def test_what_was_not_settled_goes_to_the_next_consumer(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    """A consumer that leaves has not failed: the attempt is the first one again."""
    await client.publish(topic, numbered(topic, range(2), key=""))
    async with client.subscribe(spec, limit=2) as deliveries:
        first = await anext(deliveries)
        left = await anext(deliveries)
        first.ack()
    async with client.subscribe(spec, limit=1) as deliveries:
        [again] = [delivery async for delivery in deliveries]
        again.ack()

    assert again.event == left.event
    assert again.attempt == 1
    assert again.token != left.token


async def test_a_second_settlement_is_told(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    await client.publish(topic, numbered(topic, range(1)))
    told: asyncio.Queue[SettleFailed] = asyncio.Queue()
    async with client.subscribe(spec, limit=1, on_rejected=told.put_nowait) as deliveries:
        delivery = await anext(deliveries)
        delivery.ack()
        delivery.nack()
        failed = await told.get()

    assert (failed.reason, failed.token) == ("ALREADY_SETTLED", delivery.token)
    assert told.empty()


async def test_a_subscription_that_is_not_there_is_raised_not_tried_for_ever(
    client: Sidecar,
) -> None:
    async with client.subscribe("nobody-made-this") as deliveries:
        with pytest.raises(CallFailed) as failed:
            await anext(deliveries)

        assert (failed.value.code, failed.value.reason) == ("NOT_FOUND", "SUBSCRIPTION_MISSING")
        with pytest.raises(CallFailed):
            await deliveries.wait_opened()


async def test_pull_and_settle_by_token(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    await client.publish(topic, numbered(topic, range(1)))
    [first] = await client.pull(spec, wait_seconds=10)
    answers = await client.settle([Settlement(first.token, Verdict.NACK, delay=0.0)])
    [second] = await client.pull(spec, wait_seconds=10)
    answers += await client.settle([Settlement(second.token, Verdict.ACK)] * 2)
    nothing = await client.pull(spec, wait_seconds=0.05)

    assert (first.attempt, second.attempt) == (1, 2)
    assert answers[:2] == [None, None]
    assert answers[2] is not None
    assert answers[2].reason == "ALREADY_SETTLED"
    assert nothing == []


async def test_a_paused_subscription_hands_over_when_it_is_resumed(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    async with client.subscribe(spec) as deliveries:
        await deliveries.wait_opened()
        await client.pause(spec.name)
        await client.publish(topic, numbered(topic, range(1)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(deliveries)
        await client.resume(spec.name)
        delivery = await anext(deliveries)
        delivery.ack()

        assert number_of(delivery.event) == 0


async def test_seek_brings_old_events_again(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    await client.publish(topic, numbered(topic, range(3)))
    first = await consumed_of(client, spec, 3)
    await client.seek(spec.name, "earliest")

    assert await consumed_of(client, spec, 3) == first


async def test_the_status_knows_the_subscription(
    client: Sidecar, topic: str, spec: SubscriptionSpec
) -> None:
    async with client.subscribe(spec) as deliveries:
        opened = await deliveries.wait_opened()
        status = await client.status()
        [found] = [s for s in status.subscriptions if s.name == spec.name]

        assert status.ready
        assert (opened.subscription, opened.topic, opened.max_attempts) == (spec.name, topic, 3)
        assert (found.topic, found.consumers, found.declared) == (topic, 1, False)


async def test_an_error_of_the_body_comes_out_as_it_is(sidecar: Running, topic: str) -> None:
    """The client's task group must not show."""
    with pytest.raises(LookupError, match="mine"):  # noqa: PT012 - the block is what is tested
        async with Sidecar(sidecar.grpc_address) as client:
            client.subscribe(SubscriptionSpec(topic.replace(".", "-"), topic))
            raise LookupError("mine")


async def test_it_has_to_be_entered_first() -> None:
    with pytest.raises(RuntimeError, match="async with Sidecar"):
        Sidecar("unix:/nowhere").subscribe("some")


# -- a sidecar that dies

CONFIG = """
[grpc]
address = ""
unix_socket = "{directory}/grpc.sock"
[http]
unix_socket = "{directory}/http.sock"
[admin]
address = ""
[brokers.here]
type = "memory"
[[subscriptions]]
name = "declared"
topic = "counted"
"""


@contextlib.asynccontextmanager
async def own_sidecar(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A sidecar of the test's own, with a broker that forgets; killed at the end."""
    config = directory / "sidecar.toml"
    config.write_text(CONFIG.format(directory=directory))
    process = await asyncio.create_subprocess_exec(
        *command("run", "--config", str(config)),
        stderr=asyncio.subprocess.DEVNULL,
        env=environment(),
    )
    try:
        async with asyncio.timeout(15), Sidecar(f"unix:{directory}/grpc.sock") as client:
            await client.wait_connected()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("end", ["kill", "terminate"])
async def test_a_consumer_opens_again_when_the_sidecar_is_back(tmp_path: Path, end: str) -> None:
    """Whether it crashed or was stopped; the consumer's loop does not notice."""
    async with Sidecar(f"unix:{tmp_path}/grpc.sock") as client:
        async with own_sidecar(tmp_path) as process:
            deliveries = client.subscribe("declared")
            await client.publish("counted", numbered("before", range(1)))
            before = await anext(deliveries)
            before.ack()
            getattr(process, end)()
            await process.wait()
        async with own_sidecar(tmp_path):
            await client.wait_connected()
            await client.publish("counted", numbered("after", range(1)))
            after = await anext(deliveries)
            after.ack()

            assert (before.event.id, after.event.id) == ("before-0", "after-0")
            assert after.attempt == 1


async def test_without_reconnect_the_end_of_the_sidecar_is_raised(tmp_path: Path) -> None:
    async with Sidecar(f"unix:{tmp_path}/grpc.sock") as client, own_sidecar(tmp_path) as process:
        deliveries = client.subscribe("declared", reconnect=False)
        await deliveries.wait_opened()
        process.kill()
        with pytest.raises(CallFailed) as failed:
            await anext(deliveries)

        assert failed.value.retryable


async def test_a_stream_that_breaks_is_raised(tmp_path: Path) -> None:
    """Batches without an answer may have arrived: it is not for the client to send them again."""

    async def batches() -> AsyncIterator[tuple[str, list[Event]]]:
        yield "counted", numbered("one", range(1))
        await asyncio.Event().wait()

    async with Sidecar(f"unix:{tmp_path}/grpc.sock") as client, own_sidecar(tmp_path) as process:
        async with contextlib.aclosing(client.publish_stream(batches())) as answers:
            await anext(answers)
            process.kill()
            with pytest.raises(CallFailed) as failed:
                await anext(answers)

        assert failed.value.retryable
