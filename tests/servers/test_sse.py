"""Deliveries as server-sent events, read from real sockets, of a sidecar on a memory broker."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.config import Limits
from sidecar.event import NOTHING
from sidecar.servers.http import HttpApp
from sidecar.servers.sse import EventStreams
from sidecar.services.pubsub import PubSub
from sidecar.wire.cloudevents import Defaults
from tests.delivery.stage import AT_ONCE, Sidecar, numbers, running, stored
from tests.delivery.stage import event as make
from tests.support.http import HttpConnection, Reply, Served, request, serving
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from sidecar.delivery.subscription import Subscription

EVENTS = "/v1/subscriptions/billing/events"
SECONDS = 15.0


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@dataclass
class Sent:
    """One event of the stream, or a comment."""

    event: str = ""
    id: str = ""
    comment: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def data(self) -> Any:
        assert len(self.lines) == 1, self.lines
        return json.loads(self.lines[0])

    @property
    def number(self) -> str:
        found: str = self.data["event"]["id"]
        return found


class Stream:
    """The reader of one stream: undoes the chunks, and parses as the HTML standard has it."""

    def __init__(self, connection: HttpConnection, headers: dict[str, str]) -> None:
        self._connection = connection
        self.headers = headers
        self._text = b""

    async def next(self) -> Sent:
        """Comments included. Raises EOFError at the end of the body."""
        async with asyncio.timeout(SECONDS):
            while b"\n\n" not in self._text:
                await self._chunk()
        block, _, self._text = self._text.partition(b"\n\n")
        sent = Sent()
        for line in block.decode().split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                sent.lines.append(value)
            else:
                setattr(sent, name or "comment", value)
        return sent

    async def _chunk(self) -> None:
        reader = self._connection.reader
        size = int(await reader.readuntil(b"\r\n"), 16)
        chunk = await reader.readexactly(size + 2)
        if not size:
            raise EOFError
        self._text += chunk[:-2]

    async def take(self, count: int) -> list[Sent]:
        """So many deliveries, and nothing else in between."""
        taken = [await self.next() for _ in range(count)]
        assert {sent.event for sent in taken} <= {"delivery"}, taken
        return taken

    async def ends(self) -> None:
        with pytest.raises(EOFError):
            await self.next()


@dataclass
class Stage:
    sidecar: Sidecar
    subscription: Subscription
    streams: EventStreams
    served: Served

    @asynccontextmanager
    async def stream(self, query: str = "", path: str = EVENTS) -> AsyncIterator[Stream]:
        """An open stream, behind its first event."""
        async with self.raw(query, path) as stream:
            assert (await stream.next()).event == "opened"
            yield stream

    @asynccontextmanager
    async def raw(self, query: str = "", path: str = EVENTS) -> AsyncIterator[Stream]:
        async with self.served.connect() as connection:
            await connection.send(request("GET", path + query))
            head = (await connection.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            assert head[0] == "HTTP/1.1 200 OK", head
            yield Stream(connection, dict(line.split(": ") for line in head[1:-2]))

    async def settle(self, *tokens: str, verdict: str = "ACK", **more: object) -> None:
        """By POST, on a connection of its own; each of them counts."""
        settlements = [{"token": t, "verdict": f"VERDICT_{verdict}"} | more for t in tokens]
        reply = await self.served.ask(
            "POST",
            "/sidecar.v1.PubSub/Settle",
            json.dumps({"settlements": settlements}).encode(),
            {"content-type": "application/json"},
        )
        assert reply.status == 200
        assert [r for r in reply.json()["results"] if "failure" in r] == []

    @property
    def out(self) -> int:
        return self.subscription.window.out


@asynccontextmanager
async def stage(
    tmp_path: Path,
    *,
    max_streams: int = 1000,
    ping_seconds: float = 60,
    bounds: Mapping[str, Any] = NOTHING,
    **described: Any,
) -> AsyncIterator[Stage]:
    limits = Limits(max_streams=max_streams)
    async with running() as sidecar:
        subscription = sidecar.subscription(**described)
        pubsub = PubSub(
            sidecar.publisher,
            sidecar.hub,
            defaults_for=lambda _: Defaults(source="s", type="t"),
            limits=limits,
        )
        streams = EventStreams(sidecar.hub, max_streams=max_streams, ping_seconds=ping_seconds)
        app = HttpApp(
            pubsub.methods(),
            pubsub.publish_events,
            lambda _: Defaults(source="s", type="t"),
            limits,
            streams=streams,
        )
        async with serving(app, tmp_path / "s", **bounds) as served:
            yield Stage(sidecar, subscription, streams, served)


def attempts(sent: list[Sent]) -> list[tuple[str, int]]:
    return [(one.number, one.data["attempt"]) for one in sent]


# -- what is sent


async def test_the_first_event_says_what_was_opened(tmp_path: Path) -> None:
    async with stage(tmp_path, lease_seconds=7) as it, it.raw() as stream:
        opened = await stream.next()

        assert opened.event == "opened"
        assert opened.data == {
            "subscription": "billing",
            "broker": "memory",
            "topic": "orders.>",
            "leaseSeconds": 7.0,
        }
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.headers["cache-control"] == "no-store"


async def test_a_delivery_is_an_event_with_its_token_and_the_cloudevent(tmp_path: Path) -> None:
    event = make(
        "1",
        data=b'{"a":"\xc3\xa4"}',
        content_type="application/json",
        key="k\u00e4y",
        subject="s",
        extensions={"color": "bl\u00e5"},
    )
    async with stage(tmp_path) as it, it.stream() as stream:
        await it.sidecar.publish("orders.new", event)
        [sent] = await stream.take(1)

        assert sent.id == sent.data["token"]
        assert it.subscription.window.find(sent.id) is not None
        assert sent.data == {
            "token": sent.id,
            "attempt": 1,
            "topic": "orders.new",
            "position": {"stream": "memory", "sequence": 1},
            "event": {
                "specversion": "1.0",
                "id": "1",
                "source": "/shop",
                "type": "order.created",
                "time": "1970-01-01T00:00:00.000000001Z",
                "datacontenttype": "application/json",
                "subject": "s",
                "partitionkey": "k\u00e4y",
                "color": "bl\u00e5",
                "data": {"a": "\u00e4"},
            },
        }


async def test_data_of_several_lines_stays_on_one(tmp_path: Path) -> None:
    """A line end would end the field: JSON has them between its parts, and text escaped."""
    json_data = make("1", data=b'{\r\n "a": "x\\ny"\n}', content_type="application/json")
    text = make("2", data=b"one\r\n\ndata: two\n\n", content_type="text/plain")
    async with stage(tmp_path) as it, it.stream() as stream:
        await it.sidecar.publish("orders.new", json_data, text)
        first, second = await stream.take(2)

        assert first.data["event"]["data"] == {"a": "x\ny"}
        assert second.data["event"]["data"] == "one\r\n\ndata: two\n\n"


async def test_a_quiet_stream_is_kept_alive_by_comments(tmp_path: Path) -> None:
    async with stage(tmp_path, ping_seconds=0.05) as it, it.stream() as stream:
        pings = [await stream.next() for _ in range(3)]

        assert [ping.comment for ping in pings] == ["ping"] * 3
        await it.sidecar.publish("orders.new", make("1"))
        while not (sent := await stream.next()).event:
            assert sent.comment == "ping"
        assert sent.number == "1"


async def test_the_doors_timeouts_do_not_end_a_quiet_stream(tmp_path: Path) -> None:
    bounds = {"receive_seconds": 0.1, "idle_seconds": 0.1}
    async with (
        stage(tmp_path, ping_seconds=0.1, bounds=bounds) as it,
        it.stream() as stream,
    ):
        for _ in range(12):
            assert (await stream.next()).comment == "ping"


async def test_a_thousand_events_come_in_order_per_key(tmp_path: Path) -> None:
    """Ten keys, each settled by its token on another connection; every event comes once."""
    async with stage(tmp_path) as it, it.stream("?credit=64") as stream:
        for first in range(0, 1000, 100):
            events = [make(str(n), key=str(n % 10)) for n in range(first, first + 100)]
            await it.sidecar.publish("orders.new", *events)
        async with it.served.connect() as settling:
            got: dict[str, list[int]] = {}
            for _ in range(1000):
                [sent] = await stream.take(1)
                got.setdefault(sent.data["event"]["partitionkey"], []).append(int(sent.number))
                body = {"settlements": [{"token": sent.id, "verdict": "VERDICT_ACK"}]}
                reply = await settling.ask(
                    "POST",
                    "/sidecar.v1.PubSub/Settle",
                    json.dumps(body).encode(),
                    {"content-type": "application/json"},
                )
                assert reply.status == 200

        assert got == {str(key): list(range(key, 1000, 10)) for key in range(10)}
        assert it.sidecar.heard.results == {"ack": 1000}
        assert it.out == 0


# -- credit


async def test_no_more_than_its_credit_is_unsettled(tmp_path: Path) -> None:
    async with stage(tmp_path) as it, it.stream("?credit=3") as stream:
        await it.sidecar.publish("orders.new", *(make(i) for i in numbers(0, 10)))
        three = await stream.take(3)
        assert it.out == 3

        await it.settle(three[1].id)
        [fourth] = await stream.take(1)

        assert fourth.number == "3"
        assert it.out == 3


@pytest.mark.parametrize("verdict", ["NACK", "REJECT"])
async def test_whatever_ends_a_delivery_frees_one(tmp_path: Path, verdict: str) -> None:
    async with stage(tmp_path) as it, it.stream("?credit=1") as stream:
        await it.sidecar.publish("orders.new", make("1"), make("2"))
        [first] = await stream.take(1)
        more = {"delay": "3600s"} if verdict == "NACK" else {}
        await it.settle(first.id, verdict=verdict, **more)

        assert attempts(await stream.take(1)) == [("2", 1)]
        assert it.out == 1


async def test_a_lease_that_ends_frees_one_too(tmp_path: Path) -> None:
    retry = {"initial_seconds": 3600, "max_seconds": 3600}
    async with (
        stage(tmp_path, lease_seconds=1, retry=retry) as it,
        it.stream("?credit=1") as stream,
    ):
        await it.sidecar.publish("orders.new", make("1"), make("2"))

        assert attempts(await stream.take(2)) == [("1", 1), ("2", 1)]
        assert it.sidecar.heard.results["expired"] == 1


async def test_an_extension_frees_none(tmp_path: Path) -> None:
    async with stage(tmp_path) as it, it.stream("?credit=1") as stream:
        await it.sidecar.publish("orders.new", make("1"), make("2"))
        [first] = await stream.take(1)
        await it.settle(first.id, verdict="EXTEND")
        assert it.out == 1

        await it.settle(first.id)
        assert attempts(await stream.take(1)) == [("2", 1)]


async def test_what_another_consumer_has_does_not_count(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        other = it.sidecar.app(it.subscription)
        await it.sidecar.publish("orders.new", *(make(i) for i in numbers(0, 5)))
        await other.take(5)
        other.credit = 0
        async with it.stream("?credit=2") as stream:
            await it.sidecar.publish("orders.new", make("5"), make("6"), make("7"))

            assert [sent.number for sent in await stream.take(2)] == ["5", "6"]
            assert it.out == 7


# -- who goes


async def test_what_a_reader_leaves_unsettled_counts_as_a_crash(tmp_path: Path) -> None:
    """As for a gRPC stream that broke. What it settled before stays settled."""
    async with stage(tmp_path, retry=AT_ONCE) as it:
        await it.sidecar.publish("orders.new", make("1"), make("2"))
        async with it.stream() as stream:
            first, second = await stream.take(2)
            await it.settle(first.id)
        async with it.stream() as again:
            assert attempts(await again.take(1)) == [("2", 2)]

        assert second.number == "2"


async def test_the_last_attempt_of_a_reader_that_goes_is_a_dead_letter(tmp_path: Path) -> None:
    async with stage(tmp_path, retry={"max_attempts": 1}) as it:
        await it.sidecar.publish("orders.new", make("1"))
        async with it.stream() as stream:
            await stream.take(1)
        [dead] = await stored(it.sidecar.brokers["memory"], "dlq.orders.new", 1)

        assert dead.event is not None
        assert dead.event.id == "1"


async def test_a_token_may_be_settled_after_others_came(tmp_path: Path) -> None:
    """A delivery belongs to its token, not to the connection that is settled on."""
    async with stage(tmp_path) as it, it.stream() as stream:
        await it.sidecar.publish("orders.new", make("1"), make("2"))
        first, second = await stream.take(2)
        await it.settle(second.id, first.id)

        assert it.out == 0
        assert it.sidecar.heard.results == {"ack": 2}


# -- a slow reader


BIG = bytes(256 * 1024)


async def test_a_slow_reader_gets_no_more_while_some_is_unwritten(tmp_path: Path) -> None:
    """64 MiB for a socket that takes a few hundred kB: what is out stays a batch, not the credit."""
    async with (
        stage(tmp_path, max_in_flight=1000, max_in_flight_bytes=2**30) as it,
        it.stream("?credit=1000") as stream,
    ):
        for n in range(256):
            await it.sidecar.publish("orders.new", make(str(n), data=BIG))
        await until(lambda: it.subscription.window.ready > 100)
        stuck = it.out
        assert 0 < stuck < 128

        taken = 0
        while taken < 256:
            [sent] = await stream.take(1)
            assert sent.number == str(taken)
            taken += 1

        await until(lambda: it.out == 256)
        assert it.sidecar.heard.results == {}


async def test_what_was_never_written_is_uncounted_when_its_reader_goes(tmp_path: Path) -> None:
    async with stage(tmp_path, retry=AT_ONCE, max_in_flight=1000) as it:
        await it.sidecar.publish("orders.new", *(make(i, data=BIG) for i in numbers(0, 40)))
        async with it.stream("?credit=1000") as stream:
            await until(lambda: it.out == 40)
            written = [sent.number for sent in await stream.take(3)]
        await until(lambda: not it.streams.open)
        released = it.sidecar.heard.results["released"]
        async with it.stream("?settle=auto") as again:
            got = dict(attempts(await again.take(40)))

        assert written == ["0", "1", "2"]
        assert [got[number] for number in written] == [2, 2, 2]
        assert got["39"] == 1
        assert list(got.values()).count(1) == released > 20


async def test_what_waited_for_its_reader_until_its_lease_ended_is_not_written(
    tmp_path: Path,
) -> None:
    """Its token is void: another attempt of it comes in its time."""
    retry = {"initial_seconds": 3600, "max_seconds": 3600}
    async with stage(tmp_path, lease_seconds=1, retry=retry) as it, it.stream() as stream:
        await it.sidecar.publish("orders.new", *(make(i, data=BIG) for i in numbers(0, 16)))
        await until(lambda: it.sidecar.heard.results["expired"] == 16)
        await it.sidecar.publish("orders.new", make("last"))
        got = [(await stream.next()).number]
        while got[-1] != "last":
            got.append((await stream.next()).number)

        assert 1 < len(got) < 8
        assert got[:-1] == numbers(0, len(got) - 1)


# -- to watch


async def test_with_settle_auto_each_event_is_acked_when_it_is_written(tmp_path: Path) -> None:
    async with stage(tmp_path) as it, it.stream("?settle=auto&credit=2") as stream:
        await it.sidecar.publish("orders.new", *(make(i, key="k") for i in numbers(0, 50)))

        assert attempts(await stream.take(50)) == [(i, 1) for i in numbers(0, 50)]
        await until(lambda: it.sidecar.heard.results == {"ack": 50})
        assert it.out == 0


async def test_a_watcher_that_goes_costs_no_attempt(tmp_path: Path) -> None:
    async with stage(tmp_path, retry={"max_attempts": 1}, max_in_flight=1000) as it:
        await it.sidecar.publish("orders.new", *(make(i, data=BIG) for i in numbers(0, 40)))
        async with it.stream("?settle=auto&credit=1000") as stream:
            await stream.take(1)
            await until(lambda: it.out > 10)
        await until(lambda: not it.streams.open)
        acked = it.sidecar.heard.results["ack"]
        async with it.stream("?settle=auto&credit=1000") as again:
            rest = attempts(await again.take(40 - acked))

        assert rest == [(i, 1) for i in numbers(acked, 40)]
        assert it.sidecar.heard.dead == []


async def test_what_is_acked_is_what_the_system_took(tmp_path: Path) -> None:
    """Not what waits in a buffer of ours: that is lost with the connection, and another's then."""
    async with stage(tmp_path, max_in_flight=1000) as it:
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(str(it.served.path))
            reader.sendall(request("GET", f"{EVENTS}?settle=auto&credit=1000"))
            await it.sidecar.publish(
                "orders.new", *(make(i, data=bytes(4096)) for i in numbers(0, 300))
            )
            await until(lambda: it.out > 0 and it.sidecar.heard.results["ack"] > 0)
            await it.served.door.stop(0)
            reader.settimeout(SECONDS)
            received = b"".join(iter(lambda: reader.recv(65536), b""))

        whole = received.count(b"\n\n\r\n") - 1  # the first one is that of the opening
        assert 0 < whole < 100
        assert it.sidecar.heard.results["ack"] == whole


