"""The PubSub service: what each RPC does, whatever door it comes through."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any

from sidecar.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotSupported,
    SidecarError,
)
from sidecar.services.rpc import Call, UnaryMethod
from sidecar.v1 import event_pb2
from sidecar.v1 import pubsub_pb2 as pb
from sidecar.wire import proto, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    from sidecar.config import Limits
    from sidecar.delivery.consumers import Delivery
    from sidecar.delivery.hub import Hub
    from sidecar.delivery.subscription import Subscription
    from sidecar.event import Event, Outcome
    from sidecar.publishing.publisher import Publisher
    from sidecar.wire.cloudevents import Defaults

log = logging.getLogger(__name__)

SERVICE = "sidecar.v1.PubSub"
MAX_PULL_SECONDS = 300
MAX_BATCH_EVENTS = 100
STREAM_REQUESTS = 256
"""Publish requests of one stream under way at once."""
UNWRITTEN_RESPONSES = 2
MESSAGE_BYTES = 2 * 1024 * 1024
"""Deliveries in one message: gRPC clients take 4 MiB unless told otherwise."""
STREAM_RESPONSES = 256
"""Messages that may wait for a consumer that does not read, before we stop reading it."""


class PubSub:
    """Publish, PublishStream, Subscribe, Pull, Settle."""

    def __init__(
        self,
        publisher: Publisher,
        hub: Hub,
        *,
        defaults_for: Callable[[str], Defaults],
        limits: Limits,
    ) -> None:
        self._publisher = publisher
        self._hub = hub
        self._defaults_for = defaults_for
        self._limits = limits

    def methods(self) -> Sequence[UnaryMethod[Any, Any]]:
        return (
            UnaryMethod(SERVICE, "Publish", pb.PublishRequest, pb.PublishResponse, self.publish),
            UnaryMethod(SERVICE, "Pull", pb.PullRequest, pb.PullResponse, self.pull),
            UnaryMethod(SERVICE, "Settle", pb.SettleRequest, pb.SettleResponse, self.settle),
        )

    # -- publish

    async def publish(self, request: pb.PublishRequest, call: Call) -> pb.PublishResponse:
        topic = request.topic
        events = proto.events_from(request.events, self._defaults_for(topic))
        options = _options(request.options) if request.HasField("options") else {}
        outcomes = await self._publisher.publish(topic, events, **options)
        response = pb.PublishResponse()
        proto.put_results(response.results, outcomes)
        return response

    async def publish_events(
        self, topic: str, events: Sequence[Event | SidecarError], call: Call
    ) -> Sequence[Outcome]:
        """For doors that bring events as values."""
        return await self._publisher.publish(topic, events)

    def publish_stream(self) -> PublishStream:
        return PublishStream(self._publisher, self._defaults_for)

    # -- consume

    def open(self, request: pb.PullRequest | pb.SubscribeOpen) -> Subscription:
        """The subscription that is named or described."""
        target = request.WhichOneof("target")
        if target == "subscription":
            return self._hub.get(request.subscription)
        if target == "spec":
            return self._hub.describe(proto.subscription_from(request.spec))
        raise InvalidRequest("name a subscription, or describe one as spec", field="target")

    async def pull(self, request: pb.PullRequest, call: Call) -> pb.PullResponse:
        subscription = self.open(request)
        wait = proto.seconds_of(request, "wait") or 0.0
        if call.timeout is not None:
            # Answer before the caller gives up: what it would not see, it could not settle.
            wait = min(wait, max(0.0, call.timeout - 0.1))
        deliveries = await self._hub.pull(
            subscription, request.max_events or 1, min(wait, MAX_PULL_SECONDS)
        )
        deliveries, *too_many = _parts(deliveries)
        # What the caller's gRPC refuses for its size, it would get again until it is a dead letter.
        if too_many:
            subscription.hand_back([delivery.token for part in too_many for delivery in part])
        response = pb.PullResponse(lease=status.duration(subscription.settings.lease_seconds))
        put_deliveries(response.deliveries, deliveries)
        return response

    async def settle(self, request: pb.SettleRequest, call: Call) -> pb.SettleResponse:
        if not request.settlements:
            raise InvalidRequest("settlements: settle at least one delivery", field="settlements")
        results = self._hub.settle(proto.settlements_from(request.settlements))
        return pb.SettleResponse(results=proto.settle_results_to(results))

    async def consume(
        self,
        read: Callable[[], Awaitable[pb.SubscribeRequest | None]],
        write: Callable[[pb.SubscribeResponse], Awaitable[None]],
    ) -> None:
        """
        One Subscribe stream: *read* gives None when the client has said all, *write* sends, and
        raises ConnectionError when the client has gone.

        Returns when the client ended it. Raises SidecarError for a bad opening, or when the
        subscription ends.
        """
        first = await self._first(read)
        subscription = self.open(first.open)
        consumer = StreamConsumer(
            first.open.max_batch_events or MAX_BATCH_EVENTS, subscription.written
        )
        opened = proto.subscription_to(subscription.settings)
        opened.broker = subscription.broker.name
        subscription.attach(consumer)
        clean = False
        try:
            await write(pb.SubscribeResponse(opened=opened))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(consumer.pump(write))
                self._apply(first, subscription, consumer)
                await self._read_on(read, subscription, consumer)
                clean = True
                consumer.finish()
        except* ConnectionError:
            pass  # the consumer has gone, and is told nothing
        except* SidecarError as group:
            raise group.exceptions[0] from None
        finally:
            subscription.hand_back(consumer.unwritten())
            subscription.detach(consumer, clean=clean or self._hub.draining)

    async def _first(
        self, read: Callable[[], Awaitable[pb.SubscribeRequest | None]]
    ) -> pb.SubscribeRequest:
        seconds = self._limits.open_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                first = await read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing was opened within {seconds:g} s: send open first", field="open"
            ) from None
        if first is None or not first.HasField("open"):
            raise InvalidRequest("the first message must have open", field="open")
        return first

    async def _read_on(
        self,
        read: Callable[[], Awaitable[pb.SubscribeRequest | None]],
        subscription: Subscription,
        consumer: StreamConsumer,
    ) -> None:
        while (message := await read()) is not None:
            if message.HasField("open"):
                raise InvalidRequest("open is for the first message only", field="open")
            self._apply(message, subscription, consumer)
            await consumer.room()

    def _apply(
        self, message: pb.SubscribeRequest, subscription: Subscription, consumer: StreamConsumer
    ) -> None:
        if message.settlements:
            settlements = proto.settlements_from(message.settlements)
            rejected = [
                (settlement.token, error)
                for settlement, error in zip(
                    settlements, subscription.settle(settlements), strict=True
                )
                if error is not None
            ]
            if rejected:
                consumer.reject(rejected)
        if message.credit:
            subscription.credit(consumer, message.credit)


class StreamConsumer:
    """
    What waits to be written to one Subscribe stream.

    Bounded for a client that does not read: it gets no more deliveries while some are unwritten,
    whatever its credit, and its rejected settlements stop us reading it.
    """

    def __init__(self, max_batch: int, written: Callable[[StreamConsumer], None]) -> None:
        """*written*: called when it takes more again."""
        self.credit = 0
        self.max_batch = max_batch
        self._written = written
        self._queue: deque[pb.SubscribeResponse] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._ended: Exception | None = None
        self._finished = False

    @property
    def takes_more(self) -> bool:
        return len(self._queue) < UNWRITTEN_RESPONSES

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        for part in _parts(deliveries):
            response = pb.SubscribeResponse()
            put_deliveries(response.deliveries, part)
            self._put(response)

    def reject(self, rejected: Sequence[tuple[str, SidecarError | None]]) -> None:
        self._put(pb.SubscribeResponse(rejected_settlements=proto.settle_results_to(rejected)))

    def closed(self, why: Exception) -> None:
        self._ended = why
        self._filled.set()

    def _put(self, response: pb.SubscribeResponse) -> None:
        self._queue.append(response)
        self._filled.set()

    def unwritten(self) -> Sequence[str]:
        """Tokens of deliveries that never left: the app did not fail with them."""
        return [delivery.token for response in self._queue for delivery in response.deliveries]

    def finish(self) -> None:
        """The client has said all: `pump` ends when what waits is written."""
        self.credit = 0
        self._finished = True
        self._filled.set()

    async def room(self) -> None:
        """Wait while much is waiting to be written."""
        while len(self._queue) > STREAM_RESPONSES:
            self._emptied.clear()
            await self._emptied.wait()

    async def pump(self, write: Callable[[pb.SubscribeResponse], Awaitable[None]]) -> None:
        """Write what comes. Raises what `closed` was told."""
        while True:
            while self._queue:
                await write(self._queue.popleft())
                if len(self._queue) == UNWRITTEN_RESPONSES - 1:
                    self._written(self)
            self._emptied.set()
            if self._ended is not None:
                raise self._ended
            if self._finished:
                return
            self._filled.clear()
            await self._filled.wait()


class PublishStream:
    """One PublishStream: many requests under way, answered as their outcomes come."""

    def __init__(self, publisher: Publisher, defaults_for: Callable[[str], Defaults]) -> None:
        self._publisher = publisher
        self._defaults_for = defaults_for
        self._topic = ""
        self._answers: deque[pb.PublishStreamResponse] = deque()
        self._answered = asyncio.Event()
        self._room = asyncio.Event()
        self._under_way = 0
        self._ended = False

    async def take(self, request: pb.PublishStreamRequest) -> None:
        """Hand one request on, in order; waits while the queue to its broker is full."""
        sequence = request.sequence
        topic = self._topic = request.topic or self._topic
        self._under_way += 1
        try:
            events = proto.events_from(request.events, self._defaults_for(topic))
            options = _options(request.options) if request.HasField("options") else {}
            outcomes = await self._publisher.submit(topic, events, wait=None, **options)
        except SidecarError as error:
            self._failed(sequence, error)
        except Exception as error:  # noqa: BLE001 - it must not end the other requests' stream
            # Not the exception's text: it may quote event data.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error(  # noqa: TRY400
                "PublishStream: %s\n%s", type(error).__name__, frames
            )
            self._failed(sequence, Internal("a fault of the sidecar: its log says more"))
        except BaseException:
            self._under_way -= 1
            raise
        else:
            outcomes.add_done_callback(lambda done: self._results(sequence, done))
        while self._under_way >= STREAM_REQUESTS:
            # The client does not read its answers: stop reading its requests.
            self._room.clear()
            await self._room.wait()

    def _results(self, sequence: int, done: asyncio.Future[Sequence[Outcome]]) -> None:
        if done.cancelled():
            return
        response = pb.PublishStreamResponse(sequence=sequence)
        proto.put_results(response.results, done.result())
        self._answer(response)

    def _failed(self, sequence: int, error: SidecarError) -> None:
        failure = proto.failure_to(error)
        self._answer(pb.PublishStreamResponse(sequence=sequence, failure=failure))

    def _answer(self, response: pb.PublishStreamResponse) -> None:
        self._answers.append(response)
        self._answered.set()

    def end(self) -> None:
        """No more requests; `answers` ends when all are answered."""
        self._ended = True
        self._answered.set()

    async def answers(self) -> AsyncIterator[pb.PublishStreamResponse]:
        while True:
            while self._answers:
                yield self._answers.popleft()
                self._under_way -= 1
                self._room.set()
            if self._ended and not self._under_way:
                return
            self._answered.clear()
            await self._answered.wait()


def _parts(deliveries: Sequence[Delivery]) -> Iterator[Sequence[Delivery]]:
    """Messages that every gRPC client takes, unless one event alone is larger."""
    begin = size = 0
    for index, delivery in enumerate(deliveries):
        size += delivery.event.size
        if size > MESSAGE_BYTES and index > begin:
            yield deliveries[begin:index]
            begin, size = index, delivery.event.size
    yield deliveries[begin:]


def put_deliveries(
    messages: RepeatedCompositeFieldContainer[pb.Delivery], deliveries: Sequence[Delivery]
) -> None:
    """Fill an empty repeated field."""
    add = messages.add
    for delivery in deliveries:
        message = add()
        message.token = delivery.token
        message.topic = delivery.topic
        message.attempt = delivery.attempt
        proto.put_event(message.event, delivery.event)
        if delivery.position is not None:
            proto.put_position(message.position, delivery.position)


def _options(options: pb.PublishOptions) -> dict[str, Any]:
    """Raises NotSupported for what no broker here can do, InvalidRequest for what makes no sense."""
    if options.atomic:
        raise NotSupported(
            "options.atomic: no broker here publishes all or nothing; publish without it",
            field="options.atomic",
        )
    if options.WhichOneof("later") is not None:
        raise NotSupported(
            f"options.{options.WhichOneof('later')}: no broker here keeps events for later",
            field=f"options.{options.WhichOneof('later')}",
        )
    if options.min_durability not in event_pb2.Durability.values():
        accepted = ", ".join(event_pb2.Durability.keys()[1:])
        raise InvalidRequest(
            f"options.min_durability: {int(options.min_durability)} is none; use one of {accepted}",
            field="options.min_durability",
        )
    return {
        "min_durability": int(options.min_durability),
        "timeout": proto.seconds_of(options, "timeout"),
    }
