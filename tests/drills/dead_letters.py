"""A redrive by filter that is killed half-way and called again: each letter once, the others stay."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sidecar.client import DeadLetterFilter, PublishFailed, Sidecar, new_event
from tests.support.kafka import KafkaCluster
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import ROOT, SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sidecar.client import Delivery

EVENTS = 1000
WANTED_OF_TEN = 3
RATE = 50.0
TOPIC = "drill.events"
QUIET_SECONDS = 3.0
LIMIT_SECONDS = 180.0
SUBSCRIPTION = """
[[subscriptions]]
name = "drill"
topic = "drill.events"
retry = { max_attempts = 1 }
"""
ON_JETSTREAM = """
[brokers.work]
type = "jetstream"
servers = ["{url}"]
auto_create_streams = true
"""
ON_KAFKA = """
[brokers.work]
type = "kafka"
bootstrap_servers = ["{servers}"]
auto_create_topics = true
topic_partitions = 3
"""


def key_of(number: int) -> str:
    return "wanted" if number % 10 < WANTED_OF_TEN else "other"


@dataclass
class Report:
    """What became of *events* dead letters, of which those of the key "wanted" were redriven."""

    events: int
    delivered: Counter[str] = field(default_factory=Counter)
    """Deliveries after the redrive began, by event."""
    copies: set[object] = field(default_factory=set)
    """Positions of those."""
    before_the_kill: int = 0
    statuses: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    """Events of the dead letters that are open at the end; and by state, where all are shown."""
    states: Counter[str] = field(default_factory=Counter)

    @property
    def wanted(self) -> list[str]:
        return [str(n) for n in range(self.events) if key_of(n) == "wanted"]

    @property
    def others(self) -> list[str]:
        return [str(n) for n in range(self.events) if key_of(n) == "other"]

    @property
    def holds(self) -> bool:
        return (
            self.delivered == Counter(self.wanted)
            and 0 < self.before_the_kill < len(self.wanted)
            and sorted(self.open, key=int) == self.others
            and set(self.states) <= {"open", "redriven"}
            and self.statuses == [1, 0]
        )

    def text(self) -> str:
        twice = sum(count > 1 for count in self.delivered.values())
        missing = len(set(self.wanted) - self.delivered.keys())
        strange = len(self.delivered.keys() - set(self.wanted))
        wrong = f"twice {twice}, missing {missing}, not wanted {strange}"
        lines = (
            f"{self.events} dead letters, {len(self.wanted)} of them wanted",
            f"delivered when it was killed: {self.before_the_kill}",
            f"delivered at the end: {sum(self.delivered.values())} ({wrong})",
            f"open at the end: {len(self.open)} of {len(self.others)}; states {dict(self.states)}",
            *(
                f"the command ended with {status} after {seconds:.1f} s: {said}"
                for status, seconds, said in zip(
                    self.statuses, self.seconds, self.said, strict=True
                )
            ),
            "HOLDS" if self.holds else "DOES NOT HOLD",
        )
        return "\n".join(f"   {line}" for line in lines)


async def redriven_over_a_kill(config: str, events: int, rate: float) -> Report:
    """
    One sidecar redrives and is killed half-way; another's app counts what comes.

    The one that counts lives on: what it gets, it gets once.
    """
    report = Report(events)
    with ExitStack() as stack:
        one, other = (stack.enter_context(SidecarProcess(config + SUBSCRIPTION)) for _ in range(2))
        async with Sidecar(f"unix:{other.grpc_socket}") as client:
            await make_dead_letters(client, events)
            async with asyncio.timeout(LIMIT_SECONDS), asyncio.TaskGroup() as tasks:
                counting = tasks.create_task(_count(client, report))
                first = tasks.create_task(_redrive(one, report, rate))
                half = len(report.wanted) // 2
                await until(lambda: sum(report.delivered.values()) >= half, seconds=60)
                one.kill()
                report.before_the_kill = sum(report.delivered.values())
                await first
                await asyncio.to_thread(one.start)
                await _redrive(one, report, rate)
                await _quiet(report)
                counting.cancel()
            await _look(client, report)
    return report


async def make_dead_letters(client: Sidecar, events: int, *, others: int = 0) -> None:
    """
    So many, numbered; three of ten have the key "wanted".

    *others*: what the subscription has besides, and is rejected with them.
    """
    batch = [
        new_event("drill.event", b"x" * 1024, id=str(n), source="/drill", key=key_of(n))
        for n in range(events)
    ]
    for first in range(0, events, 100):
        answers = await client.publish(TOPIC, batch[first : first + 100])
        assert not [answer for answer in answers if isinstance(answer, PublishFailed)]
    rejected, total = 0, events + others
    async with client.subscribe("drill", credit=500) as deliveries:
        async for delivery in deliveries:
            delivery.reject("not today")
            rejected += 1
            if rejected == total:
                # The stream stays open until all are stored: an app that leaves takes back nothing.
                await until(lambda: _are_stored(client, total), seconds=60)
                break


async def _are_stored(client: Sidecar, events: int) -> bool:
    return len([letter async for letter in client.dead_letters.list()]) == events


async def _count(client: Sidecar, report: Report) -> None:
    async with client.subscribe("drill", credit=500) as deliveries:
        async for delivery in deliveries:
            report.delivered[delivery.event.id] += 1
            report.copies.add(_place(delivery))
            delivery.ack()


def _place(delivery: Delivery) -> object:
    return delivery.position


async def _redrive(sidecar: SidecarProcess, report: Report, rate: float) -> None:
    """The real command; its sidecar may be killed meanwhile."""
    words = ["dead-letters", "redrive", "--key", "wanted", "--rate", str(rate)]
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar",
        *words,
        "--socket",
        str(sidecar.grpc_socket),
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, said = await process.communicate()
    report.statuses.append(process.returncode or 0)
    report.seconds.append(time.monotonic() - began)
    report.said.append(said.decode().strip().replace("\n", " / "))


async def _quiet(report: Report) -> None:
    """Until nothing has come for a while."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        if sum(report.delivered.values()) != seen:
            seen, since = sum(report.delivered.values()), time.monotonic()
        await asyncio.sleep(0.1)


async def _look(client: Sidecar, report: Report) -> None:
    everything = DeadLetterFilter(subscription="drill")
    async for letter in client.dead_letters.list(everything, include_settled=True):
        report.states[letter.state] += 1
        if letter.state == "open":
            report.open.append(letter.event.id)


async def dead_letters_redriven(events: int) -> Report:
    """JetStream: 300 of 1,000 dead letters redriven at 50 a second, killed half-way, called again"""
    with NatsServer() as server:
        return await redriven_over_a_kill(ON_JETSTREAM.format(url=server.url), events, RATE)


async def dead_letters_redriven_kafka(events: int) -> Report:
    """Kafka: 300 of 1,000 dead letters redriven at 50 a second, killed half-way, called again"""
    with KafkaCluster() as cluster:
        config = ON_KAFKA.format(servers=cluster.bootstrap_servers)
        return await redriven_over_a_kill(config, events, RATE)


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "dead_letters_redriven": dead_letters_redriven,
    "dead_letters_redriven_kafka": dead_letters_redriven_kafka,
}
