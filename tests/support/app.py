"""An app beside a sidecar: raw stubs, what an app in any language sees."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import grpc

from sidecar.v1 import admin_pb2
from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.sidecar_process import SidecarProcess

LARGE = 64 * 1024 * 1024


class Client:
    """One connection to one sidecar."""

    def __init__(self, sidecar: SidecarProcess, *, largest: int = LARGE) -> None:
        self.channel = grpc.aio.insecure_channel(
            f"unix:{sidecar.grpc_socket}", options=[("grpc.max_receive_message_length", largest)]
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        # gRPC has a word on a cancelled call a moment after it is closed, and nobody to await for
        # it; said to a closed loop, it is an error of whichever test runs then.
        await asyncio.sleep(0.1)

    async def publish(self, topic: str, numbers: range, data: bytes = b"") -> None:
        """Events of one key, whose ids are numbers."""
        await self.publish_events(
            topic,
            [ev.Event(id=str(n), key="k", type="t", source="s", data=data) for n in numbers],
        )

    async def publish_events(self, topic: str, events: Sequence[ev.Event]) -> list[ev.Receipt]:
        """In one call; each of them is taken."""
        call = self.channel.unary_unary(
            "/sidecar.v1.PubSub/Publish",
            request_serializer=pb.PublishRequest.SerializeToString,
            response_deserializer=pb.PublishResponse.FromString,
        )
        results = (await call(pb.PublishRequest(topic=topic, events=events))).results
        assert all(result.HasField("receipt") for result in results), results
        return [result.receipt for result in results]

    async def pull(self, spec: pb.SubscriptionSpec, count: int) -> list[pb.Delivery]:
        request = pb.PullRequest(spec=spec, max_events=count)
        request.wait.FromSeconds(10)
        return await self.pull_request(request)

    async def pull_request(self, request: pb.PullRequest) -> list[pb.Delivery]:
        call = self.channel.unary_unary(
            "/sidecar.v1.PubSub/Pull",
            request_serializer=pb.PullRequest.SerializeToString,
            response_deserializer=pb.PullResponse.FromString,
        )
        return list((await call(request)).deliveries)

    async def settle(self, token: str, verdict: pb.Verdict, *, delay: float | None = None) -> None:
        """*delay*: seconds to the next try of what is nacked."""
        call = self.channel.unary_unary(
            "/sidecar.v1.PubSub/Settle",
            request_serializer=pb.SettleRequest.SerializeToString,
            response_deserializer=pb.SettleResponse.FromString,
        )
        settlement = pb.Settlement(token=token, verdict=verdict)
        if delay is not None:
            settlement.delay.FromMilliseconds(int(delay * 1000))
        answer = await call(pb.SettleRequest(settlements=[settlement]))
        assert not answer.results[0].HasField("failure")

    async def admin(self, method: str, request: object) -> None:
        call = self.channel.unary_unary(f"/sidecar.v1.Admin/{method}", request_serializer=_bytes)
        await call(request)

    async def status(self) -> admin_pb2.GetStatusResponse:
        call = self.channel.unary_unary(
            "/sidecar.v1.Admin/GetStatus",
            request_serializer=_bytes,
            response_deserializer=admin_pb2.GetStatusResponse.FromString,
        )
        found: admin_pb2.GetStatusResponse = await call(admin_pb2.GetStatusRequest())
        return found

    async def open(self, subscription: str, credit: int) -> Stream:
        """One that is declared."""
        return await self._stream(pb.SubscribeOpen(subscription=subscription), credit)

    async def subscribe(self, spec: pb.SubscriptionSpec, credit: int) -> Stream:
        return await self._stream(pb.SubscribeOpen(spec=spec), credit)

    async def _stream(self, opening: pb.SubscribeOpen, credit: int) -> Stream:
        call = self.channel.stream_stream(
            "/sidecar.v1.PubSub/Subscribe",
            request_serializer=pb.SubscribeRequest.SerializeToString,
            response_deserializer=pb.SubscribeResponse.FromString,
        )()
        await call.write(pb.SubscribeRequest(open=opening, credit=credit))
        assert (await call.read()).HasField("opened")
        return Stream(call)


class Stream:
    """One Subscribe stream that acks what it takes."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.call = call

    async def take(self, count: int) -> list[tuple[int, int]]:
        """(number, attempt) of so many deliveries, each acked."""
        return [(int(d.event.id), d.attempt) for d in await self._take(count)]

    async def take_data(self, count: int) -> list[bytes]:
        """The same, of events whose ids are no numbers."""
        return [d.event.data for d in await self._take(count)]

    async def _take(self, count: int) -> list[pb.Delivery]:
        taken: list[pb.Delivery] = []
        async with asyncio.timeout(15):
            while len(taken) < count:
                deliveries = (await self.call.read()).deliveries
                taken += deliveries
                settlements = [
                    pb.Settlement(token=d.token, verdict=pb.VERDICT_ACK) for d in deliveries
                ]
                await self.call.write(pb.SubscribeRequest(settlements=settlements))
        return taken

    async def leave(self) -> None:
        await self.call.done_writing()
        while await self.call.read() is not grpc.aio.EOF:
            pass
        await self.call.code()


def _bytes(message: object) -> bytes:
    serialized: bytes = message.SerializeToString()  # type: ignore[attr-defined]
    return serialized


def spec_of(topic: str, **more: object) -> pb.SubscriptionSpec:
    return pb.SubscriptionSpec(name=topic.replace(".", "-"), topic=topic, **more)  # type: ignore[arg-type]


async def patiently(client: Client, spec: pb.SubscriptionSpec) -> list[pb.Delivery]:
    """Pull until it comes: a server that was stopped gives back after the ack wait only."""
    for _ in range(5):
        deliveries = await client.pull(spec, 1)
        if deliveries:
            return deliveries
    raise AssertionError("nothing came")
