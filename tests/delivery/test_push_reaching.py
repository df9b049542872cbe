"""Push: whether the app had the event in its hands is told exactly. Servers that misbehave, a memory broker."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.config import check
from sidecar.delivery.push import client
from sidecar.delivery.push.circuit import FAILURES, State
from tests.delivery.http_app import Answer, Got, HttpApp
from tests.delivery.stage import AT_ONCE, event, memory, numbers, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from sidecar.delivery.push.pusher import Pusher
    from tests.delivery.stage import Sidecar

GOOD = b"HTTP/1.1 204 No Content\r\n\r\n"


def push(sidecar: Sidecar, url: str, **more: Any) -> Pusher:
    """A subscription that pushes there is declared, and runs."""
    described = {"name": "billing", "topic": "orders.>", "push": {"url": url}} | more
    settings = check({"brokers": {"memory": {"type": "memory"}}, "subscriptions": [described]})
    sidecar.hub._start(sidecar.hub.declare(settings.subscriptions[0]))
    pusher = sidecar.hub.pusher("billing")
    assert pusher is not None
    return pusher


class Connection:
    """One accepted connection, read and closed byte by byte."""

    def __init__(self, number: int, accepted: socket.socket) -> None:
        self.number = number
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()

    async def request(self) -> str:
        """The id of the event in the next request, which has no body; "" when there is no more."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            more = await self._loop.sock_recv(self._accepted, 65536)
            if not more:
                return ""
            head += more
        return head.partition(b"ce-id: ")[2].partition(b"\r\n")[0].decode()

    async def some(self) -> None:
        """The first bytes of a request that is larger."""
        await self._loop.sock_recv(self._accepted, 1000)

    async def arrived(self) -> None:
        """A request is there, or the end; nothing is read of it."""
        readable = asyncio.Event()
        self._loop.add_reader(self._accepted, readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(self._accepted)

    async def answer(self) -> None:
        await self._loop.sock_sendall(self._accepted, GOOD)

    async def say(self, answer: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # of what is too long the end is not read
            await self._loop.sock_sendall(self._accepted, answer)

    async def good(self) -> None:
        """Answer all that comes."""
        while await self.request():
            await self.answer()


@asynccontextmanager
async def serving(
    serve: Callable[[Connection], Awaitable[None]],
    *,
    path: Path | None = None,
    host: str = "",
    queue: int = 100,
    accepting: asyncio.Event | None = None,
) -> AsyncIterator[str]:
    """
    The URL of a server: *serve* has a connection, which is closed when it returns.

    At most *queue* connections wait, and one; they do until *accepting* is set.
    """
    if path is not None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        url = f"unix://{path}:/"
    else:
        listening = socket.socket()
        listening.bind((host or "127.0.0.1", 0))
        url = "http://{}:{}/".format(*listening.getsockname())
    listening.listen(queue)
    listening.setblocking(False)  # noqa: FBT003 - its name
    loop = asyncio.get_running_loop()

    async def one(connection: Connection, accepted: socket.socket) -> None:
        with accepted:
            await serve(connection)

    async def accept(tasks: asyncio.TaskGroup) -> None:
        number = 0
        if accepting is not None:
            await accepting.wait()
        while True:
            accepted, _ = await loop.sock_accept(listening)
            accepted.setblocking(False)  # noqa: FBT003
            number += 1
            tasks.create_task(one(Connection(number, accepted), accepted))

    with listening:
        async with asyncio.TaskGroup() as tasks:
            accepter = tasks.create_task(accept(tasks))
            try:
                yield url
            finally:
                accepter.cancel()


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_request_that_was_not_read_goes_to_a_fresh_connection_and_costs_nothing(
    tmp_path: Path, *, unix: bool
) -> None:
    """As when the app ends a kept connection just as it is written to."""

    async def serve(connection: Connection) -> None:
        if connection.number == 1:
            await connection.request()
            await connection.answer()
            await connection.arrived()
        else:
            await connection.good()

    async with (
        serving(serve, path=tmp_path / "app.sock" if unix else None) as url,
        running() as sidecar,
    ):
        push(sidecar, url, retry={"max_attempts": 1})
        await sidecar.publish("orders.new", event("1"))
        await until(lambda: sidecar.heard.results["ack"] == 1)
        await sidecar.publish("orders.new", event("2"))
        await until(lambda: sidecar.heard.results["ack"] == 2)

    assert sidecar.heard.results == {"ack": 2}
    assert sidecar.heard.pushes == {"ack": 2}


async def test_an_app_that_ends_before_it_reads_is_down_not_crashed() -> None:
    """Its connections wait to be accepted when it ends."""
    ids: list[str] = []

    async def serve(connection: Connection) -> None:
        if connection.number <= 3:
            await connection.arrived()
            return
        while got := await connection.request():
            ids.append(got)
            await connection.answer()

    async with serving(serve) as url, running() as sidecar:
        push(sidecar, url, retry={"max_attempts": 1}, push={"url": url, "max_concurrency": 1})
        await sidecar.publish("orders.new", event("1"), event("2"))
        await until(lambda: sidecar.heard.results["ack"] == 2)

    assert sidecar.heard.results == {"released": 3, "ack": 2}
    assert sidecar.heard.pushes == {"unreachable": 3, "ack": 2}
    assert sorted(ids) == ["1", "2"]


async def test_of_a_large_request_the_app_may_have_read_enough_to_crash() -> None:
    """Else an event that ends the app before it has read all would be tried for ever."""
    broker = memory()
    requests = 0

    async def serve(connection: Connection) -> None:
        nonlocal requests
        requests += 1
        await connection.some()

    async with serving(serve) as url, running(broker) as sidecar:
        push(sidecar, url, retry={"max_attempts": 9, **AT_ONCE})
        large = event("1", data=b"x" * 100_000, content_type="text/plain")
        await sidecar.publish("orders.new", large)
        await until(lambda: bool(sidecar.heard.dead))

    assert [fact.reason for fact in sidecar.heard.dead] == ["app_crash"]
    assert sidecar.heard.pushes == {"broken": 3}


@pytest.mark.parametrize(
    ("host", "ended"),
    [("127.0.0.1", 3), ("127.0.0.2", 4)],
    ids=["on the same host", "on another one"],
)
async def test_a_poison_event_does_not_go_through_the_idle_connections(
    host: str, ended: int
) -> None:
    """Each is to another worker of the app. From another host one end may have crossed the request."""
    poisoned: list[int] = []
    together = asyncio.Barrier(4)

    async def serve(connection: Connection) -> None:
        first = connection.number <= 4
        while got := await connection.request():
            if got == "poison":
                poisoned.append(connection.number)
                return
            if first:
                await together.wait()
                first = False
            await connection.answer()

    async with serving(serve, host=host) as url, running() as sidecar:
        pusher = push(sidecar, url, retry={"max_attempts": 9, **AT_ONCE})
        await sidecar.publish("orders.new", *map(event, numbers(0, 4)))
        await until(lambda: sidecar.heard.results["ack"] == 4)
        idle = pusher._client._idle
        clock = asyncio.get_running_loop().time
        await until(lambda: all(clock() - c._rested_at > client.IDLE_SECONDS for c in idle))
        kept = len(idle)
        await sidecar.publish("orders.new", event("poison"), event("after"))
        await until(lambda: bool(sidecar.heard.dead) and sidecar.heard.results["ack"] == 5)

    assert kept == 4
    assert [fact.reason for fact in sidecar.heard.dead] == ["app_crash"]
    assert len(poisoned) == ended


@asynccontextmanager
async def with_a_full_queue(path: Path | None = None) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """The URL of a server that hangs, and what lets it go on. It answers all that comes."""
    go_on = asyncio.Event()
    async with serving(Connection.good, path=path, queue=0, accepting=go_on) as url:
        family = socket.AF_INET if path is None else socket.AF_UNIX
        with socket.socket(family) as filling:
            filling.connect(
                ("127.0.0.1", int(url.split(":")[2][:-1])) if path is None else str(path)
            )
            try:
                yield url, go_on
            finally:
                go_on.set()


async def test_a_connection_that_is_not_made_in_time_costs_no_attempt() -> None:
    """The app hangs and its queue of connections is full: what would connect gets no word."""
    async with with_a_full_queue() as (url, go_on), running() as sidecar:
        settings = {"url": url, "timeout_seconds": 0.3, "max_concurrency": 1}
        push(sidecar, url, push=settings, retry={"max_attempts": 1})
        await sidecar.publish("orders.new", event("1"))
        await until(lambda: sidecar.heard.pushes.total() >= 2)
        so_far = dict(sidecar.heard.pushes)
        go_on.set()
        await until(lambda: sidecar.heard.results["ack"] == 1)

    assert so_far == {"unreachable": 2}
    assert sidecar.heard.results == {"released": 2, "ack": 1}


async def test_a_full_queue_of_a_unix_socket_costs_nothing_and_is_waited_for(
    tmp_path: Path, anyio_backend: tuple[str, dict[str, bool]]
) -> None:
    """As TCP waits by itself: an app that is busy is not down."""
    async with with_a_full_queue(tmp_path / "app.sock") as (url, go_on), running() as sidecar:
        pusher = push(
            sidecar, url, push={"url": url, "max_concurrency": 1}, retry={"max_attempts": 1}
        )
        await sidecar.publish("orders.new", event("1"))
        await until(lambda: pusher.requests == 1)
        # Long enough for several tries; that there was none that failed is what is looked at.
        await asyncio.sleep(5 * client.FULL_SECONDS)
        go_on.set()
        await until(lambda: sidecar.heard.results["ack"] == 1)

    assert sidecar.heard.dead == []
    assert set(sidecar.heard.pushes) <= {"ack", "unreachable"}
    if anyio_backend[1]["use_uvloop"]:  # asyncio's own loop takes it for connected
        assert sidecar.heard.pushes == {"ack": 1}


async def test_what_never_became_a_connection_is_not_kept() -> None:
    """An app may be down for days, and is probed every few seconds."""
    async with serving(Connection.some) as ending:
        refused = client.Client("", "http://127.0.0.1:1/", connect_seconds=1)
        missing = client.Client("/no/such.sock", "http://app/", connect_seconds=1)
        ending_tls = client.Client("", ending.replace("http:", "https:"), connect_seconds=1)
        problems = [await one.probe() for one in (refused, missing, ending_tls) for _ in range(3)]
        kept = [one.connections for one in (refused, missing, ending_tls)]

    assert all(problems)
    assert kept == [0, 0, 0]


async def test_why_an_address_or_a_certificate_does_not_do_is_told() -> None:
    async def serve(connection: Connection) -> None:
        await connection.say(b"HTTP/1.1 400 this is no TLS\r\n\r\n")

    said = []
    async with serving(serve) as plain:
        for url in ("http://nosuch.invalid/", plain.replace("http:", "https:")):
            async with running() as sidecar:
                pusher = push(sidecar, url)
                await sidecar.publish("orders.new", event("1"))
                await until(lambda pusher=pusher: pusher.circuit.state is State.OPEN)  # type: ignore[misc]
                said.append(pusher.circuit.detail)

    assert "name" in said[0].lower()
    assert "SSL" in said[1]


# -- odd answers

LONG = b"x" * 1_000_000


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\nall of it",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nnot all",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n" + LONG,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    ],
    ids=["until the end", "cut off", "long", "chunked", "after 100", "after 103"],
)
async def test_the_status_counts_whatever_becomes_of_the_body(answer: bytes) -> None:
    async def serve(connection: Connection) -> None:
        await connection.request()
        await connection.say(answer)

    async with serving(serve) as url, running() as sidecar:
        push(sidecar, url)
        await sidecar.publish("orders.new", event("1"))
        await until(lambda: sidecar.heard.pushes.total() == 1)

    assert sidecar.heard.pushes == {"ack": 1}


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\nx: " + LONG, b"HTTP/1.1 200 OK\r\nx"],
    ids=["another protocol", "a head without end", "half a head"],
)
async def test_what_is_no_answer_counts_as_a_crash(answer: bytes) -> None:
    """It is the app's, and bounded: an event that makes it answer so is a dead letter in the end."""

    async def serve(connection: Connection) -> None:
        await connection.request()
        await connection.say(answer)

    async with serving(serve) as url, running() as sidecar:
        push(sidecar, url, retry={"max_attempts": 9, **AT_ONCE})
        await sidecar.publish("orders.new", event("1"))
        await until(lambda: bool(sidecar.heard.dead))

    assert [fact.reason for fact in sidecar.heard.dead] == ["app_crash"]
    assert sidecar.heard.pushes == {"broken": 3}


