"""Promises of delivery that are the same on JetStream and Kafka: attempts, crashes, the orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.conformance.harness import fresh
from tests.support.app import Client
from tests.support.kafka import KafkaCluster, require
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parents[1]
ON_JETSTREAM = """
drain = {{ timeout_seconds = {drain} }}

[brokers.work]
type = "jetstream"
servers = ["{server}"]
auto_create_streams = true
ack_wait_seconds = 3
"""
ON_KAFKA = """
drain = {{ timeout_seconds = {drain} }}

[brokers.work]
type = "kafka"
bootstrap_servers = ["{server}"]
auto_create_topics = true
topic_partitions = 1
session_timeout_seconds = 3
"""
SUBSCRIPTION = """
[[subscriptions]]
name = "{name}"
topic = "{topic}"
retry = {{ max_attempts = {attempts}, initial_seconds = 0.001, max_seconds = 0.001 }}

[[subscriptions]]
name = "{name}-dead"
topic = "{dead}"
"""


@pytest.fixture(scope="module", params=["jetstream", "kafka"])
def broker(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The type, and where it listens."""
    if request.param == "jetstream":
        with NatsServer() as server:
            yield "jetstream", server.url
        return
    require()
    config = {"group.consumer.session.timeout.ms": "3000"}
    with KafkaCluster(config=config) as cluster:
        yield "kafka", cluster.bootstrap_servers


class Setting:
    """One topic, its subscription, and the configuration of the sidecars that share it."""

    def __init__(self, broker: tuple[str, str], *, attempts: int, drain: int = 3) -> None:
        kind, server = broker
        self.name = fresh("promise")
        self.topic = f"{self.name}.made"
        self.dead = f"{self.topic}.dlq" if kind == "kafka" else f"dlq.{self.topic}"
        template = ON_KAFKA if kind == "kafka" else ON_JETSTREAM
        self.config = template.format(server=server, drain=drain) + SUBSCRIPTION.format(
            name=self.name, topic=self.topic, dead=self.dead, attempts=attempts
        )

    async def letters(self, sidecar: SidecarProcess, count: int) -> list[ev.Event]:
        """The dead letters: exactly *count*; one more event after them says that these are all."""
        async with Client(sidecar) as client:
            last = f"last of {self.name}"  # all dead letters are in one stream: its ids are unique
            await client.publish_events(self.dead, [event(last)])
            found: list[ev.Event] = []
            async with asyncio.timeout(30):
                while not found or found[-1].id != last:
                    found += [d.event for d in await taken(client, f"{self.name}-dead")]
        assert len(found) == count + 1, [one.id for one in found]
        return found[:-1]


def event(id: str, **attributes: Any) -> ev.Event:  # noqa: A002 - as CloudEvents calls it
    return ev.Event(id=id, **{"source": "s", "type": "t", "key": "k", **attributes})


async def taken(client: Client, subscription: str) -> list[pb.Delivery]:
    """Pull once, and ack what came."""
    request = pb.PullRequest(subscription=subscription, max_events=100)
    request.wait.FromSeconds(5)
    deliveries = await client.pull_request(request)
    for delivery in deliveries:
        await client.settle(delivery.token, pb.VERDICT_ACK)
    return deliveries


async def next_of(client: Client, subscription: str) -> pb.Delivery:
    """Pull until one comes: what a killed sidecar had takes a few seconds."""
    request = pb.PullRequest(subscription=subscription, max_events=1)
    request.wait.FromSeconds(5)
    async with asyncio.timeout(45):
        while True:
            deliveries = await client.pull_request(request)
            if deliveries:
                return deliveries[0]


@asynccontextmanager
async def running(*sidecars: SidecarProcess) -> AsyncIterator[None]:
    for sidecar in sidecars:
        await asyncio.to_thread(sidecar.start)
    try:
        yield
    finally:
        for sidecar in sidecars:
            await asyncio.to_thread(sidecar.close)


# -- attempts