# -- the end


async def test_a_drain_ends_the_stream_with_a_reason_after_its_settlements(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as it, it.stream() as stream:
        await it.sidecar.publish("orders.new", make("1"))
        [sent] = await stream.take(1)
        draining = asyncio.create_task(it.sidecar.hub.drain(SECONDS))
        await until(lambda: it.subscription.draining)
        await it.settle(sent.id)
        closed = await stream.next()

        assert closed.event == "closed"
        assert closed.data == {
            "reason": "DRAINING",
            "message": "the sidecar is stopping",
            "retryable": True,
        }
        await stream.ends()
        assert await draining == 0
        assert it.sidecar.heard.results == {"ack": 1}


async def test_what_is_unsettled_at_the_end_of_the_drain_goes_back_uncounted(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as it, it.stream() as stream:
        await it.sidecar.publish("orders.new", make("1"))
        await stream.take(1)
        left = await it.sidecar.hub.drain(0.1)
        closed = await stream.next()

        assert (left, closed.event) == (1, "closed")
        assert it.sidecar.heard.results == {"released": 1}


async def test_while_draining_no_stream_is_opened(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        it.subscription.drain()
        reply = await it.served.ask("GET", EVENTS)

        assert (reply.status, reason(reply)) == (503, "DRAINING")


DECLARED = """
[brokers.memory]
type = "memory"

[[subscriptions]]
name = "billing"
topic = "orders.>"
"""


async def test_a_sidecar_that_is_stopped_says_so_on_its_streams() -> None:
    with SidecarProcess(DECLARED) as process:
        reader, writer = await asyncio.open_unix_connection(process.http_socket)
        writer.write(request("GET", EVENTS))
        await reader.readuntil(b"event: opened\n")
        assert await asyncio.to_thread(process.stop) == 0
        rest = await reader.read()
        writer.close()

    assert b'event: closed\ndata: {"reason":"DRAINING",' in rest
    assert rest.endswith(b"\n\n\r\n0\r\n\r\n")


async def test_an_event_that_cannot_be_written_ends_the_stream_and_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would come again for ever. The log has where, and nothing of the event."""
    async with stage(tmp_path, retry={"max_attempts": 1}) as it, it.stream() as stream:
        await it.sidecar.publish("orders.new", make("1"), make("2", subject="\ud800"))
        await stream.take(1)
        closed = await stream.next()
        await stream.ends()
        await stored(it.sidecar.brokers["memory"], "dlq.orders.new", 2)

    assert (closed.event, closed.data["reason"]) == ("closed", "INTERNAL")
    assert "UnicodeEncodeError" in caplog.text
    assert "ud800" not in caplog.text


# -- what is refused


async def test_a_name_that_nobody_knows_is_not_found(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        reply = await it.served.ask("GET", "/v1/subscriptions/nobody/events")

        assert (reply.status, reason(reply)) == (404, "SUBSCRIPTION_MISSING")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_another_method_is_refused(tmp_path: Path, method: str) -> None:
    async with stage(tmp_path) as it:
        reply = await it.served.ask(method, EVENTS)

        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        assert reason(reply) == "METHOD_MISSING"


@pytest.mark.parametrize("path", ["/v1/subscriptions/", "/v1/subscriptions/a/b/events"])
async def test_other_paths_are_not_found_and_say_what_there_is(tmp_path: Path, path: str) -> None:
    async with stage(tmp_path) as it:
        reply = await it.served.ask("GET", path)

        assert reply.status == 404
        assert "/v1/subscriptions/{name}/events" in reply.json()["message"]


async def test_head_is_answered_without_a_stream(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        reply = await it.served.ask("HEAD", EVENTS)

        assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
        assert it.subscription.consumers == []


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("credit=0", "credit: must be a number from 1 to 1000"),
        ("credit=1001", "credit: must be a number from 1 to 1000"),
        ("credit=ten", "credit: must be a number from 1 to 1000"),
        ("credit=", "credit: must be a number from 1 to 1000"),
        ("settle=never", 'settle: must be "token" or "auto"'),
        ("sort=up", "'sort' is not known: use credit and settle"),
    ],
)
async def test_a_query_that_makes_no_sense_says_why(tmp_path: Path, query: str, fault: str) -> None:
    async with stage(tmp_path) as it:
        reply = await it.served.ask("GET", f"{EVENTS}?{query}")

        assert (reply.status, reply.json()["message"]) == (400, fault)


async def test_so_many_streams_may_be_open_and_calls_still_pass(tmp_path: Path) -> None:
    bounds = {"max_connections": 3}
    async with stage(tmp_path, max_streams=2, bounds=bounds) as it, it.stream():
        async with it.stream():
            refused = await it.served.ask("GET", EVENTS)
            assert (refused.status, reason(refused)) == (429, "QUEUE_FULL")
            assert refused.headers["retry-after"] == "1"

            assert (await it.served.ask("GET", "/")).status == 200
        await until(lambda: it.streams.open == 1)
        async with it.stream():
            assert it.streams.open == 2


async def test_the_index_names_it(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        reply = await it.served.ask("GET", "/")

        assert reply.json()["events"] == "GET /v1/subscriptions/{name}/events"


def reason(reply: Reply) -> str:
    found: str = reply.json()["details"][0]["debug"]["reason"]
    return found
