"""An app that is pushed to is killed, and is away for a minute: what is lost, counted, and how it returns."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sidecar.v1 import event_pb2 as ev
from tests.support.app import Client
from tests.support.kafka import KafkaCluster
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

ROOT = Path(__file__).parents[2]
EVENTS = 20_000
PER_SECOND = 200
KEYS = 500
AWAY_SECONDS = 60.0
MAX_CONCURRENCY = 16
FIRST_SECONDS = 0.3
CONFIG = """
[[subscriptions]]
name = "pushed"
topic = "pushed.made"
retry = {{ max_attempts = 2, max_crashes = 2 }}
push = {{ url = "unix://{socket}:/events", max_concurrency = {most} }}
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


class Got(NamedTuple):
    """One request, as the app saw it."""

    at: float
    life: int
    event: str
    attempt: int
    under_way: int


@dataclass
class Report:
    """What was seen."""

    events: int
    got: list[Got] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    interrupted: int = 0
    dead: float = 0.0
    back_at: float = 0.0

    @property
    def claims(self) -> Sequence[tuple[str, bool]]:
        attempts = Counter(got.attempt for got in self.got)
        returned = [got for got in self.got if got.life == 2]
        first = [g for g in returned if g.at - returned[0].at < FIRST_SECONDS]
        return (
            (
                (
                    f"{self.events} published at {PER_SECOND}/s, {len(self.done)} handled, "
                    f"{sum(self.done.values()) - len(self.done)} of them again; "
                    f"{self.dead:.0f} dead letters"
                ),
                len(self.done) == self.events and not self.dead,
            ),
            (
                (
                    f"deliveries by attempt {dict(sorted(attempts.items()))}; {self.interrupted} were "
                    "in the app's hands when it was killed"
                ),
                attempts[2] <= self.interrupted and max(attempts) <= 2,
            ),
            (
                (
                    f"back after {returned[0].at - self.back_at:.1f} s: at first one at a time "
                    f"({first[0].under_way} of the first request), at most "
                    f"{max(g.under_way for g in first)} in the first {FIRST_SECONDS:g} s, later at "
                    f"most {max(g.under_way for g in returned)} of {MAX_CONCURRENCY}"
                ),
                first[0].under_way == 1
                and max(g.under_way for g in returned) <= MAX_CONCURRENCY
                and returned[0].at - self.back_at < 8,
            ),
        )

    @property
    def holds(self) -> bool:
        return all(good for _, good in self.claims)

    def text(self) -> str:
        return "\n".join(
            f"   {text}: {'HOLDS' if good else 'DOES NOT HOLD'}" for text, good in self.claims
        )


async def push_app_down(events: int) -> Report:
    """an app that JetStream's events are pushed to is killed, and away for a minute"""
    with NatsServer() as server:
        return await _run(ON_JETSTREAM.format(server=server.url), events)


async def kafka_push_app_down(events: int) -> Report:
    """an app that Kafka's events are pushed to is killed, and away for a minute"""
    with KafkaCluster() as cluster:
        return await _run(ON_KAFKA.format(server=cluster.bootstrap_servers), events)


async def _run(config: str, events: int) -> Report:
    report = Report(events)
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "app.sock"
        push = CONFIG.format(socket=socket, most=MAX_CONCURRENCY)
        with SidecarProcess(config + push) as sidecar:
            app = await _start(report, socket, 1)
            publishing = asyncio.create_task(_publish(sidecar, events))
            await asyncio.sleep(10)
            app.kill()
            await app.wait()
            report.interrupted = len({g.event for g in report.got} - report.done.keys())
            print(f"   killed with {report.interrupted} in hand", flush=True)
            await asyncio.sleep(AWAY_SECONDS)
            report.back_at = time.monotonic()
            app = await _start(report, socket, 2)
            await publishing
            last, still = -1, time.monotonic()
            while len(report.done) < events and time.monotonic() - still < 30:
                if len(report.got) != last:
                    last, still = len(report.got), time.monotonic()
                await asyncio.sleep(0.2)
            report.dead = sidecar.metric("sidecar_dead_letters_total")
            app.terminate()
            await app.wait()
    return report


async def _publish(sidecar: SidecarProcess, events: int) -> None:
    async with Client(sidecar) as client:
        began, sent = time.monotonic(), 0
        while sent < events:
            due = min(events, int((time.monotonic() - began) * PER_SECOND))
            if due > sent:
                batch = [
                    ev.Event(id=str(n), source="d", type="t", key=str(n % KEYS))
                    for n in range(sent, due)
                ]
                await client.publish_events("pushed.made", batch)
                sent = due
            await asyncio.sleep(0.01)


async def _start(report: Report, socket: Path, life: int) -> asyncio.subprocess.Process:
    socket.unlink(missing_ok=True)  # noqa: ASYNC240 - at once
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.pushed_app",
        str(socket),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    reading = asyncio.create_task(_read(report, process, life))
    reading.add_done_callback(lambda done: done.exception())
    return process


async def _read(report: Report, process: asyncio.subprocess.Process, life: int) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        what, event, *more = line.decode().split()
        if what == "got":
            attempt, under_way = map(int, more)
            report.got.append(Got(time.monotonic(), life, event, attempt, under_way))
        else:
            report.done[event] += 1


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "push_app_down": push_app_down,
    "kafka_push_app_down": kafka_push_app_down,
}
