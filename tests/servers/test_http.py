"""The HTTP door: CloudEvents publish, and clients that misbehave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import logging
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sidecar import errors
from sidecar.config import Limits
from sidecar.event import Durability, Event, Position, Receipt
from sidecar.servers import sockets
from sidecar.servers.asgi import Door, respond
from sidecar.servers.http import HttpApp
from sidecar.services.rpc import Call, UnaryMethod
from sidecar.v1 import pubsub_pb2
from sidecar.wire.cloudevents import Defaults
from tests.support.http import HttpConnection, request, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.event import Outcome
    from sidecar.servers.asgi import Receive, Scope, Send

TOPIC = "/v1/topics/orders.created"
BATCH = {"content-type": "application/cloudevents-batch+json"}
STRUCTURED = {"content-type": "application/cloudevents+json"}
LIMITS = Limits(max_event_bytes=1024, max_batch_bytes=100_000)
MAX_BODY = 100_000 * 3 // 2 + 65536
ROOMY = Limits(max_event_bytes=1024, max_batch_bytes=1_000_000)
"""With these the largest body does not come in one read."""
LARGEST = 1_000_000 * 3 // 2 + 65536


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class Log:
    """Keeps what is published. Types ending in ".bad" are refused, ".large" are too large."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Event]] = []
        self.room = asyncio.Event()
        self.room.set()

    async def publish(
        self, topic: str, events: Sequence[Event | errors.SidecarError], call: Call
    ) -> Sequence[Outcome]:
        if topic.endswith("!"):
            raise errors.InvalidTopic(f"topic {topic!r} is not valid", field="topic")
        if topic == "full":
            raise errors.QueueFull("the queue is full", retry_after=0.2)
        if topic == "fault":
            raise KeyError(topic)
        await self.room.wait()
        return [self._one(topic, event) for event in events]

    def _one(self, topic: str, event: Event | errors.SidecarError) -> Outcome:
        if isinstance(event, errors.SidecarError):
            return event
        if event.type.endswith(".bad"):
            return errors.BrokerUnavailable("not connected", retry_after=1.5, broker="work")
        if event.type.endswith(".large"):
            return errors.EventTooLarge("too large", limit=1024)
        self.events.append((topic, event))
        position = Position("ORDERS", len(self.events))
        return Receipt(event.id, "work", topic, Durability.STORED, position)


def app(log: Log, limits: Limits = LIMITS) -> HttpApp:
    async def answer(request: pubsub_pb2.SettleRequest, call: Call) -> pubsub_pb2.SettleResponse:
        await log.room.wait()
        return pubsub_pb2.SettleResponse()

    methods: list[UnaryMethod[Any, Any]] = [
        UnaryMethod(
            "sidecar.v1.PubSub",
            "Settle",
            pubsub_pb2.SettleRequest,
            pubsub_pb2.SettleResponse,
            answer,
        )
    ]
    defaults = Defaults(source="shop", type="default.type", id="minted", time_ns=7)
    return HttpApp(methods, log.publish, lambda _: defaults, limits)


def ce(kind: str = "orders.created", id: str = "1") -> dict[str, str]:  # noqa: A002
    return {"ce-specversion": "1.0", "ce-id": id, "ce-source": "/shop", "ce-type": kind}


def structured(kind: str = "orders.created", **more: object) -> dict[str, object]:
    return {"specversion": "1.0", "id": "1", "source": "/shop", "type": kind, **more}


# -- CloudEvents


async def test_binary_mode_is_published_and_answered_with_its_receipt(tmp_path: Path) -> None:
    log = Log()
    headers = ce() | {"content-type": "text/plain", "ce-partitionkey": "k", "traceparent": "00-t"}
    async with serving(app(log), tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, b"hello", headers)

    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.body == (
        b'{"results":[{"receipt":{"eventId":"1","broker":"work","topic":"orders.created",'
        b'"durability":"stored","duplicate":false,'
        b'"position":{"stream":"ORDERS","sequence":1}}}]}'
    )
    ((topic, event),) = log.events
    assert topic == "orders.created"
    assert (event.id, event.source, event.key, event.data) == ("1", "/shop", "k", b"hello")
    assert event.headers == {"traceparent": "00-t"}