@pytest.mark.timeout(150)
async def test_max_attempts_is_exact_over_a_kill_a_drain_and_a_second_replica(
    broker: tuple[str, str],
) -> None:
    """
    Failed at A, `kill -9` of A, failed at B, in B's hands when it drains, failed at A: three
    deliveries that count, one dead letter, and the one that was released comes with its number.
    """
    setting = Setting(broker, attempts=3)
    a, b = SidecarProcess(setting.config), SidecarProcess(setting.config)
    attempts: list[int] = []
    async with running(a, b):
        async with Client(a) as client:
            await client.publish_events(setting.topic, [event("1"), event("2")])
            delivery = await next_of(client, setting.name)
            attempts.append(delivery.attempt)
            await client.settle(delivery.token, pb.VERDICT_NACK, delay=0.0)
            # It is recorded before it comes again, so the kill interrupts the second delivery.
            interrupted = await next_of(client, setting.name)
        await asyncio.to_thread(a.kill)
        async with Client(b) as client:
            delivery = await next_of(client, setting.name)
            attempts.append(delivery.attempt)
            await client.settle(delivery.token, pb.VERDICT_NACK, delay=0.0)
            released = await next_of(client, setting.name)
            attempts.append(released.attempt)
        await asyncio.to_thread(b.stop)
        await asyncio.to_thread(a.start)
        async with Client(a) as client:
            delivery = await next_of(client, setting.name)
            attempts.append(delivery.attempt)
            await client.settle(delivery.token, pb.VERDICT_NACK, delay=0.0)
            after = await next_of(client, setting.name)
            await client.settle(after.token, pb.VERDICT_ACK)
        [letter] = await setting.letters(a, 1)
        await asyncio.to_thread(b.start)

    assert interrupted.attempt == 2  # by the kill, half-way: it may happen once more
    assert attempts == [1, 2, 3, 3]
    assert (after.event.id, after.attempt) == ("2", 1)
    assert letter.id == "1"
    assert letter.headers["sidecar-dead-letter-attempts"] == "3"
    assert letter.headers["sidecar-dead-letter-reason"] == "attempts_exhausted"
    assert letter.headers["sidecar-dead-letter-generation"] == "1"
    assert (
        letter.headers["sidecar-dead-letter-first-failed"]
        < letter.headers["sidecar-dead-letter-time"]
    )


# -- crashes


class FragileApp:
    """tests/support/fragile_app.py, started again as often as it is asked to."""

    def __init__(self, sidecar: SidecarProcess, subscription: str) -> None:
        self._arguments = (str(sidecar.grpc_socket), subscription)
        self.lines: list[str] = []

    async def run(self, until_line: str = "") -> int:
        """Until it ends (its exit status), or says this line (-1; it is ended then)."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.fragile_app",
            *self._arguments,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(45):
                async for line in process.stdout:
                    self.lines.append(line.decode().strip())
                    if self.lines[-1] == until_line:
                        return -1
                return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.timeout(150)
async def test_a_poison_event_that_crashes_the_app_three_times_is_quarantined_and_its_key_goes_on(
    broker: tuple[str, str],
) -> None:
    """A real app that ends itself; with a `kill -9` of the sidecar between the second crash and the third."""
    setting = Setting(broker, attempts=10)
    sidecar = SidecarProcess(setting.config)
    async with running(sidecar):
        async with Client(sidecar) as client:
            poison = event("poison", data=b"poison")
            await client.publish_events(
                setting.topic, [event("1"), poison, event("2"), event("3", key="other")]
            )
        app = FragileApp(sidecar, setting.name)
        ends = [await app.run(), await app.run()]
        # It is noticed, and ready for the next try: so the broker knows of the second crash.
        await until(lambda: sidecar.metric("sidecar_in_flight_events") == 0)
        await until(lambda: sidecar.metric("sidecar_retry_waiting_events") == 0)
        await asyncio.to_thread(sidecar.kill)
        await asyncio.to_thread(sidecar.start)
        ends.append(await app.run())
        ends.append(await app.run(until_line="2 1"))
        [letter] = await setting.letters(sidecar, 1)

    assert ends == [3, 3, 3, -1]
    assert sorted({line.partition(" ")[0] for line in app.lines}) == ["1", "2", "3"]
    assert app.lines.count("1 1") == 1
    assert letter.id == "poison"
    assert letter.headers["sidecar-dead-letter-reason"] == "app_crash"
    assert letter.headers["sidecar-dead-letter-attempts"] == "3"


class PushedApp:
    """tests/support/pushed_app.py, which is started again when it ended, as a supervisor does."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self.lines: list[str] = []
        self.ends: list[int] = []

    async def supervise(self) -> None:
        while True:
            self._socket.unlink(missing_ok=True)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.support.pushed_app",
                str(self._socket),
                stdout=asyncio.subprocess.PIPE,
                cwd=ROOT,
            )
            assert process.stdout is not None
            try:
                async for line in process.stdout:
                    self.lines.append(line.decode().strip())
                self.ends.append(await process.wait())
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()


