"""Loads on the gRPC door: unary callers, a publish stream, a consumer that acks."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import grpc
import psutil

from sidecar.v1 import admin_pb2
from sidecar.v1 import pubsub_pb2 as pb
from tests.benchmarks import events
from tests.benchmarks.loads.http2 import Call, GrpcConnection
from tests.benchmarks.meter import Meter, wait_until_idle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.benchmarks.spec import Sample, Spec

PUBLISH = "/sidecar.v1.PubSub/Publish"
PUBLISH_STREAM = "/sidecar.v1.PubSub/PublishStream"
SUBSCRIBE = "/sidecar.v1.PubSub/Subscribe"
MAX_UNDER_WAY = 256
STREAM_WINDOW = 3200
"""Events that a publish stream has under way, in at most MAX_UNDER_WAY requests."""


async def unary(spec: Spec) -> Sample:
    """Callers that each publish one event, wait for the receipt, and publish the next."""
    meter = Meter(spec)
    ids = events.Ids()
    connection = await GrpcConnection.connect(spec.grpc_socket, PUBLISH)
    publish = UnaryPublish(connection, events.publish_request(ids, spec.topic))

    def answered(failure: str) -> None:
        if failure:
            meter.failed(1, failure)
        else:
            meter.events += 1
        if not meter.stopping and connection.lost is None:
            publish.start(ids.take(1), answered)

    for _ in range(spec.callers):
        publish.start(ids.take(1), answered)
    connection.flush()
    return await meter.sample()


class UnaryPublish:
    """Publish calls of one event on one connection."""

    def __init__(self, connection: GrpcConnection, template: bytes) -> None:
        self._connection = connection
        self._template = template

    def start(self, holes: tuple[int, ...], answered: Callable[[str], None]) -> None:
        """*answered* gets what failed: nothing, when there was a receipt."""
        failure = "ended without a response"

        def on_message(message: bytes) -> None:
            nonlocal failure
            response = pb.PublishResponse.FromString(message)
            failure = "" if receipts(response) else str(response)

        call = self._connection.call(on_message, lambda: answered(failure))
        call.send(self._template % holes, end=True)


def receipts(response: pb.PublishResponse | pb.PublishStreamResponse) -> int:
    return sum(result.HasField("receipt") for result in response.results)


async def stream(spec: Spec) -> Sample:
    """One publish stream, with many requests under way."""
    meter = Meter(spec)
    ids = events.Ids()
    template = events.publish_stream_request(ids, spec.topic, spec.batch)
    connection = await GrpcConnection.connect(spec.grpc_socket, PUBLISH_STREAM)
    call: Call

    def on_message(message: bytes) -> None:
        response = pb.PublishStreamResponse.FromString(message)
        good = receipts(response)
        meter.events += good
        if good < spec.batch:
            meter.failed(spec.batch - good, str(response))
        if not meter.stopping:
            call.send(template % ids.take(spec.batch))

    call = connection.call(on_message, meter.run_out.set)
    for _ in range(max(1, min(MAX_UNDER_WAY, STREAM_WINDOW // spec.batch))):
        call.send(template % ids.take(spec.batch))
    connection.flush()
    return await meter.sample()


async def consume(spec: Spec) -> Sample:
    """
    One Subscribe stream that acks as deliveries come and gives the credit back.

    The app keeps the newest in its hands if it is told so. It does not ack before it has those,
    and the sidecar holds as much as it may, so what is measured is the cost with that many.
    """
    await wait_until_idle(psutil.Process(spec.broker_pid))
    meter = Meter(spec)
    first, full = asyncio.Event(), asyncio.Event()
    in_hand: deque[str] = deque()
    connection = await GrpcConnection.connect(spec.grpc_socket, SUBSCRIBE)
    call: Call

    def on_message(message: bytes) -> None:
        response = pb.SubscribeResponse.FromString(message)
        count = len(response.deliveries)
        if response.rejected_settlements:
            meter.failed(len(response.rejected_settlements), str(response.rejected_settlements[0]))
        if not count:
            return
        in_hand.extend(delivery.token for delivery in response.deliveries)
        if full.is_set():
            settle()

    def settle() -> None:
        count = len(in_hand) - spec.kept
        if count <= 0:
            return
        meter.events += count
        first.set()
        if meter.events >= spec.events - spec.window:
            meter.run_out.set()
        call.send(acks([in_hand.popleft() for _ in range(count)]))

    call = connection.call(on_message, meter.run_out.set)
    call.send(subscribe(spec))
    connection.flush()
    async with asyncio.timeout(30):
        while spec.credit + spec.kept and not await _is_full(spec, len(in_hand)):
            await asyncio.sleep(0.1)
    full.set()
    settle()
    connection.flush()
    return await meter.sample(first)


async def _is_full(spec: Spec, in_hand: int) -> bool:
    """The sidecar holds nearly all that it may, and the app what it is to keep."""
    async with grpc.aio.insecure_channel(f"unix:{spec.grpc_socket}") as channel:
        call = channel.unary_unary(
            "/sidecar.v1.Admin/GetStatus",
            request_serializer=admin_pb2.GetStatusRequest.SerializeToString,
            response_deserializer=admin_pb2.GetStatusResponse.FromString,
        )
        (found,) = (await call(admin_pb2.GetStatusRequest())).subscriptions
    return bool(
        in_hand >= spec.kept and found.in_flight_events + found.waiting_events >= 0.8 * spec.window
    )


def subscribe(spec: Spec) -> bytes:
    """The first message of a Subscribe stream: opened inline, from the first event."""
    described = pb.SubscriptionSpec(
        name=spec.subscription,
        topic=spec.topic,
        max_in_flight=spec.window,
        max_in_flight_bytes=2048 * spec.window,
    )
    opened = pb.SubscribeOpen(spec=described)
    credit = spec.credit or spec.window
    return pb.SubscribeRequest(open=opened, credit=credit).SerializeToString()


def acks(tokens: Sequence[str]) -> bytes:
    request = pb.SubscribeRequest(credit=len(tokens))
    add = request.settlements.add
    for token in tokens:
        add(token=token, verdict=pb.VERDICT_ACK)
    return request.SerializeToString()