async def test_structured_mode_is_published(tmp_path: Path) -> None:
    log = Log()
    body = json.dumps(structured(data={"a": 1}, datacontenttype="application/json")).encode()
    async with serving(app(log), tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, body, STRUCTURED)

    assert reply.status == 200
    assert json.loads(log.events[0][1].data or b"") == {"a": 1}


async def test_a_plain_body_takes_the_defaults_of_its_topic(tmp_path: Path) -> None:
    log = Log()
    async with serving(app(log), tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, b"{}", {"content-type": "application/json"})

    assert reply.json()["results"][0]["receipt"]["eventId"] == "minted"
    event = log.events[0][1]
    assert (event.source, event.type, event.time_ns) == ("shop", "default.type", 7)


async def test_a_batch_answers_each_event_in_order(tmp_path: Path) -> None:
    """200 when one of them was published: what failed is in its place."""
    log = Log()
    events = [structured(), structured("orders.bad"), {"specversion": "1.0"}, structured()]
    async with serving(app(log), tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, json.dumps(events).encode(), BATCH)

    assert reply.status == 200
    results = reply.json()["results"]
    assert [next(iter(result)) for result in results] == [
        "receipt",
        "failure",
        "failure",
        "receipt",
    ]
    assert results[1]["failure"] == {
        "reason": "BROKER_UNAVAILABLE",
        "message": "not connected",
        "retryable": True,
        "code": "unavailable",
        "metadata": {"broker": "work"},
        "retryAfterSeconds": 1.5,
    }
    assert results[2]["failure"]["reason"] == "EVENT_INVALID"


async def test_a_batch_of_which_nothing_was_published_has_the_first_failures_status(
    tmp_path: Path,
) -> None:
    events = [structured("orders.bad"), structured("orders.large")]
    async with serving(app(Log()), tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, json.dumps(events).encode(), BATCH)

    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    assert [r["failure"]["reason"] for r in reply.json()["results"]] == [
        "BROKER_UNAVAILABLE",
        "EVENT_TOO_LARGE",
    ]


async def test_a_topic_is_percent_decoded(tmp_path: Path) -> None:
    log = Log()
    async with serving(app(log), tmp_path / "s") as served:
        await served.ask("POST", "/v1/topics/orders%2Ecreated?x=1", b"", ce())

    assert [topic for topic, _ in log.events] == ["orders.created"]


async def test_a_partition_and_offset_are_a_position_too(tmp_path: Path) -> None:
    async def publish(topic: str, events: object, call: Call) -> Sequence[Outcome]:
        position = Position(partition=0, offset=12)
        return [
            Receipt("1", "log", topic, Durability.STORED, position, duplicate=True),
            Receipt("2", "live", topic, Durability.SENT),
        ]

    kafka = HttpApp([], publish, lambda _: Defaults(source="a", type="b"), LIMITS)
    async with serving(kafka, tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, b"x")

    first, second = (result["receipt"] for result in reply.json()["results"])
    assert (first["position"], first["duplicate"]) == ({"partition": 0, "offset": 12}, True)
    assert (second["durability"], "position" in second) == ("sent", False)


