"""Dead letters on real brokers, with the whole sidecar: redriven once, whatever is killed."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from sidecar.client import CallFailed, DeadLetterFilter, Sidecar, new_event
from tests.conformance.harness import fresh
from tests.drills.dead_letters import (
    ON_JETSTREAM,
    ON_KAFKA,
    SUBSCRIPTION,
    TOPIC,
    make_dead_letters,
    redriven_over_a_kill,
)
from tests.support.kafka import KafkaCluster, require
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sidecar.client import DeadLetter

WORK_QUEUE = """
[[brokers.work.streams]]
name = "drill"
subjects = ["drill.>"]
retention = "workqueue"
"""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=["jetstream", "kafka"])
def server(request: pytest.FixtureRequest) -> Iterator[NatsServer | KafkaCluster]:
    """One of the test's own: its topics and marks are new."""
    if request.param == "kafka":
        require()
    with NatsServer() if request.param == "jetstream" else KafkaCluster() as running:
        yield running


@pytest.fixture
def config(server: NatsServer | KafkaCluster) -> str:
    if isinstance(server, NatsServer):
        return ON_JETSTREAM.format(url=server.url)
    return ON_KAFKA.format(servers=server.bootstrap_servers)


async def letters(client: Sidecar, *, settled: bool = False) -> list[DeadLetter]:
    return [letter async for letter in client.dead_letters.list(include_settled=settled)]


async def redrive(client: Sidecar, wanted: DeadLetterFilter) -> int:
    progress = [told async for told in client.dead_letters.redrive(wanted, rate_per_second=2000)]
    assert progress[-1].finished
    assert progress[-1].failed == 0
    return progress[-1].done


async def test_a_redrive_that_was_killed_goes_on_and_each_is_delivered_once(config: str) -> None:
    """60 of 200 at 20 a second, `kill -9` half-way, the same command again; the 140 others stay."""
    report = await redriven_over_a_kill(config, 200, 20.0)

    assert report.delivered == Counter(report.wanted), report.text()
    assert report.holds, report.text()


async def test_a_work_queue_that_loses_what_is_acked_gets_each_once_too() -> None:
    """What was published cannot be seen there any more, but the stream still knows it."""
    with NatsServer() as server:
        config = ON_JETSTREAM.format(url=server.url) + WORK_QUEUE
        report = await redriven_over_a_kill(config, 200, 20.0)

    assert report.delivered == Counter(report.wanted), report.text()
    assert report.holds, report.text()


async def test_a_redrive_goes_on_when_its_server_was_killed(
    config: str, server: NatsServer | KafkaCluster
) -> None:
    """100 at 50 a second; the server dies on the way and is back soon: each is delivered once."""
    counted: Counter[str] = Counter()
    with SidecarProcess(config + SUBSCRIPTION) as sidecar:
        async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
            await make_dead_letters(client, 100)
            everything = client.dead_letters.redrive(all=True, rate_per_second=50)
            killed = False
            async for progress in everything:
                if progress.done and not killed:
                    killed = True
                    await asyncio.to_thread(_kill_and_start, server)
            async with client.subscribe("drill", credit=500) as deliveries:
                async for delivery in deliveries:
                    counted[delivery.event.id] += 1
                    delivery.ack()
                    if len(counted) == 100:
                        break
            left = await letters(client)
            copies = await client.pull("drill", max_events=100, wait_seconds=2)

    assert killed
    assert (progress.finished, progress.done, progress.failed) == (True, 100, 0)
    assert counted == Counter(str(n) for n in range(100))
    assert left == []
    assert copies == []


def _kill_and_start(server: NatsServer | KafkaCluster) -> None:
    server.kill()
    if isinstance(server, NatsServer):
        server.start()
    else:
        server.restart()
        server.wait_ready()


async def test_the_dead_letters_of_a_wildcard_are_found(config: str) -> None:
    """Of all its topics; where they lie beside the topics themselves, those are passed over."""
    wildcard = SUBSCRIPTION.replace('"drill.events"', '"drill.>"')
    with SidecarProcess(config + wildcard) as sidecar:
        async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
            await client.publish("drill.other.topic", [new_event("t", id="deep")])
            await make_dead_letters(client, 20, others=1)
            found = await letters(client)
            done = await redrive(client, DeadLetterFilter(topic="drill.other.>"))
            left = await letters(client)

    assert {letter.topic for letter in found} == {TOPIC, "drill.other.topic"}
    assert len(found) == 21
    assert done == 1
    assert len(left) == 20


