"""A million events wait for a slow app: memory, leases, and the subscription beside it."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.drills.stage import BATCH, WINDOW
from tests.support.app import Client, Stream
from tests.support.kafka import KafkaCluster
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

EVENTS = 1_000_000
KEYS = 1000
PER_SECOND = 100
SECONDS = 90.0
"""How long the slow app works, and is looked at."""
ALONE_SECONDS = 20.0
"""How long the other subscription is measured before there is a slow one."""
OTHER_PER_SECOND = 200
CREDIT = 1000
GROWTH_BYTES = 8 * 1024 * 1024
"""Flat: the mean of the last third is no more than this above that of the first."""
SLOWER = 2.0
"""Times as late at most, by the median: two runs of the same differ by 1.5 on a busy machine."""
MIB = 1024 * 1024

CONFIG = """
[[subscriptions]]
name = "slow"
topic = "slow.made"
lease_seconds = 15

[[subscriptions]]
name = "other"
topic = "other.made"
"""
ON_JETSTREAM = """
[brokers.work]
type = "jetstream"
servers = ["{server}"]
auto_create_streams = true
"""
ON_KAFKA = """
[brokers.work]
type = "kafka"
bootstrap_servers = ["{server}"]
auto_create_topics = true
topic_partitions = 3
"""


@dataclass
class Other:
    """The subscription beside it: how late its events came, in seconds."""

    late: list[float] = field(default_factory=list)
    published: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.late)


@dataclass
class Report:
    """What was seen."""

    events: int
    handled: int = 0
    seconds: float = 0.0
    attempts: Counter[int] = field(default_factory=Counter)
    out_of_order: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)
    lag: int = 0
    alone: Other = field(default_factory=Other)
    beside: Other = field(default_factory=Other)

    @property
    def growth(self) -> float:
        third = max(1, len(self.resident) // 3)
        return statistics.mean(self.resident[-third:]) - statistics.mean(self.resident[:third])

    @property
    def claims(self) -> Sequence[tuple[str, bool]]:
        pace = self.handled / self.seconds
        last = sum(self.refused.values()) + self.out_of_order
        return (
            (
                (
                    f"{self.events} events waited, {self.lag} still do; the app handled "
                    f"{self.handled} in {self.seconds:.0f} s ({pace:.0f}/s)"
                ),
                pace > 0.9 * PER_SECOND and self.lag > 0,
            ),
            (
                (
                    f"deliveries by attempt {dict(self.attempts)}, settlements that did not count "
                    f"{dict(self.refused)}, out of order {self.out_of_order}"
                ),
                set(self.attempts) == {1} and not last,
            ),
            (
                (
                    f"resident {min(self.resident) / MIB:.1f} to {max(self.resident) / MIB:.1f} "
                    f"MiB, the last third {self.growth / MIB:+.1f} MiB above the first"
                ),
                self.growth <= GROWTH_BYTES,
            ),
            (
                (
                    f"the other subscription, {OTHER_PER_SECOND}/s: all {self.beside.published} "
                    f"came, median {self.beside.median * 1000:.1f} ms late, "
                    f"{self.alone.median * 1000:.1f} without the slow one; latest "
                    f"{max(self.beside.late) * 1000:.0f} and {max(self.alone.late) * 1000:.0f} ms"
                ),
                len(self.beside.late) == self.beside.published
                and self.beside.median <= SLOWER * self.alone.median + 0.002,
            ),
        )

    @property
    def holds(self) -> bool:
        return all(good for _, good in self.claims)

    def text(self) -> str:
        return "\n".join(
            f"   {text}: {'HOLDS' if good else 'DOES NOT HOLD'}" for text, good in self.claims
        )


async def slow_consumer(events: int) -> Report:
    """a million events wait on JetStream for an app at 100/s; another subscription is beside it"""
    with NatsServer() as server:
        return await _run(ON_JETSTREAM.format(server=server.url), events)


async def kafka_slow_consumer(events: int) -> Report:
    """a million events wait on Kafka for an app at 100/s; another subscription is beside it"""
    with KafkaCluster() as cluster:
        return await _run(ON_KAFKA.format(server=cluster.bootstrap_servers), events)


async def _run(config: str, events: int) -> Report:
    report = Report(events)
    with SidecarProcess(config + CONFIG) as sidecar:
        async with Client(sidecar) as client:
            began = time.monotonic()
            await _publish_all(client, events)
            print(f"   {events} published in {time.monotonic() - began:.0f} s", flush=True)
            await _measure(client, report.alone, ALONE_SECONDS)
            async with _slow_app(client, report), _watching(sidecar, report):
                await asyncio.sleep(5)  # it has fetched what it holds
                report.resident.clear()
                await _measure(client, report.beside, SECONDS)
            status = await client.status()
            report.lag = next(s.lag_events for s in status.subscriptions if s.name == "slow")
    return report


async def _publish_all(client: Client, events: int) -> None:
    call = client.channel.stream_stream(
        "/sidecar.v1.PubSub/PublishStream",
        request_serializer=pb.PublishStreamRequest.SerializeToString,
        response_deserializer=pb.PublishStreamResponse.FromString,
    )()
    room = asyncio.Semaphore(WINDOW)
    batches = events // BATCH

    async def answers() -> None:
        for _ in range(batches):
            response = await call.read()
            assert all(result.HasField("receipt") for result in response.results), response
            room.release()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answers())
        for batch in range(batches):
            await room.acquire()
            numbers = range(batch * BATCH, (batch + 1) * BATCH)
            await call.write(
                pb.PublishStreamRequest(
                    sequence=batch,
                    topic="slow.made",
                    events=[
                        ev.Event(
                            id=str(n), source="d", type="t", key=str(n % KEYS), data=b"x" * 256
                        )
                        for n in numbers
                    ],
                )
            )
    await call.done_writing()


@contextlib.asynccontextmanager
async def _slow_app(client: Client, report: Report) -> AsyncIterator[None]:
    """Takes all it is given and handles one each hundredth of a second."""
    stream = await client.open("slow", CREDIT)
    in_hand: deque[pb.Delivery] = deque()
    last: dict[str, int] = {}

    async def read() -> None:
        while True:
            message = await stream.call.read()
            in_hand.extend(message.deliveries)
            for delivery in message.deliveries:
                report.attempts[delivery.attempt] += 1
                number = int(delivery.event.id)
                report.out_of_order += last.get(delivery.event.key, -1) > number
                last[delivery.event.key] = number
            for result in message.rejected_settlements:
                report.refused[result.failure.reason] += 1

    async def handle() -> None:
        began = time.monotonic()
        while True:
            report.seconds = time.monotonic() - began
            due = int(report.seconds * PER_SECOND) - report.handled
            ready = [in_hand.popleft() for _ in range(min(due, len(in_hand)))]
            if ready:
                acks = [pb.Settlement(token=d.token, verdict=pb.VERDICT_ACK) for d in ready]
                await stream.call.write(pb.SubscribeRequest(settlements=acks, credit=len(acks)))
                report.handled += len(ready)
            await asyncio.sleep(0.01)

    async with _tasks(read(), handle()):
        yield
    stream.call.cancel()
    await stream.call.code()


async def _measure(client: Client, other: Other, seconds: float) -> None:
    """Publish to the other subscription at its pace, and see how late it comes."""
    stream = await client.open("other", 1000)
    async with _tasks(_receive(stream, other)):
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            due = int((time.monotonic() - began) * OTHER_PER_SECOND) - other.published
            if due > 0:
                at = f"{time.monotonic()}"
                events = [
                    ev.Event(source="d", type="t", key=str(n), data=at.encode()) for n in range(due)
                ]
                await client.publish_events("other.made", events)
                other.published += due
            await asyncio.sleep(0.005)
        async with asyncio.timeout(20):
            while len(other.late) < other.published:
                await asyncio.sleep(0.05)
    stream.call.cancel()
    await stream.call.code()


async def _receive(stream: Stream, other: Other) -> None:
    while True:
        deliveries = (await stream.call.read()).deliveries
        now = time.monotonic()
        other.late += [now - float(d.event.data) for d in deliveries]
        acks = [pb.Settlement(token=d.token, verdict=pb.VERDICT_ACK) for d in deliveries]
        await stream.call.write(pb.SubscribeRequest(settlements=acks, credit=len(acks)))


@contextlib.asynccontextmanager
async def _watching(sidecar: SidecarProcess, report: Report) -> AsyncIterator[None]:
    process = psutil.Process(sidecar.pid)

    async def look() -> None:
        while True:
            report.resident.append(process.memory_info().rss)
            if len(report.resident) % 30 == 0:
                print(
                    f"   {report.seconds:4.0f} s: handled {report.handled}, resident "
                    f"{report.resident[-1] / MIB:.1f} MiB",
                    flush=True,
                )
            await asyncio.sleep(0.5)

    async with _tasks(look()):
        yield


@contextlib.asynccontextmanager
async def _tasks(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in running:
                task.cancel()


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "slow_consumer": slow_consumer,
    "kafka_slow_consumer": kafka_slow_consumer,
}
