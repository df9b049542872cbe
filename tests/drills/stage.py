"""Sidecars that share a subscription, an app that publishes, and one at each that consumes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING

import grpc

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.drills.journal import Delivered, Journal, Life, Place, place_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.sidecar_process import SidecarProcess

TOPIC = "drill.events"
SUBSCRIPTION = "drill"
KEYS = 1000
BATCH = 100
WINDOW = 32
CREDIT = 1000
DATA = b"x" * 1024
PROGRESS_SECONDS = 5.0


def key_of(event: int) -> int:
    """
    The key of an event by its number, shifted by one each thousand.

    So every hundredth event has another key each time, until all have had one.
    """
    return (event + event // KEYS) % KEYS


class Stage:
    """
    What is on it: *sidecars* by name, the first of which takes what is published.

    *events* are numbered from 0, and the number is the id. *rate*: events published per second; 0 is
    as fast as it goes. *acks*: whether the app acks a delivery, by event and attempt; else it nacks.
    """

    def __init__(
        self,
        sidecars: dict[str, SidecarProcess],
        events: int,
        *,
        rate: float = 0,
        acks: Callable[[int, int], bool] = lambda _event, _attempt: True,
    ) -> None:
        self.sidecars = sidecars
        self.events = events
        self.journal = Journal()
        self.receipts: dict[int, Place] = {}
        self.duplicate_receipts = 0
        self.failed: Counter[str] = Counter()
        self.stops: list[tuple[int, float]] = []
        """Of each orderly stop the exit status, and how many seconds it took."""
        self._rate = rate
        self._acks = acks
        self._lives = {name: int(one.process is not None) for name, one in sidecars.items()}

    # -- the sidecars

    async def start(self, name: str) -> None:
        self._lives[name] += 1
        await asyncio.to_thread(self.sidecars[name].start)

    async def stop(self, name: str) -> None:
        """SIGTERM; its app goes on settling until the stream ends."""
        began = time.monotonic()
        try:
            status = await asyncio.to_thread(self.sidecars[name].stop)
        except AssertionError:  # it did not end in time, and was killed
            status = -1
        self.stops.append((status, time.monotonic() - began))

    async def kill(self, name: str) -> None:
        self.journal.crashed(asyncio.get_running_loop().time(), self._life(name))
        await asyncio.to_thread(self.sidecars[name].kill)

    def _life(self, name: str) -> Life:
        return Life(name, self._lives[name])

    # -- publishing

    @property
    def batches(self) -> range:
        """All there are, of BATCH events each."""
        return range(self.events // BATCH)

    async def publish(self, batches: range) -> None:
        """Publish them, at most WINDOW at once; nothing is sent again."""
        async with _channel(next(iter(self.sidecars.values()))) as channel:
            call = channel.stream_stream(
                "/sidecar.v1.PubSub/PublishStream",
                request_serializer=pb.PublishStreamRequest.SerializeToString,
                response_deserializer=pb.PublishStreamResponse.FromString,
            )()
            room = asyncio.Semaphore(WINDOW)

            async def answers() -> None:
                for _ in batches:
                    self._answered(await call.read())
                    room.release()

            began = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(answers())
                for published, batch in enumerate(batches):
                    await room.acquire()
                    if self._rate:
                        due = began + published * BATCH / self._rate
                        await asyncio.sleep(max(0.0, due - time.monotonic()))
                    await call.write(_request(batch))
            await call.done_writing()

    def _answered(self, response: pb.PublishStreamResponse) -> None:
        if response.HasField("failure"):
            self.failed[response.failure.reason] += BATCH
        first = response.sequence * BATCH
        for index, result in enumerate(response.results):
            if result.HasField("receipt"):
                self.receipts[first + index] = place_of(result.receipt.position)
                self.duplicate_receipts += result.receipt.duplicate
            else:
                self.failed[result.failure.reason] += 1

    async def published(self, share: float) -> None:
        """Wait until this share of the events is acknowledged."""
        while len(self.receipts) < self.events * share:
            await asyncio.sleep(0.01)

    # -- consuming

    async def consume(self, name: str) -> None:
        """Consume and settle, reconnecting for ever, as an app would."""
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with _channel(self.sidecars[name]) as channel:
                    await self._consume_once(name, channel)
            await asyncio.sleep(0.2)

    async def _consume_once(self, name: str, channel: grpc.aio.Channel) -> None:
        call = channel.stream_stream(
            "/sidecar.v1.PubSub/Subscribe",
            request_serializer=pb.SubscribeRequest.SerializeToString,
            response_deserializer=pb.SubscribeResponse.FromString,
        )()
        opening = pb.SubscribeOpen(subscription=SUBSCRIPTION)
        await call.write(pb.SubscribeRequest(open=opening, credit=CREDIT))
        life = self._life(name)
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.HasField("opened"):
                life = self._life(name)
            for result in message.rejected_settlements:
                self.journal.refused(result.token, result.failure.reason)
            if not message.deliveries:
                continue
            settlements = self._settle(life, message.deliveries)
            answer = pb.SubscribeRequest(settlements=settlements, credit=len(settlements))
            try:
                await call.write(answer)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for settlement in settlements:
                    self.journal.refused(settlement.token, "the stream had ended")
                raise

    def _settle(self, life: Life, deliveries: list[pb.Delivery]) -> list[pb.Settlement]:
        now = asyncio.get_running_loop().time()
        seen = [
            Delivered(now, life, int(d.event.id), d.attempt, place_of(d.position), d.token)
            for d in deliveries
        ]
        for delivery in seen:
            self.journal.delivered(delivery)
        settlements = []
        for delivery in seen:
            acked = self._acks(delivery.event, delivery.attempt)
            self.journal.settled(delivery, acked=acked)
            verdict = pb.VERDICT_ACK if acked else pb.VERDICT_NACK
            settlements.append(pb.Settlement(token=delivery.token, verdict=verdict))
        return settlements

    async def quiet(self, seconds: float, *, given_up_after: float) -> None:
        """
        Until all that is acknowledged was acked by an app, and nothing came for *seconds*.

        What has not come when nothing came for *given_up_after* seconds is taken for missing.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            still = loop.time() - max(began, self.journal.last_delivery)
            complete = self.receipts.keys() <= self.journal.acked
            if still > seconds and (complete or still > given_up_after):
                return
            await asyncio.sleep(0.5)

    async def progress(self) -> None:
        """Say every few seconds how far it is."""
        began = time.monotonic()
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            seen = ", ".join(f"{name} {n}" for name, n in sorted(self.journal.by_sidecar.items()))
            print(
                f"   {time.monotonic() - began:4.0f} s: acknowledged {len(self.receipts)}, "
                f"acked by the apps {len(self.journal.acked)}, deliveries {seen or 'none'}",
                flush=True,
            )


@contextlib.asynccontextmanager
async def acting(stage: Stage, *names: str) -> AsyncIterator[None]:
    """The apps of these sidecars consume, and it is told how far it is."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(stage.consume(name)) for name in names]
        running.append(tasks.create_task(stage.progress()))
        try:
            yield
        finally:
            for task in running:
                task.cancel()


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
                key=str(key_of(number)),
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
            # A channel of its own for each stream: another's connection may be about to close.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )
