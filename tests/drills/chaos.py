"""Two sidecars, apps that do whatever apps do, and a kill or a stop every few seconds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.support.app import Client, Stream
from tests.support.kafka import KafkaCluster
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

EVENTS = 20_000
KEYS = 50
ATTEMPTS = 4
BATCH = 500
BLOWS = 6
"""How often a sidecar is killed or stopped."""
QUIET_SECONDS = 25.0
"""Nothing came for so long: what is missing then is taken for lost."""
LAST_SECONDS = 6.0
"""All is done, and nothing came for so long: then it is over."""

ON_JETSTREAM = """
[brokers.work]
type = "jetstream"
servers = ["{server}"]
auto_create_streams = true
ack_wait_seconds = 3
"""
ON_KAFKA = """
[brokers.work]
type = "kafka"
bootstrap_servers = ["{server}"]
auto_create_topics = true
topic_partitions = 3
session_timeout_seconds = 3
"""
CONFIG = """
drain = {{ timeout_seconds = 2 }}
{broker}
[[subscriptions]]
name = "chaos"
topic = "chaos.made"
lease_seconds = 2
retry = {{ max_attempts = 4, max_crashes = 15, initial_seconds = 0.01, max_seconds = 0.05 }}

[[subscriptions]]
name = "dead"
topic = "{dead}"
"""


@dataclass
class Report:
    """What the apps saw."""

    events: int
    first: dict[int, float] = field(default_factory=dict)
    """When each event was first delivered."""
    attempts: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    acked: Counter[int] = field(default_factory=Counter)
    letters: Counter[int] = field(default_factory=Counter)
    kills: int = 0

    @property
    def out_of_order(self) -> int:
        """First deliveries that came before that of an earlier event of the key."""
        count = 0
        for key in range(KEYS):
            times = [self.first[n] for n in range(key, self.events, KEYS) if n in self.first]
            count += sum(one > other for one, other in itertools.pairwise(times))
        return count

    @property
    def claims(self) -> Sequence[tuple[str, bool]]:
        done = self.acked.keys() | self.letters.keys()
        highest = Counter(max(numbers) for numbers in self.attempts.values())
        again = sum(count - 1 for count in self.acked.values())
        twice = sum(count > 1 for count in self.letters.values())
        return (
            (
                (
                    f"{self.events} events, {len(self.acked)} acked by an app ({again} once more, after "
                    f"{self.kills} kills), {len(self.letters)} dead letters, {twice} of them twice"
                ),
                len(done) == self.events and not twice,
            ),
            (
                f"highest attempt of each event {dict(sorted(highest.items()))}, of {ATTEMPTS}",
                max(highest) <= ATTEMPTS,
            ),
            (
                f"first deliveries out of order within a key: {self.out_of_order}",
                not self.out_of_order,
            ),
        )

    @property
    def holds(self) -> bool:
        return all(good for _, good in self.claims)

    def text(self) -> str:
        return "\n".join(
            f"   {text}: {'HOLDS' if good else 'DOES NOT HOLD'}" for text, good in self.claims
        )


async def chaos(events: int) -> Report:
    """acks, nacks, rejects, silence and broken streams on JetStream, over kills and stops"""
    with NatsServer() as server:
        broker = ON_JETSTREAM.format(server=server.url)
        return await _run(CONFIG.format(broker=broker, dead="dlq.chaos.made"), events)


async def kafka_chaos(events: int) -> Report:
    """acks, nacks, rejects, silence and broken streams on Kafka, over kills and stops"""
    with KafkaCluster(config={"group.consumer.session.timeout.ms": "3000"}) as cluster:
        broker = ON_KAFKA.format(server=cluster.bootstrap_servers)
        return await _run(CONFIG.format(broker=broker, dead="chaos.made.dlq"), events)


async def _run(config: str, events: int) -> Report:
    report = Report(events)
    chance = random.Random(events)
    with SidecarProcess(config) as one, SidecarProcess(config) as other:
        async with Client(one) as client:
            for first in range(0, events, BATCH):
                batch = [_event(n) for n in range(first, min(first + BATCH, events))]
                await client.publish_events("chaos.made", batch)
        async with asyncio.TaskGroup() as tasks:
            apps = [tasks.create_task(_app(s, report, chance)) for s in (one, other)]
            began = time.monotonic()
            for _ in range(BLOWS):
                await asyncio.sleep(chance.uniform(2, 4))
                await _strike(chance.choice([one, other]), report, chance)
                print(
                    f"   {time.monotonic() - began:3.0f} s: acked {len(report.acked)}, "
                    f"killed so far {report.kills}",
                    flush=True,
                )
            await _quiet(one, report)
            for app in apps:
                app.cancel()
    return report


def _event(number: int) -> ev.Event:
    return ev.Event(id=str(number), source="d", type="t", key=str(number % KEYS))


async def _strike(sidecar: SidecarProcess, report: Report, chance: random.Random) -> None:
    if chance.random() < 0.5:
        report.kills += 1
        await asyncio.to_thread(sidecar.kill)
    else:
        await asyncio.to_thread(sidecar.stop)
    await asyncio.sleep(chance.uniform(0, 1))
    await asyncio.to_thread(sidecar.start)


async def _quiet(sidecar: SidecarProcess, report: Report) -> None:
    """Take the dead letters, until all is done or nothing comes any more."""
    last, before = time.monotonic(), (-1, -1, -1)
    while (still := time.monotonic() - last) < QUIET_SECONDS:
        async with Client(sidecar) as client:
            request = pb.PullRequest(subscription="dead", max_events=500)
            request.wait.FromSeconds(1)
            for delivery in await client.pull_request(request):
                report.letters[int(delivery.event.id)] += 1
                await client.settle(delivery.token, pb.VERDICT_ACK)
        deliveries = sum(map(len, report.attempts.values()))
        now = len(report.acked), report.letters.total(), deliveries
        if now != before:
            before, last = now, time.monotonic()
        done = len(report.acked.keys() | report.letters.keys())
        if done == report.events and still > LAST_SECONDS:
            return


async def _app(sidecar: SidecarProcess, report: Report, chance: random.Random) -> None:
    """Consumes for ever, over whatever happens to it and to its sidecar."""
    while True:
        with contextlib.suppress(
            grpc.aio.AioRpcError, asyncio.InvalidStateError, AssertionError, _Broken
        ):
            async with Client(sidecar) as client:
                stream = await client.open("chaos", chance.choice([5, 50, 200]))
                await _consume(stream, report, chance)
        await asyncio.sleep(0.1)


class _Broken(Exception):
    """The app broke its stream."""


async def _consume(stream: Stream, report: Report, chance: random.Random) -> None:
    while (message := await stream.call.read()) is not grpc.aio.EOF:
        settlements = []
        for delivery in message.deliveries:
            number = int(delivery.event.id)
            report.first.setdefault(number, time.monotonic())
            report.attempts[number].append(delivery.attempt)
            verdict = _verdict(chance.random())
            if verdict == pb.VERDICT_ACK:
                report.acked[number] += 1
            if verdict is not None:
                settlements.append(pb.Settlement(token=delivery.token, verdict=verdict))
        answer = pb.SubscribeRequest(settlements=settlements, credit=len(message.deliveries))
        await stream.call.write(answer)
        if chance.random() < 0.01:
            stream.call.cancel()
            raise _Broken


def _verdict(at: float) -> pb.Verdict | None:
    """None: the app says nothing, and the lease ends."""
    for share, verdict in (
        (0.80, pb.VERDICT_ACK),
        (0.95, pb.VERDICT_NACK),
        (0.97, pb.VERDICT_REJECT),
    ):
        if at < share:
            return verdict
    return None


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "chaos": chaos,
    "kafka_chaos": kafka_chaos,
}