@pytest.mark.timeout(150)
async def test_a_poison_event_that_is_pushed_is_quarantined_too(
    broker: tuple[str, str], tmp_path: Path
) -> None:
    """Its app ends three times, and is started again each time; what is around it is done once."""
    setting = Setting(broker, attempts=10)
    socket = tmp_path / "app.sock"
    pushed = setting.config.replace(
        f'topic = "{setting.topic}"\n',
        f'topic = "{setting.topic}"\npush = {{ url = "unix://{socket}:/events" }}\n',
    )
    sidecar = SidecarProcess(pushed)
    app = PushedApp(socket)
    async with running(sidecar):
        supervising = asyncio.create_task(app.supervise())
        async with Client(sidecar) as client:
            events = [event(str(n), key=str(n % 3)) for n in range(60)]
            events.insert(30, event("poison", key="1", data=b"poison"))
            await client.publish_events(setting.topic, events)
        # Each crash doubles the pause before the app is probed, and it may be one right after another.
        await until(lambda: sum(line.startswith("done") for line in app.lines) >= 60, seconds=40)
        [letter] = await setting.letters(sidecar, 1)
        supervising.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await supervising

    done = [line.split()[1] for line in app.lines if line.startswith("done")]
    assert app.ends == [3, 3, 3]
    assert sorted(done, key=int) == [str(n) for n in range(60)]
    for key in range(3):
        assert [n for n in map(int, done) if n % 3 == key] == list(range(key, 60, 3))
    assert letter.id == "poison"
    assert letter.headers["sidecar-dead-letter-reason"] == "app_crash"
    assert letter.headers["sidecar-dead-letter-attempts"] == "3"


# -- the orderly stop


@pytest.mark.timeout(120)
async def test_sigterm_with_200_in_flight_settles_or_releases_all_and_counts_none(
    broker: tuple[str, str],
) -> None:
    """The app acks 80 of them while it drains. The next start delivers the other 320, with attempt 1."""
    setting = Setting(broker, attempts=1)
    sidecar = SidecarProcess(setting.config)
    async with running(sidecar):
        async with Client(sidecar) as client:
            events = [event(str(n), key=str(n)) for n in range(400)]
            await client.publish_events(setting.topic, events)
            stream = await client.open(setting.name, 200)
            out: list[pb.Delivery] = []
            async with asyncio.timeout(30):
                while len(out) < 200:
                    out += (await stream.call.read()).deliveries
            stopping = asyncio.create_task(asyncio.to_thread(sidecar.stop))
            await until(lambda: sidecar.admin("readyz")[0] == 503)
            acked = out[:80]
            settlements = [pb.Settlement(token=d.token, verdict=pb.VERDICT_ACK) for d in acked]
            await stream.call.write(pb.SubscribeRequest(settlements=settlements))
            status = await stopping
        await asyncio.to_thread(sidecar.start)
        async with Client(sidecar) as client:
            stream = await client.open(setting.name, 1000)
            rest = await stream.take(320)
            await client.publish_events(setting.topic, [event("999")])
            last = await stream.take(1)
            await stream.leave()
        assert await setting.letters(sidecar, 0) == []

    assert status == 0
    assert len(out) == 200
    assert {attempt for _, attempt in rest} == {1}
    assert sorted(number for number, _ in rest) == sorted(
        set(range(400)) - {int(d.event.id) for d in acked}
    )
    assert last == [(999, 1)]
