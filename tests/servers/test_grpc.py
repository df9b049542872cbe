"""The gRPC door: what is wrong with a request is told in our words, and nothing else breaks."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from sidecar.config import Limits
from sidecar.services.pubsub import PublishStream, PubSub
from sidecar.v1 import event_pb2
from sidecar.v1 import pubsub_pb2 as pb
from sidecar.wire.cloudevents import Defaults
from tests.delivery.stage import AT_ONCE, Sidecar, ids, memory, numbers, running
from tests.delivery.stage import event as make
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from tests.support.sidecar_process import SidecarProcess

PUBSUB = "/sidecar.v1.PubSub/"
NOT_UTF_8 = b"\x0a\x02\xff\xfe"
CUT_SHORT = b"\x0a\x7fx"
EVENTS = [event_pb2.Event(data=b"1")]


@pytest.fixture
async def channel(sidecar: SidecarProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{sidecar.grpc_socket}") as opened:
        yield opened


@pytest.fixture
def topic() -> str:
    return f"grpc{uuid.uuid4().hex[:12]}.made"


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """What the ErrorInfo in the trailers says."""
    trailers = dict(error.trailing_metadata() or ())
    details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert details.details[0].Unpack(info)
    return str(info.reason)


def results(answers: Iterable[pb.PublishStreamResponse]) -> dict[int, str]:
    """Each sequence with its failure's reason, or "stored"."""
    return {a.sequence: a.failure.reason or "stored" for a in answers}


# -- bytes that are no message