BAD_EVENTS = [
    (ce("orders.bad"), b"", 503, "unavailable", "BROKER_UNAVAILABLE"),
    (ce("orders.large"), b"", 413, "invalid_argument", "EVENT_TOO_LARGE"),
    ({"ce-id": "1"}, b"", 400, "invalid_argument", "EVENT_INVALID"),
    (ce() | {"ce-subject": "%ff"}, b"", 400, "invalid_argument", "EVENT_INVALID"),
    (ce() | {"ce-time": "noon"}, b"", 400, "invalid_argument", "EVENT_INVALID"),
    (STRUCTURED, b"{", 400, "invalid_argument", "BODY_MALFORMED"),
    (STRUCTURED, b"[]", 400, "invalid_argument", "BODY_MALFORMED"),
    (STRUCTURED, b"{}", 400, "invalid_argument", "EVENT_INVALID"),
    (STRUCTURED, b'{"id":"\xff"}', 400, "invalid_argument", None),
    (BATCH, b"{}", 400, "invalid_argument", "BODY_MALFORMED"),
    (
        {"content-type": "application/cloudevents+avro"},
        b"x",
        415,
        "invalid_argument",
        "MEDIA_TYPE_UNSUPPORTED",
    ),
    (ce() | {"content-encoding": "br"}, b"x", 501, "unimplemented", "MEDIA_TYPE_UNSUPPORTED"),
    (ce() | {"content-encoding": "gzip"}, b"nozip", 400, "invalid_argument", "BODY_MALFORMED"),
]


@pytest.mark.parametrize(
    ("headers", "body", "http_status", "code", "reason"), BAD_EVENTS, ids=range(len(BAD_EVENTS))
)
async def test_a_single_event_that_fails_is_an_error_and_the_connection_goes_on(
    headers: dict[str, str],
    body: bytes,
    http_status: int,
    code: str,
    reason: str | None,
    *,
    tmp_path: Path,
) -> None:
    async with serving(app(Log()), tmp_path / "s") as served, served.connect() as connection:
        reply = await connection.ask("POST", TOPIC, body, headers)
        after = await connection.ask("POST", TOPIC, b"", ce())

    assert (reply.status, reply.json()["code"]) == (http_status, code)
    assert reason in {None, reply.json()["details"][0]["debug"]["reason"]}
    assert after.status == 200


@pytest.mark.parametrize(
    ("topic", "http_status", "reason"),
    [("a!", 400, "TOPIC_INVALID"), ("full", 429, "QUEUE_FULL"), ("fault", 500, "INTERNAL")],
)
async def test_a_call_that_fails_as_a_whole_is_an_error(
    topic: str, http_status: int, reason: str, tmp_path: Path
) -> None:
    async with serving(app(Log()), tmp_path / "s") as served:
        reply = await served.ask("POST", f"/v1/topics/{topic}", b"", ce())

    assert (reply.status, reply.json()["details"][0]["debug"]["reason"]) == (http_status, reason)
    assert reply.headers.get("retry-after") == ("1" if topic == "full" else None)


# -- other paths


async def test_the_index_says_what_there_is(tmp_path: Path) -> None:
    async with serving(app(Log()), tmp_path / "s") as served:
        reply = await served.ask("GET", "/")

    assert reply.json() == {
        "cloudevents": "POST /v1/topics/{topic}",
        "rpcs": ["/sidecar.v1.PubSub/Settle"],
    }


@pytest.mark.parametrize(
    ("method", "path", "http_status", "message"),
    [
        ("GET", TOPIC, 405, f"GET is not for {TOPIC}: use POST"),
        ("POST", "/", 405, "POST is not for /: use GET, HEAD"),
        ("GET", "/v1", 404, "nothing is at /v1: POST an event to /v1/topics/{topic}, or"),
        ("POST", "/v1/topics", 404, "nothing is at /v1/topics: "),
        ("POST", "/%F0%9F", 404, "nothing is at /"),
        ("GET", "/" + "x" * 9000, 404, "nothing is at /xxx"),
    ],
)
async def test_other_paths_say_what_exists(
    method: str, path: str, http_status: int, message: str, tmp_path: Path
) -> None:
    async with serving(app(Log()), tmp_path / "s") as served:
        reply = await served.ask(method, path)

    assert reply.status == http_status
    assert reply.json()["message"].startswith(message)
    assert len(reply.body) < 2000


# -- large bodies


