"""Two sidecars share one subscription on a real JetStream, while things are stopped and killed."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

TOPIC = "drill.events"
KEYS = 1000
BATCH = 100
WINDOW = 32
DATA = b"x" * 1024
QUIET_SECONDS = 35.0
"""Longer than the ack wait: what comes again has come by then."""
LATE_SECONDS = 25.0
"""Later than this after the disturbance is what its ack wait, 30 s, held back."""
CONFIG = """
[brokers.work]
type = "jetstream"
servers = ["{url}"]
auto_create_streams = true
reconnect_seconds = 0.5

[publishing]
timeout_seconds = 60

[[subscriptions]]
name = "drill"
topic = "drill.>"
max_in_flight = 1000
"""


@dataclass
class View:
    """What one consumer saw: (number of the event, loop time), in order."""

    seen: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Report:
    """What was counted, and whether the claims hold."""

    events: int
    acknowledged: set[int]
    failed: Counter[str]
    views: dict[str, View]
    duplicate_receipts: int
    disturbed_at: float | None

    def __post_init__(self) -> None:
        counts = Counter(number for view in self.views.values() for number, _ in view.seen)
        self.missing = self.acknowledged - counts.keys()
        self.unknown = counts.keys() - self.acknowledged
        self.again = sum(count - 1 for count in counts.values())
        late_from = math.inf if self.disturbed_at is None else self.disturbed_at + LATE_SECONDS
        self.late = sum(t >= late_from for view in self.views.values() for _, t in view.seen)
        self.disorder = {name: _disorder(view, late_from) for name, view in self.views.items()}

    @property
    def holds(self) -> bool:
        return (
            not self.missing
            and not any(self.disorder.values())
            and (
                self.disturbed_at is not None
                or (self.again == 0 and len(self.acknowledged) == self.events)
            )
        )

    def text(self) -> str:
        seen = {name: len(view.seen) for name, view in self.views.items()}
        again = f"delivered again: {self.again} (given again after the ack wait: {self.late}; "
        lines = (
            f"published {self.events}, acknowledged {len(self.acknowledged)}",
            f"failed {dict(self.failed)}, receipts marked duplicate {self.duplicate_receipts}",
            f"deliveries by sidecar {seen}",
            f"acknowledged and missing: {len(self.missing)}",
            again + f"delivered, never acknowledged: {len(self.unknown)})",
            f"out of order, but for those given again: {self.disorder}",
            "HOLDS" if self.holds else "DOES NOT HOLD",
        )
        return "\n".join(f"   {line}" for line in lines)


def _disorder(view: View, late_from: float) -> int:
    """
    Deliveries that came behind a later event of their key, but for those that came late.

    Late is what the broker gave again after its ack wait: what a sidecar that is gone had, or
    whose ack was lost. Its successors may have been handled meanwhile, by whoever got them.
    """
    newest: dict[int, int] = defaultdict(lambda: -1)
    wrong = 0
    for number, when in view.seen:
        key = number % KEYS
        wrong += number < newest[key] and when < late_from
        newest[key] = max(newest[key], number)
    return wrong


class Drill:
    """One run: a server, two sidecars, a publisher on the first, a consumer on each."""

    def __init__(
        self, server: NatsServer, sidecars: dict[str, SidecarProcess], events: int
    ) -> None:
        self.server = server
        self.sidecars = sidecars
        self.events = events
        self.acknowledged: set[int] = set()
        self.failed: Counter[str] = Counter()
        self.duplicates = 0
        self.views = {name: View() for name in sidecars}
        self.last_delivery = 0.0
        self.disturbed_at = 0.0

    async def run(self, disturb: Callable[[Drill], Coroutine[None, None, None]] | None) -> Report:
        async with asyncio.TaskGroup() as tasks:
            consumers = [tasks.create_task(self._consume(name)) for name in self.sidecars]
            disturbing = tasks.create_task(disturb(self)) if disturb else None
            await self._publish("a")
            if disturbing is not None:
                await disturbing
            await self._all_seen(quiet=QUIET_SECONDS if disturb else 2.0)
            for consumer in consumers:
                consumer.cancel()
        return Report(
            self.events,
            self.acknowledged,
            self.failed,
            self.views,
            self.duplicates,
            disturbed_at=self.disturbed_at if disturb else None,
        )

    async def half(self) -> None:
        """Wait until half of the events are published."""
        while len(self.acknowledged) < self.events // 2:
            await asyncio.sleep(0.01)
        self.disturbed_at = asyncio.get_running_loop().time()

    async def _all_seen(self, quiet: float) -> None:
        """Until everything acknowledged was delivered and nothing came for *quiet* seconds."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(300):
            while True:
                seen = {number for view in self.views.values() for number, _ in view.seen}
                still = loop.time() - self.last_delivery
                if still > quiet and (self.acknowledged <= seen or still > 60):
                    return
                await asyncio.sleep(0.5)

    async def _publish(self, name: str) -> None:
        async with _channel(self.sidecars[name]) as channel:
            call = channel.stream_stream(
                "/sidecar.v1.PubSub/PublishStream",
                request_serializer=pb.PublishStreamRequest.SerializeToString,
                response_deserializer=pb.PublishStreamResponse.FromString,
            )()
            room = asyncio.Semaphore(WINDOW)
            batches = self.events // BATCH

            async def answers() -> None:
                for _ in range(batches):
                    self._count(await call.read())
                    room.release()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(answers())
                for batch in range(batches):
                    await room.acquire()
                    await call.write(_request(batch))
            await call.done_writing()

    def _count(self, response: pb.PublishStreamResponse) -> None:
        if response.HasField("failure"):
            self.failed[response.failure.reason] += BATCH
        first = response.sequence * BATCH
        for index, result in enumerate(response.results):
            if result.HasField("receipt"):
                self.acknowledged.add(first + index)
                self.duplicates += result.receipt.duplicate
            else:
                self.failed[result.failure.reason] += 1

    async def _consume(self, name: str) -> None:
        """Consume and ack, reconnecting for ever, as an app would."""
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async with _channel(self.sidecars[name]) as channel:
                    await self._consume_once(name, channel)
            await asyncio.sleep(0.2)

    async def _consume_once(self, name: str, channel: grpc.aio.Channel) -> None:
        call = channel.stream_stream(
            "/sidecar.v1.PubSub/Subscribe",
            request_serializer=pb.SubscribeRequest.SerializeToString,
            response_deserializer=pb.SubscribeResponse.FromString,
        )()
        await call.write(
            pb.SubscribeRequest(open=pb.SubscribeOpen(subscription="drill"), credit=1000)
        )
        view, loop = self.views[name], asyncio.get_running_loop()
        while (message := await call.read()) is not grpc.aio.EOF:
            for delivery in message.deliveries:
                self.last_delivery = loop.time()
                view.seen.append((int(delivery.event.id), self.last_delivery))
            if message.deliveries:
                await call.write(
                    pb.SubscribeRequest(
                        settlements=[
                            pb.Settlement(token=d.token, verdict=pb.VERDICT_ACK)
                            for d in message.deliveries
                        ],
                        credit=len(message.deliveries),
                    )
                )