@pytest.mark.parametrize("body", [NOT_UTF_8, CUT_SHORT])
@pytest.mark.parametrize("method", ["Publish", "Pull"])
async def test_a_unary_request_that_is_no_message_blames_the_caller(
    channel: grpc.aio.Channel, sidecar: SidecarProcess, method: str, body: bytes
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(PUBSUB + method)(body)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "BODY_MALFORMED"
    assert f"sidecar.v1.{method}Request" in (caught.value.details() or "")
    assert "Traceback" not in sidecar.log


async def test_a_subscribe_that_begins_with_no_message_blames_the_caller(
    channel: grpc.aio.Channel, sidecar: SidecarProcess
) -> None:
    call = channel.stream_stream(PUBSUB + "Subscribe")()
    await call.write(CUT_SHORT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "BODY_MALFORMED"
    assert "Traceback" not in sidecar.log


async def test_a_publish_stream_answers_what_came_before_bytes_that_are_no_message(
    channel: grpc.aio.Channel, sidecar: SidecarProcess, topic: str
) -> None:
    """No sequence can be read from them, so the stream ends: after the answers it owes."""
    call = channel.stream_stream(PUBSUB + "PublishStream")()
    good = pb.PublishStreamRequest(sequence=1, topic=topic, events=EVENTS)
    await call.write(good.SerializeToString())
    await call.write(CUT_SHORT)
    answer = pb.PublishStreamResponse.FromString(await call.read())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert results([answer]) == {1: "stored"}
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "BODY_MALFORMED"
    assert "Traceback" not in sidecar.log


# -- options that make no sense


def publish_request(kind: Any, topic: str, **more: Any) -> Any:
    request = kind(topic=topic, events=EVENTS, **more)
    request.options.min_durability = 99
    return request


async def test_a_durability_that_is_none_is_refused_with_those_there_are(
    channel: grpc.aio.Channel, sidecar: SidecarProcess, topic: str
) -> None:
    request = publish_request(pb.PublishRequest, topic)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(PUBSUB + "Publish")(request.SerializeToString())

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "REQUEST_INVALID"
    assert caught.value.details() == (
        "options.min_durability: 99 is none; use one of DURABILITY_SENT, DURABILITY_SPOOLED, "
        "DURABILITY_STORED"
    )
    assert "Traceback" not in sidecar.log


async def test_a_durability_that_is_none_fails_its_sequence_alone(
    channel: grpc.aio.Channel, topic: str
) -> None:
    call = channel.stream_stream(
        PUBSUB + "PublishStream", response_deserializer=pb.PublishStreamResponse.FromString
    )()
    for request in (
        publish_request(pb.PublishStreamRequest, topic, sequence=1),
        pb.PublishStreamRequest(sequence=2, topic=topic, events=EVENTS),
    ):
        await call.write(request.SerializeToString())
    await call.done_writing()
    answers = [answer async for answer in call]

    assert results(answers) == {1: "REQUEST_INVALID", 2: "stored"}


# -- a fault of ours


FAULT = RuntimeError("it may quote an event")


def broken_for_one(topic: str) -> Defaults:
    if topic == "broken":
        raise FAULT
    return Defaults(source="app", type="")


async def test_a_fault_fails_its_sequence_alone_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = PublishStream(Sidecar(memory()).publisher, broken_for_one)
    for sequence, topic in enumerate(["broken", "not a topic"]):
        await stream.take(pb.PublishStreamRequest(sequence=sequence, topic=topic, events=EVENTS))
    stream.end()
    answers = [answer async for answer in stream.answers()]
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR]

    assert results(answers) == {0: "INTERNAL", 1: "TOPIC_INVALID"}
    assert len(faults) == 1
    assert "RuntimeError" in faults[0].getMessage()
    assert "quote" not in caplog.text


# -- a consumer that goes


class Reader:
    """A client of Subscribe as the service sees it: it takes *takes* messages, and then it is gone."""

    def __init__(self, takes: int) -> None:
        self._takes = takes
        self._first = [
            pb.SubscribeRequest(open=pb.SubscribeOpen(subscription="billing"), credit=1000)
        ]
        self.got: list[pb.SubscribeResponse] = []
        self.gone = asyncio.Event()
        """Set it when the connection is to break."""

    async def read(self) -> pb.SubscribeRequest | None:
        if self._first:
            return self._first.pop()
        await self.gone.wait()
        raise ConnectionResetError

    async def write(self, response: pb.SubscribeResponse) -> None:
        if len(self.got) == self._takes:
            await self.gone.wait()
            raise ConnectionResetError
        self.got.append(response)


def service(sidecar: Sidecar) -> PubSub:
    return PubSub(
        sidecar.publisher,
        sidecar.hub,
        defaults_for=lambda _: Defaults(source="s", type="t"),
        limits=Limits(),
    )


async def test_what_never_left_for_a_consumer_that_goes_is_no_attempt() -> None:
    """Only what was written, or was being written, was in the app's hands."""
    async with running() as sidecar:
        subscription = sidecar.subscription(retry=AT_ONCE)
        big = bytes(900_000)
        await sidecar.publish("orders.new", *(make(i, data=big) for i in numbers(0, 20)))
        reader = Reader(takes=2)  # what it opened, and two events: a message has at most 2 MiB
        consuming = asyncio.create_task(service(sidecar).consume(reader.read, reader.write))
        await until(lambda: subscription.window.out == 20)
        reader.gone.set()
        await consuming
        released = sidecar.heard.results["released"]
        app = sidecar.app(subscription)
        again = []
        for _ in range(20):
            again.append(delivery := await app.one())
            app.ack(delivery)  # after a crash, what the app had comes one at a time

    assert [len(response.deliveries) for response in reader.got] == [0, 2]
    assert sorted(ids(again), key=int) == numbers(0, 20)
    assert {d.event.id for d in again if d.attempt == 2} == {"0", "1", "2", "3"}
    assert released == 16


async def test_a_consumer_that_goes_before_it_is_told_that_it_is_open_leaves_nothing() -> None:
    async with running() as sidecar:
        subscription = sidecar.subscription()
        reader = Reader(takes=0)
        reader.gone.set()
        await service(sidecar).consume(reader.read, reader.write)

        assert subscription.consumers == []