@pytest.mark.parametrize("path", [TOPIC, "/sidecar.v1.PubSub/Settle"])
async def test_a_body_that_is_declared_too_large_is_refused_unread(
    path: str, tmp_path: Path
) -> None:
    async with serving(app(Log()), tmp_path / "s") as served, served.connect() as connection:
        head = request("POST", path, b"", {"expect": "100-continue"})
        head = head.replace(b"content-length: 0", b"content-length: %d" % (MAX_BODY + 1))
        await connection.send(head)
        reply = await connection.reply()
        rest = await connection.closed()

    assert (reply.status, reply.json()["code"]) == (413, "resource_exhausted")
    assert f"larger than {MAX_BODY} bytes" in reply.json()["message"]
    assert (reply.headers["connection"], rest) == ("close", b"")


async def test_a_client_that_sends_a_large_body_anyway_reads_the_refusal(tmp_path: Path) -> None:
    """Closed at once it would see a reset."""
    async with serving(app(Log()), tmp_path / "s") as served, served.connect() as connection:
        await connection.send(request("POST", TOPIC, bytes(5_000_000)))
        reply = await connection.reply()
        rest = await connection.closed()

    assert (reply.status, rest) == (413, b"")


async def test_an_endless_chunked_body_is_cut_off_and_not_kept(tmp_path: Path) -> None:
    async with serving(app(Log()), tmp_path / "s") as served, served.connect() as connection:
        head = request("POST", TOPIC).replace(b"content-length: 0", b"transfer-encoding: chunked")
        await connection.send(head)
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        for _ in range(10):
            await connection.send(chunk)
        reply = await connection.reply()
        await connection.send(b"0\r\n\r\n")
        rest = await connection.closed()

    assert (reply.status, rest) == (413, b"")


async def test_a_body_just_within_the_limit_passes(tmp_path: Path) -> None:
    log = Log()
    async with serving(app(log), tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, bytes(MAX_BODY), ce())

    assert reply.status == 200
    assert len(log.events[0][1].data or b"") == MAX_BODY


async def test_large_bodies_share_a_bounded_room(tmp_path: Path) -> None:
    """The fifth at once is told to come back; when one is done there is room again."""
    log = Log()
    log.room.clear()
    body = request("POST", TOPIC, bytes(LARGEST), ce())
    async with (
        serving(app(log, ROOMY), tmp_path / "s") as served,
        contextlib.AsyncExitStack() as stack,
    ):
        waiting = [await stack.enter_async_context(served.connect()) for _ in range(4)]
        for connection in waiting:
            await connection.send(body)
        await wait_until(lambda: served.door.calls == 4)
        refused = await served.ask("POST", TOPIC, bytes(LARGEST), ce())
        log.room.set()
        replies = [await connection.reply() for connection in waiting]
        again = await served.ask("POST", TOPIC, bytes(LARGEST), ce())

    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert [reply.status for reply in replies] == [200] * 4
    assert again.status == 200


async def test_the_room_of_a_client_that_left_is_free_again(tmp_path: Path) -> None:
    log = Log()
    async with serving(app(log, ROOMY), tmp_path / "s") as served:
        for _ in range(6):
            async with served.connect() as connection:
                await connection.send(request("POST", TOPIC, bytes(LARGEST), ce())[:-1])
                await wait_until(lambda: served.door.calls == 1)
            await wait_until(lambda: served.door.calls == 0)
        reply = await served.ask("POST", TOPIC, bytes(LARGEST), ce())

    assert reply.status == 200
    assert len(log.events) == 1


# -- clients that misbehave


NO_HTTP = [
    b"\x00\x01\x02\x03\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET \xff HTTP/1.1\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
]