def _request(batch: int) -> pb.PublishStreamRequest:
    first = batch * BATCH
    return pb.PublishStreamRequest(
        sequence=batch,
        topic=TOPIC,
        events=[
            ev.Event(
                id=str(number),
                source="drill",
                type="drill.event",
                key=str(number % KEYS),
                data=DATA,
            )
            for number in range(first, first + BATCH)
        ],
    )


def _channel(sidecar: SidecarProcess) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        f"unix:{sidecar.grpc_socket}",
        options=[
            ("grpc.max_receive_message_length", 64 * 1024 * 1024),
            # The sidecar comes back within a second; so do we.
            ("grpc.max_reconnect_backoff_ms", 500),
        ],
    )


@contextlib.asynccontextmanager
async def _drill(events: int) -> AsyncIterator[Drill]:
    with NatsServer() as server:
        config = CONFIG.format(url=server.url)
        with SidecarProcess(config) as a, SidecarProcess(config) as b:
            yield Drill(server, {"a": a, "b": b}, events)


async def undisturbed(events: int) -> Report:
    """nothing happens: every id exactly once, order per key right"""
    async with _drill(events) as drill:
        return await drill.run(None)


async def server_stopped(events: int) -> Report:
    """nats-server is stopped for 5 s in the middle"""

    async def disturb(drill: Drill) -> None:
        await drill.half()
        await asyncio.to_thread(drill.server.stop)
        await asyncio.sleep(5)
        await asyncio.to_thread(drill.server.start)

    async with _drill(events) as drill:
        return await drill.run(disturb)


async def sidecar_killed(events: int) -> Report:
    """kill -9 of the consuming sidecar b in the middle; it is started again"""

    async def disturb(drill: Drill) -> None:
        await drill.half()
        await asyncio.to_thread(drill.sidecars["b"].kill)
        await asyncio.sleep(2)
        await asyncio.to_thread(drill.sidecars["b"].restart)

    async with _drill(events) as drill:
        return await drill.run(disturb)


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "undisturbed": undisturbed,
    "server_stopped": server_stopped,
    "sidecar_killed": sidecar_killed,
}