async def test_without_a_place_for_marks_nothing_is_redriven_and_it_is_said_what_to_make(
    config: str, server: NatsServer | KafkaCluster
) -> None:
    """Where nothing is made by itself; the dead letters stay as they are."""
    with SidecarProcess(config + SUBSCRIPTION) as sidecar:
        async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
            await make_dead_letters(client, 5)
        sidecar.stop()
        text = sidecar.config_path.read_text(encoding="utf-8")
        for setting in ("auto_create_streams = true", "auto_create_topics = true"):
            text = text.replace(setting, "")
        sidecar.config_path.write_text(text, encoding="utf-8")
        sidecar.start()
        async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
            with pytest.raises(CallFailed) as caught:
                await redrive(client, DeadLetterFilter(subscription="drill"))
            left = await letters(client)

    assert caught.value.reason == "TOPIC_MISSING"
    assert "sidecar-dead-letter-marks" in caught.value.message
    assert "nothing may expire" in caught.value.message
    assert {letter.state for letter in left} == {"open"}
    assert len(left) == 5


async def test_two_sidecars_at_the_same_time_redrive_each_once(config: str) -> None:
    """And a third one's app, which counts, gets each once."""
    counted: Counter[str] = Counter()
    with (
        SidecarProcess(config + SUBSCRIPTION) as first,
        SidecarProcess(config + SUBSCRIPTION) as second,
    ):
        async with (
            Sidecar(f"unix:{first.grpc_socket}") as one,
            Sidecar(f"unix:{second.grpc_socket}") as other,
        ):
            await make_dead_letters(one, 400)
            wanted = DeadLetterFilter(subscription="drill")
            done = await asyncio.gather(redrive(one, wanted), redrive(other, wanted))
            async with one.subscribe("drill", credit=500) as deliveries:
                async for delivery in deliveries:
                    counted[delivery.event.id] += 1
                    delivery.ack()
                    if counted.total() == 400:
                        break
            left = await letters(other)

    assert sum(done) == 400
    assert min(done) > 0
    assert counted == Counter(str(n) for n in range(400))
    assert left == []


async def test_what_is_discarded_is_gone_for_all_and_not_published(config: str) -> None:
    with (
        SidecarProcess(config + SUBSCRIPTION) as first,
        SidecarProcess(config + SUBSCRIPTION) as second,
    ):
        async with (
            Sidecar(f"unix:{first.grpc_socket}") as one,
            Sidecar(f"unix:{second.grpc_socket}") as other,
        ):
            await make_dead_letters(one, 20)
            wanted = DeadLetterFilter(key="wanted")
            *_, last = [told async for told in one.dead_letters.discard(wanted)]
            left = await letters(other)
            again = await redrive(other, wanted)

    assert last.done == 6
    assert again == 0
    assert {letter.event.key for letter in left} == {"other"}
    assert len(left) == 14


async def test_generation_counts_the_round_trips(config: str) -> None:
    """Redriven and rejected again, an event is a dead letter for the second time, then the third."""
    generations = []
    ids = []
    with SidecarProcess(config + SUBSCRIPTION) as sidecar:
        async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
            await client.publish(TOPIC, [new_event("t", {"a": 1}, id=fresh("event"))])
            for round_ in range(3):
                async with client.subscribe("drill") as deliveries:
                    async for delivery in deliveries:
                        delivery.reject(f"round {round_}")
                        await until(lambda: _one_is_open(client), seconds=30)
                        break
                [letter] = await letters(client)
                generations.append(letter.generation)
                ids.append(letter.id)
                assert letter.error == f"round {round_}"
                assert await redrive(client, DeadLetterFilter(ids=[letter.id])) == 1

    assert generations == [1, 2, 3]
    assert len(set(ids)) == 3


async def _one_is_open(client: Sidecar) -> bool:
    return len(await letters(client)) == 1


async def test_what_is_listed_and_shown_is_the_event_as_it_was(config: str) -> None:
    event = new_event(
        "order.created", {"order": 1}, id="1", source="/shop", key="k", headers={"baggage": "a=b"}
    )
    with SidecarProcess(config + SUBSCRIPTION) as sidecar:
        async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
            [receipt] = await client.publish(TOPIC, [event])
            async with client.subscribe("drill") as deliveries:
                async for delivery in deliveries:
                    delivery.reject("no such customer")
                    await until(lambda: _one_is_open(client), seconds=30)
                    break
            [listed] = await letters(client)
            shown = await client.dead_letters.get(listed.id)

    assert (listed.event.data, listed.data_bytes) == (None, len(event.data or b""))
    assert shown.event.data == event.data
    assert (shown.event.id, shown.event.type, shown.event.key) == ("1", "order.created", "k")
    assert shown.event.headers == {"baggage": "a=b"}
    assert (shown.broker, shown.topic, shown.position) == ("work", TOPIC, receipt.position)  # type: ignore[union-attr]
    assert (shown.reason, shown.error, shown.attempts) == ("rejected", "no such customer", 1)