@pytest.mark.parametrize("data", NO_HTTP, ids=range(len(NO_HTTP)))
async def test_what_is_no_http_is_refused_and_closed(
    data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(app(Log()), tmp_path / "s") as served, served.connect() as connection:
        await connection.send(data)
        reply = await connection.reply()
        rest = await connection.closed()

    assert (reply.status, reply.json()["code"], rest) == (400, "invalid_argument", b"")
    assert caplog.records == []


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    log = Log()
    async with serving(app(log), tmp_path / "s") as served, served.connect() as connection:
        await connection.send(
            b"".join(request("POST", TOPIC, b"x" * i, ce(id=str(i))) for i in range(50))
        )
        replies = [await connection.reply() for _ in range(50)]

    ids = [reply.json()["results"][0]["receipt"]["eventId"] for reply in replies]
    assert ids == [str(i) for i in range(50)]


async def test_an_upgrade_is_ignored(tmp_path: Path) -> None:
    """A client may offer HTTP/2 or a WebSocket; it is answered in HTTP/1.1."""
    headers = ce() | {"connection": "upgrade", "upgrade": "h2c"}
    async with serving(app(Log()), tmp_path / "s") as served:
        reply = await served.ask("POST", TOPIC, b"x", headers)

    assert reply.status == 200


async def test_who_says_nothing_is_closed_in_time_and_does_not_stop_others(
    tmp_path: Path,
) -> None:
    async with serving(app(Log()), tmp_path / "s", receive_seconds=0.2) as served:
        async with served.connect() as silent:
            reply = await served.ask("POST", TOPIC, b"x", ce())
            rest = await silent.closed()

        assert (reply.status, rest) == (200, b"")


@pytest.mark.parametrize(
    "part",
    [
        b"P",
        b"POST /v1/topics/a HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/topics/a HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n",
        b"POST /v1/topics/a HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nabcd",
        b"POST /v1/topics/a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n",
    ],
    ids=["a letter", "half a head", "no body", "half a body", "half a chunked body"],
)
async def test_half_a_request_times_out_with_an_answer(part: bytes, tmp_path: Path) -> None:
    async with serving(app(Log()), tmp_path / "s", receive_seconds=0.2) as served:
        async with served.connect() as slow:
            await slow.send(part)
            reply = await slow.reply()
            rest = await slow.closed()
        await wait_until(lambda: served.door.connections == 0)

        assert (reply.status, reply.json()["code"], rest) == (408, "deadline_exceeded", b"")
        assert served.door.calls == 0


async def test_a_body_that_drips_does_not_win_time(tmp_path: Path) -> None:
    """Slowloris: the deadline is for the whole request, not for the next byte."""

    async def drip(connection: HttpConnection) -> None:
        for _ in range(1000):
            await connection.send(b"x")
            await asyncio.sleep(0.005)

    async with (
        serving(app(Log()), tmp_path / "s", receive_seconds=0.2) as served,
        served.connect() as slow,
        asyncio.TaskGroup() as tasks,
    ):
        head = request("POST", TOPIC).replace(b"content-length: 0", b"content-length: 9999")
        await slow.send(head)
        dripping = tasks.create_task(drip(slow))
        reply = await slow.reply()
        dripping.cancel()

    assert reply.status == 408


async def test_a_second_half_request_times_out_too(tmp_path: Path) -> None:
    async with (
        serving(app(Log()), tmp_path / "s", receive_seconds=0.2) as served,
        served.connect() as slow,
    ):
        first = await slow.ask("POST", TOPIC, b"x", ce())
        await slow.send(b"POST /v1")
        second = await slow.reply()

    assert (first.status, second.status) == (200, 408)


async def test_a_call_under_way_is_not_timed_out(tmp_path: Path) -> None:
    """The bound is for what the client sends; a long poll may last. Pipelined bytes change nothing."""
    log = Log()
    log.room.clear()
    async with (
        serving(app(log), tmp_path / "s", receive_seconds=0.1) as served,
        served.connect() as patient,
        served.connect() as silent,
    ):
        await patient.send(request("POST", TOPIC, b"x", ce()) + b"POST /v1")
        await silent.closed()  # its time was up, and so would be the other's
        log.room.set()
        reply = await patient.reply()

    assert reply.status == 200


async def test_an_idle_connection_is_kept_then_closed(tmp_path: Path) -> None:
    bounds = {"receive_seconds": 0.1, "idle_seconds": 1}
    async with (
        serving(app(Log()), tmp_path / "s", **bounds) as served,
        served.connect() as idle,
        served.connect() as silent,
    ):
        await idle.ask("GET", "/")
        await silent.closed()
        again = await idle.ask("GET", "/")
        rest = await idle.closed()

    assert (again.status, rest) == (200, b"")


async def test_a_connection_answered_before_its_body_came_is_not_kept_for_ever(
    tmp_path: Path,
) -> None:
    async with (
        serving(app(Log()), tmp_path / "s", idle_seconds=0.2) as served,
        served.connect() as connection,
    ):
        whole = request("POST", "/nothing", b"12345")
        await connection.send(whole[:-5])
        reply = await connection.reply()
        await connection.send(whole[-5:])
        rest = await connection.closed()

    assert (reply.status, rest) == (404, b"")


async def test_a_refused_client_that_stays_is_thrown_out(tmp_path: Path) -> None:
    """It has had its answer, and the time to read it."""
    async with (
        serving(app(Log()), tmp_path / "s", receive_seconds=0.2) as served,
        served.connect() as connection,
    ):
        await connection.send(NO_HTTP[0])
        await connection.closed()
        await wait_until(lambda: served.door.connections == 0)


async def test_headers_without_end_are_cut_off(tmp_path: Path) -> None:
    async with serving(app(Log()), tmp_path / "s") as served, served.connect() as connection:
        await connection.send(b"GET / HTTP/1.1\r\n")
        line = b"x: " + b"y" * 8000 + b"\r\n"
        for _ in range(100):
            await connection.send(line)
        reply = await connection.reply()

    assert reply.status == 431


async def test_who_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """A large answer that nobody takes must not be held for ever."""

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, (200, [], bytes(50_000_000)))

    bounds = {"receive_seconds": 0.2, "idle_seconds": 0.2}
    async with serving(large, tmp_path / "s", **bounds) as served, served.connect() as deaf:
        await deaf.send(request("GET", "/"))
        await wait_until(lambda: served.door.connections == 1)
        await wait_until(lambda: served.door.connections == 0)

        assert served.door.calls == 0


