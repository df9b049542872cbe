"""One partition, 100 keys, one of which fails: what that costs the other 99."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.support.app import Client, spec_of
from tests.support.kafka import KafkaCluster
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

EVENTS = 20_000
KEYS = 100
FAILING = "7"
FAILURES = 5
DELAY_SECONDS = 1
ROUNDS = 3
BATCH = 500
SLOWER = 1.25
"""Times as long at most; two runs of the same differ by this much on a busy machine."""
CONFIG = """
[brokers.log]
type = "kafka"
bootstrap_servers = ["{servers}"]
auto_create_topics = true
topic_partitions = 1
"""


@dataclass
class Run:
    """How long it took: the other keys, and the failing one."""

    others: float = 0.0
    failing: float = 0.0


class Report:
    """Runs in turn, without and with the failing key."""

    def __init__(self, events: int, plain: list[Run], failing: list[Run]) -> None:
        self._events = events
        self._plain = [run.others for run in plain]
        self._others = [run.others for run in failing]
        self._failing = [run.failing for run in failing]

    @property
    def ratio(self) -> float:
        return statistics.median(self._others) / statistics.median(self._plain)

    @property
    def holds(self) -> bool:
        return self.ratio <= SLOWER

    def text(self) -> str:
        lines = (
            (
                f"{self._events} events, {KEYS} keys, one partition; seconds until the other "
                f"{KEYS - 1} keys are done"
            ),
            f"without a failing key: {_seconds(self._plain)}",
            f"with one that fails {FAILURES} times, {DELAY_SECONDS} s apart: {_seconds(self._others)}",
            f"the failing key itself: {_seconds(self._failing)}",
            f"{self.ratio:.2f} times as long (medians)",
            "HOLDS" if self.holds else "DOES NOT HOLD",
        )
        return "\n".join(f"   {line}" for line in lines)


def _seconds(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


async def kafka_failing_key(events: int) -> Report:
    """one key of 100 fails five times, a second apart: the others are done as soon as without it"""
    runs: dict[bool, list[Run]] = {False: [], True: []}
    with KafkaCluster() as cluster:
        config = CONFIG.format(servers=cluster.bootstrap_servers)
        with SidecarProcess(config) as sidecar:
            async with Client(sidecar) as client:
                for number in range(ROUNDS):
                    for fails in (False, True):
                        topic = f"drill-{number}-{fails}".lower()
                        runs[fails].append(await _run(client, topic, events, fails=fails))
    return Report(events, runs[False], runs[True])


async def _run(client: Client, topic: str, events: int, *, fails: bool) -> Run:
    for first in range(0, events, BATCH):
        await client.publish_events(
            topic,
            [
                ev.Event(
                    id=str(n), source="drill", type="drill", key=str(n % KEYS), data=b"x" * 1024
                )
                for n in range(first, first + BATCH)
            ],
        )
    spec = spec_of(topic)
    spec.retry.max_attempts = FAILURES + 5
    stream = await client.subscribe(spec, 1000)
    clock = asyncio.get_running_loop().time
    started = clock()
    run = Run()
    left = {True: events // KEYS, False: events - events // KEYS}
    async with asyncio.timeout(120):
        while any(left.values()):
            deliveries = (await stream.call.read()).deliveries
            settlements = [_verdict(d, fails=fails) for d in deliveries]
            for delivery, settlement in zip(deliveries, settlements, strict=True):
                if settlement.verdict == pb.VERDICT_ACK:
                    left[delivery.event.key == FAILING] -= 1
            if not left[False] and not run.others:
                run.others = clock() - started
            await stream.call.write(
                pb.SubscribeRequest(settlements=settlements, credit=len(deliveries))
            )
    run.failing = clock() - started
    await stream.leave()
    return run


def _verdict(delivery: pb.Delivery, *, fails: bool) -> pb.Settlement:
    if fails and delivery.event.id == FAILING and delivery.attempt <= FAILURES:
        settlement = pb.Settlement(token=delivery.token, verdict=pb.VERDICT_NACK)
        settlement.delay.FromSeconds(DELAY_SECONDS)
        return settlement
    return pb.Settlement(token=delivery.token, verdict=pb.VERDICT_ACK)


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "kafka_failing_key": kafka_failing_key
}
