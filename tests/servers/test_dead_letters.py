"""The service DeadLetters at its doors: bad requests, and what is and is not over HTTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.v1 import dead_letters_pb2 as pb
from sidecar.v1 import dead_letters_pb2_grpc
from tests.servers.test_grpc import reason_of
from tests.support.http import HttpConnection, Reply
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CONFIG = """
[brokers.events]
type = "memory"

[[subscriptions]]
name = "billing"
topic = "orders.>"
"""
EVERYTHING = pb.DeadLetterFilter(subscription="billing")


@pytest.fixture(scope="module")
def sidecar() -> Iterator[SidecarProcess]:
    with SidecarProcess(CONFIG) as running:
        yield running


@pytest.fixture
async def stub(sidecar: SidecarProcess) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"unix:{sidecar.grpc_socket}") as channel:
        yield dead_letters_pb2_grpc.DeadLettersStub(channel)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("wanted", "code", "reason"),
    [
        ({"ids": ["nonsense"]}, "INVALID_ARGUMENT", "REQUEST_INVALID"),
        ({"event_type": "a..b"}, "INVALID_ARGUMENT", "REQUEST_INVALID"),
        ({"topic": "a b"}, "INVALID_ARGUMENT", "REQUEST_INVALID"),
        ({"dead_letter_topic": "dlq.>"}, "INVALID_ARGUMENT", "REQUEST_INVALID"),
        ({"subscription": "nobody"}, "NOT_FOUND", "SUBSCRIPTION_MISSING"),
        (
            {"dead_letter_broker": "none", "dead_letter_topic": "dlq.>"},
            "NOT_FOUND",
            "DEAD_LETTER_MISSING",
        ),
    ],
)
async def test_a_bad_filter_blames_the_caller_in_every_call(
    stub: Any, wanted: dict[str, Any], code: str, reason: str
) -> None:
    filter_ = pb.DeadLetterFilter(**wanted)
    calls = (
        stub.List(pb.DeadLettersListRequest(filter=filter_)),
        stub.Redrive(pb.DeadLettersRedriveRequest(filter=filter_)),
        stub.Discard(pb.DeadLettersDiscardRequest(filter=filter_)),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if isinstance(call, grpc.aio.UnaryUnaryCall) else call.read())

        assert caught.value.code().name == code
        assert reason_of(caught.value) == reason


@pytest.mark.parametrize(
    "request_",
    [
        pb.DeadLettersRedriveRequest(),
        pb.DeadLettersRedriveRequest(filter=pb.DeadLetterFilter()),
        pb.DeadLettersRedriveRequest(filter=EVERYTHING, rate_per_second=-1),
        pb.DeadLettersRedriveRequest(filter=EVERYTHING, rate_per_second=float("nan")),
        pb.DeadLettersRedriveRequest(filter=EVERYTHING, to_topic="a b"),
    ],
    ids=["nothing said", "an empty filter", "a negative rate", "no rate", "no topic"],
)
async def test_a_bad_redrive_is_refused(stub: Any, request_: pb.DeadLettersRedriveRequest) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Redrive(request_).read()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_last_message_says_that_it_is_done(stub: Any) -> None:
    request = pb.DeadLettersRedriveRequest(filter=EVERYTHING)
    answers = [answer async for answer in stub.Redrive(request)]

    assert [answer.finished for answer in answers] == [True]
    assert answers[0].progress == pb.DeadLettersProgress()


async def test_a_time_that_is_far_off_is_a_time(stub: Any) -> None:
    far = Timestamp(seconds=253_402_300_799)
    answer = await stub.List(
        pb.DeadLettersListRequest(filter=pb.DeadLetterFilter(after=far), page_size=2**31)
    )

    assert answer == pb.DeadLettersListResponse()


async def post(sidecar: SidecarProcess, method: str, body: bytes) -> Reply:
    connection = HttpConnection(*await asyncio.open_unix_connection(str(sidecar.http_socket)))
    try:
        path = f"/sidecar.v1.DeadLetters/{method}"
        return await connection.ask("POST", path, body, {"content-type": "application/json"})
    finally:
        connection.writer.close()


async def test_over_http_are_the_unary_ones(sidecar: SidecarProcess) -> None:
    """Streams are not: that is said."""
    found = await post(
        sidecar, "List", b'{"filter": {"key": "k", "after": "2026-01-31T12:00:00Z"}}'
    )
    missing = await post(sidecar, "Get", b'{"id": "events/dlq.orders/7~0a1b2c3d"}')
    stream = await post(sidecar, "Redrive", b'{"all": true}')

    assert (found.status, found.json()) == (200, {})
    assert (missing.status, missing.json()["code"]) == (404, "not_found")
    assert (stream.status, stream.json()["code"]) == (501, "unimplemented")