async def test_a_connection_too_many_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    async with (
        serving(app(Log()), tmp_path / "s", max_connections=2) as served,
        served.connect() as first,
        served.connect() as second,
    ):
        await first.ask("GET", "/")
        await second.ask("GET", "/")
        async with served.connect() as third:
            refused = await third.reply()
            rest = await third.closed()
        after = await first.ask("POST", TOPIC, b"x", ce())

    assert (refused.status, rest, after.status) == (503, b"", 200)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.timeout(120)
async def test_ten_thousand_connects_and_disconnects_leave_nothing(tmp_path: Path) -> None:
    """Silent ones, half requests, half bodies and calls whose client leaves."""
    parts = [
        b"",
        b"POST /v1",
        request("POST", TOPIC, b"12345", ce())[:-2],
        request("POST", TOPIC, b"12345", ce()),
        b"\x00\r\n\r\n",
    ]
    async with serving(app(Log()), tmp_path / "s") as served:
        await served.ask("GET", "/")
        await wait_until(lambda: served.door.connections == 0)
        gc.collect()
        files = open_files()
        tasks = len(asyncio.all_tasks())
        for i in range(10_000):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(served.path))
                client.send(parts[i % len(parts)])
            if i % 500 == 499:
                await wait_until(lambda: served.door.connections == 0)
            elif i % 50 == 49:
                await asyncio.sleep(0)
        await wait_until(lambda: served.door.connections == 0 and served.door.calls == 0)
        reply = await served.ask("POST", TOPIC, b"x", ce())
        await wait_until(lambda: served.door.connections == 0)

        assert reply.status == 200
        assert len(asyncio.all_tasks()) == tasks
        assert open_files() == files


async def test_a_lost_connection_leaves_no_garbage_cycle(tmp_path: Path) -> None:
    """Memory comes back at once, not when the collector gets to it."""
    async with serving(app(Log()), tmp_path / "s") as served:
        await served.ask("POST", TOPIC, b"x", ce())
        await wait_until(lambda: served.door.connections == 0)
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                await served.ask("POST", TOPIC, b"x", ce())
            await wait_until(lambda: served.door.connections == 0)
            kept = [o for o in gc.get_objects() if type(o).__name__ == "_Connection"]
        finally:
            gc.enable()

    assert len(kept) <= 1