# -- while it is tried whether the app is back


async def test_that_an_app_is_still_down_behind_its_proxy_costs_no_attempt() -> None:
    """A proxy takes connections, and answers 503 for it: only until the circuit opens that counts."""
    refused = 0

    async def answer(_got: Got) -> Answer:
        nonlocal refused
        refused += 1
        return Answer(503 if refused <= FAILURES + 3 else 204)

    async with HttpApp(answer) as app, running() as sidecar:
        await sidecar.publish("orders.new", *map(event, numbers(0, FAILURES)))
        pause = {"initial_seconds": 1, "max_seconds": 1, "jitter": 0}
        pusher = push(sidecar, app.url, retry={"max_attempts": 2, **pause})
        await until(lambda: pusher.circuit.state is State.OPEN)
        await until(lambda: sidecar.heard.results["ack"] == FAILURES, seconds=20)

    assert sidecar.heard.dead == []
    assert sidecar.heard.results == {"nack": FAILURES + 3, "ack": FAILURES}
    assert Counter(got.attempt for got in app.got) == {1: FAILURES, 2: FAILURES + 3}


async def test_an_app_that_returns_is_tried_with_one_event_also_where_it_gets_batches() -> None:
    app = HttpApp()
    app.reserve()
    async with running() as sidecar:
        await sidecar.publish("orders.new", *map(event, numbers(0, 50)))
        pusher = push(sidecar, app.url, push={"url": app.url, "max_batch_events": 50})
        await until(lambda: pusher.circuit.state is State.OPEN)
        await app.start()
        await until(lambda: sidecar.heard.results["ack"] == 50)
        await app.stop()

    sizes = [got.body.count(b'"specversion"') for got in app.got]
    assert sizes[0] == 1
    assert sum(sizes) == 50


# -- what goes along


@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_a_publisher_cannot_choose_the_headers_of_the_request(mode: str) -> None:
    """An app may trust who it is told the request is from; and what a sidecar added goes along."""
    beside = {
        "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        "baggage": "a=b",
        "sidecar-dead-letter-reason": "rejected",
        "sidecar-attempt": "7",
        "authorization": "Bearer stolen",
        "cookie": "session=1",
        "x-forwarded-for": "10.0.0.1",
    }
    async with HttpApp() as app, running() as sidecar:
        settings = {"url": app.url, "content_mode": mode, "headers": {"authorization": "Bearer t"}}
        push(sidecar, app.url, push=settings)
        await sidecar.publish("orders.new", event("1", headers=beside))
        (got,) = await app.take(1)

    assert got.headers["authorization"] == "Bearer t"
    assert got.headers["sidecar-attempt"] == "1"
    assert got.headers.keys() & beside.keys() == {
        *("traceparent", "baggage", "authorization"),
        *("sidecar-dead-letter-reason", "sidecar-attempt"),
    }