# -- starting and stopping


async def test_stop_lets_a_call_finish_and_takes_no_new_ones(tmp_path: Path) -> None:
    log = Log()
    log.room.clear()
    path = tmp_path / "s"
    async with (
        serving(app(log), path) as served,
        served.connect() as idle,
        served.connect() as busy,
    ):
        await idle.ask("GET", "/")
        await busy.send(request("POST", TOPIC, b"x", ce()))
        await wait_until(lambda: served.door.calls == 1)
        async with asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(served.door.stop(10))
            rest = await idle.closed()
            gone = not path.exists()
            stopped_early = stopping.done()
            log.room.set()
            reply = await busy.reply()

    assert (rest, gone, stopped_early) == (b"", True, False)
    assert (reply.status, reply.headers["connection"]) == (200, "close")


async def test_stop_ends_calls_after_the_grace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log()
    log.room.clear()
    async with serving(app(log), tmp_path / "s") as served, served.connect() as connection:
        await connection.send(request("POST", TOPIC, b"x", ce()))
        await wait_until(lambda: served.door.calls == 1)
        await served.door.stop(0.05)
        rest = await connection.closed()

        assert (rest, served.door.calls, served.door.connections) == (b"", 0, 0)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "ended 1 HTTP calls that did not finish in time"
    ]


async def test_a_door_that_never_started_stops_and_removes_its_socket(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        listener = sockets.unix_socket(tmp_path / "s")
        await Door(app(Log()), [listener], tasks=tasks).stop(1)

    assert listener.fileno() == -1
    assert not (tmp_path / "s").exists()


async def test_one_door_serves_unix_and_tcp(tmp_path: Path) -> None:
    peers = []

    async def publish(topic: str, events: object, call: Call) -> Sequence[Outcome]:
        peers.append(call.peer)
        return []

    both = HttpApp([], publish, lambda _: Defaults(source="a", type="b"), LIMITS)
    async with asyncio.TaskGroup() as tasks:
        tcp = sockets.tcp_socket("127.0.0.1", 0)
        port = tcp.getsockname()[1]
        door = Door(both, [sockets.unix_socket(tmp_path / "s"), tcp], tasks=tasks)
        await door.start()
        for opened in (
            asyncio.open_unix_connection(tmp_path / "s"),
            asyncio.open_connection("127.0.0.1", port),
        ):
            reader, writer = await opened
            await HttpConnection(reader, writer).ask("POST", TOPIC, b"x")
            writer.close()
            await writer.wait_closed()
        await door.stop(1)

    assert peers[0] == "unix"
    assert peers[1].startswith("127.0.0.1:")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_publishes_over_the_socket(tmp_path: Path) -> None:
    log = Log()
    async with serving(app(log), tmp_path / "s") as served:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--fail-with-body", "--unix-socket", str(served.path),
            "-H", "ce-specversion: 1.0", "-H", "ce-id: 1", "-H", "ce-source: /shop",
            "-H", "ce-type: orders.created", "-H", "content-type: application/json",
            "-d", '{"total": 9}', f"http://sidecar{TOPIC}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await process.communicate()

    assert process.returncode == 0
    assert json.loads(output)["results"][0]["receipt"]["eventId"] == "1"
    assert log.events[0][1].data == b'{"total": 9}'


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_is_told_of_a_body_too_large(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(base64.b64encode(bytes(3_000_000)))
    async with serving(app(Log()), tmp_path / "s") as served:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "-w", "%{http_code}", "-o", str(tmp_path / "out"),
            "--unix-socket", str(served.path), "--data-binary", f"@{large}",
            f"http://sidecar{TOPIC}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await process.communicate()

    assert (process.returncode, output) == (0, b"413")
    assert "limits.max_batch_bytes" in (tmp_path / "out").read_text()
