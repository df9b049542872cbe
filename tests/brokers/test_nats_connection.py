"""The NATS connection: what it leans on in nats-py, its parser, and what the server says."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.protocol.parser import Parser

from sidecar.brokers.nats.connection import Connection, FrameParser
from sidecar.config import Nats
from sidecar.errors import BrokerUnavailable
from tests.support.nats_server import NatsServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from sidecar.broker import BrokerState

Frame = tuple[object, ...]


# -- nats-py


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_process_msg", ["sid", "subject", "reply", "data", "headers"]),
        ("_process_info", ["info", "initial_connection"]),
        ("_process_err", ["err_msg"]),
        ("_process_ping", []),
        ("_process_pong", []),
    ],
)
def test_the_parser_calls_methods_that_nats_py_has(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(Client(), method)).parameters) == parameters


async def test_nats_py_has_what_the_connection_reaches_into(nats_server: NatsServer) -> None:
    """
    The parser that is replaced, the number of the next subscription, the socket, the list of
    PONGs to come, and the queue of what nats-py has not written yet.
    """
    client = Client()
    parser = client._ps
    await client.connect(nats_server.url)
    first = client._sid + 1
    subscribing = client.subscribe("a")
    subscription = await subscribing
    queued = list(client._pending)
    pong = asyncio.get_running_loop().create_future()
    client._pongs.append(pong)
    client._transport.write(b"PING\r\n")
    async with asyncio.timeout(5):
        answered = await pong

    assert isinstance(parser, Parser)
    assert parser.nc is client
    assert subscription._id == client._sid == first
    assert queued == [b"SUB a  %d\r\n" % first]
    assert client._pending_data_size == 0
    assert client._transport._io_writer.transport is not None
    assert answered is True
    await client.close()


async def test_subscribing_takes_its_number_before_it_waits(nats_server: NatsServer) -> None:
    """So that a handler can be in place before the first frame."""
    client = Client()
    await client.connect(nats_server.url)
    before = client._sid
    coroutine = client.subscribe("a")
    await coroutine

    assert client._sid == before + 1
    await client.close()


# -- the parser


class Recorder:
    """Stands where nats-py's client does: notes what a parser hands over."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.on_error: Callable[[], None] = lambda: None

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, *rest: object) -> None:
        data, headers = rest
        self.frames.append(("msg", sid, subject, reply, headers, data))

    async def _process_ping(self) -> None:
        self.frames.append(("ping",))

    async def _process_pong(self) -> None:
        self.frames.append(("pong",))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.frames.append(("info", info["n"]))

    async def _process_err(self, text: str) -> None:
        self.frames.append(("err", text))
        self.on_error()

    def handler(self, sid: int) -> Callable[..., None]:
        def handle(subject: bytes, reply: bytes, headers: bytes | None, data: bytes) -> None:
            self.frames.append(("msg", sid, subject, reply, headers, data))

        return handle


def finish(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what does not wait for anything."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def ours(recorder: Recorder, raw: Sequence[int] = (1, 2)) -> FrameParser:
    """Subscriptions *raw* have handlers; nats-py's client gets the others."""
    return FrameParser(recorder, {str(sid).encode(): recorder.handler(sid) for sid in raw})


token = st.sampled_from([b"a", b"orders.created", b"_INBOX.x.1", b"$JS.ACK.s.c.1.2.3.4.5"])
sids = st.integers(1, 4)
payloads = st.binary(max_size=40) | st.sampled_from(
    [b"\r\n", b"MSG a 1 3\r\nabc\r\n", b"PING\r\n", b"\r", b"+OK\r\n-ERR 'x'\r\n"]
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    words = [draw(token), b"%d" % draw(sids)]
    if draw(st.booleans()):
        words.append(draw(token))
    data = draw(payloads)
    if draw(st.booleans()):
        headers = b"NATS/1.0" + draw(
            st.sampled_from([b"\r\n\r\n", b" 503\r\n\r\n", b"\r\na: b\r\n\r\n"])
        )
        return b"HMSG %b %d %d\r\n%b%b\r\n" % (
            b" ".join(words),
            len(headers),
            len(headers) + len(data),
            headers,
            data,
        )
    return b"MSG %b %d\r\n%b\r\n" % (b" ".join(words), len(data), data)


frames = messages() | st.sampled_from(
    [b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b'INFO {"n": 1}\r\n', b"-ERR 'Slow Consumer'\r\n"]
)


@given(st.lists(frames, min_size=1, max_size=8), st.lists(st.integers(0, 400), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_frames(stream: list[bytes], cuts: list[int]) -> None:
    """What nats-py's parser makes of them in one piece, ours makes of them in any pieces."""
    theirs, mine = Recorder(), Recorder()
    data = b"".join(stream)
    finish(Parser(theirs).parse(data))
    parser = ours(mine)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for start, end in itertools.pairwise(edges):
        finish(parser.parse(data[start:end]))

    assert mine.frames == theirs.frames
    assert len(mine.frames) == len(stream) - stream.count(b"+OK\r\n")


def test_a_large_payload_in_many_reads_is_joined_once() -> None:
    """Joined at each read, 64 MiB would be copied 1,000 times over, which takes half a minute."""
    recorder = Recorder()
    parser = ours(recorder)
    payload = bytes(range(256)) * (64 * 4096)
    stream = b"MSG a 1 %d\r\n%b\r\nMSG b 1 1\r\nx\r\n" % (len(payload), payload)
    for start in range(0, len(stream), 32768):
        finish(parser.parse(stream[start : start + 32768]))
    data = [frame[-1] for frame in recorder.frames]

    assert [len(one) for one in data if isinstance(one, bytes)] == [len(payload), 1]
    assert data[0] == payload


def test_what_is_left_when_an_error_ends_the_connection_is_forgotten() -> None:
    """nats-py resets its parser then; the next bytes are of another connection."""
    recorder = Recorder()
    parser = ours(recorder)
    recorder.on_error = parser.reset
    finish(parser.parse(b"-ERR 'Stale Connection'\r\nMSG a 1 10\r\nhalf"))
    finish(parser.parse(b"MSG b 1 1\r\nx\r\n"))

    assert recorder.frames == [
        ("err", "'stale connection'"),
        ("msg", 1, b"b", b"", None, b"x"),
    ]


def test_a_reset_forgets_half_a_frame() -> None:
    recorder = Recorder()
    parser = ours(recorder)
    finish(parser.parse(b"MSG a 1 10\r\nhalf"))
    parser.reset()
    finish(parser.parse(b"PING\r\n"))

    assert recorder.frames == [("ping",)]


# -- a server that we write ourselves


class Script:
    """The server's side of one NATS connection after another, line by line."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        self.connections = asyncio.Queue()
        self.url = ""

    async def accept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The next client, greeted."""
        async with asyncio.timeout(5):
            reader, writer = await self.connections.get()
            writer.write(b'INFO {"max_payload": 1048576, "headers": true}\r\n')
            await expect(reader, b"CONNECT")
            await expect(reader, b"PING")
            writer.write(b"PONG\r\n")
            return reader, writer


async def expect(reader: asyncio.StreamReader, start: bytes) -> bytes:
    """The next line that begins so; others are passed over."""
    async with asyncio.timeout(5):
        while not (line := await reader.readline()).startswith(start):
            assert line, f"the client left before it sent {start!r}"
    return line


@asynccontextmanager
async def scripted() -> AsyncIterator[Script]:
    script = Script()
    writers = []

    def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        script.connections.put_nowait((reader, writer))

    server = await asyncio.start_server(arrived, "127.0.0.1", 0)
    script.url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
        for writer in writers:
            writer.close()


@asynccontextmanager
async def connected(script: Script) -> AsyncIterator[tuple[Connection, Any, Any]]:
    """A connection of ours, and the server's reader and writer."""
    connection = connection_to(script.url)
    async with asyncio.TaskGroup() as tasks:
        accepting = tasks.create_task(script.accept())
        await connection.connect()
    reader, writer = accepting.result()
    try:
        yield connection, reader, writer
    finally:
        await connection.close()


def connection_to(url: str) -> Connection:
    settings = Nats(type="nats", servers=[url], reconnect_seconds=0.05, connect_timeout_seconds=1)
    return Connection(settings, client_name="test")


async def test_a_ping_is_answered() -> None:
    async with scripted() as script, connected(script) as (_, reader, writer):
        writer.write(b"PI")
        writer.write(b"NG\r\n")

        assert await expect(reader, b"PONG") == b"PONG\r\n"


async def test_a_stale_connection_is_left_for_a_new_one() -> None:
    """With the subscriptions it had, and before anything that waits is written."""
    states: list[BrokerState] = []
    heard: list[bytes] = []
    async with scripted() as script, connected(script) as (connection, reader, writer):
        connection.on_state = states.append
        connection.on_live.append(lambda: heard.append(b"live"))
        await connection.subscribe("a", lambda _s, _r, _h, data: heard.append(data))
        line = await expect(reader, b"SUB a")
        writer.write(b"-ERR 'Stale Connection'\r\nMSG a ")
        anew, there = await script.accept()
        again = await expect(anew, b"SUB a")
        await expect(anew, b"PING")
        there.write(b"PONG\r\n")
        await until(lambda: len(states) == 2)
        there.write(b"MSG a %b 1\r\nx\r\n" % again.split()[-1])
        await until(lambda: len(heard) == 2)

    assert line.split()[-1] == again.split()[-1]
    assert heard == [b"live", b"x"]
    assert [state.connected for state in states][:2] == [False, True]


async def test_a_refusal_in_the_middle_ends_it() -> None:
    """Credentials that were taken back: nats-py gives up, and the owner is told to connect anew."""
    states: list[BrokerState] = []
    async with scripted() as script, connected(script) as (connection, _, writer):
        connection.on_state = states.append
        writer.write(b"-ERR 'Authorization Violation'\r\n")
        async with asyncio.timeout(5):
            await connection.ended()

        assert not connection.live
        assert not connection.write(b"PING\r\n")
        assert [state.connected for state in states] == [False]


async def test_a_permission_that_is_missing_leaves_the_connection_as_it_is() -> None:
    async with scripted() as script, connected(script) as (connection, reader, writer):
        writer.write(b"-ERR 'Permissions Violation for Subscription to \"x\"'\r\n")
        async with asyncio.TaskGroup() as tasks:
            flushing = tasks.create_task(connection.flushed(5))
            await expect(reader, b"PING")
            writer.write(b"PONG\r\n")

        assert flushing.result()
        assert connection.live


async def test_a_subscription_is_read_before_what_is_written_behind_it() -> None:
    """nats-py writes a turn later: a request would overtake the subscription to its answer."""
    async with scripted() as script, connected(script) as (connection, reader, _):
        await connection.subscribe("answers", lambda *_: None)
        connection.write(b"PUB question answers 0\r\n\r\n")
        lines: list[bytes] = []
        async with asyncio.timeout(5):
            while not lines or not lines[-1].startswith(b"PUB"):
                lines.append(await reader.readline())

        assert [line.split()[1] for line in lines][-2:] == [b"answers", b"question"]


async def test_what_comes_before_the_server_knows_of_an_unsubscribe_is_handed_over() -> None:
    heard: list[bytes] = []
    async with scripted() as script, connected(script) as (connection, reader, writer):
        key = await connection.subscribe("a", lambda _s, _r, _h, data: heard.append(data))
        sid = (await expect(reader, b"SUB a")).split()[-1]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connection.unsubscribe(key))
            await expect(reader, b"UNSUB")
            writer.write(b"MSG a %b 4\r\nlate\r\n" % sid)
            await expect(reader, b"PING")
            writer.write(b"PONG\r\n")
        writer.write(b"MSG a %b 8\r\ntoo late\r\n" % sid)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connection.flushed(5))
            await expect(reader, b"PING")
            writer.write(b"PONG\r\n")

    assert heard == [b"late"]


# -- questions


async def test_a_question_fails_at_once_when_the_connection_breaks() -> None:
    async with scripted() as script, connected(script) as (connection, reader, writer):

        async def ask() -> None:
            with pytest.raises(BrokerUnavailable, match="broke"):
                await connection.call("$JS.API.INFO", seconds=60)

        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            tasks.create_task(ask())
            await expect(reader, b"PUB $JS.API.INFO")
            writer.close()


async def test_a_question_that_is_not_answered_fails_in_its_time() -> None:
    async with scripted() as script, connected(script) as (connection, _, _):
        with pytest.raises(BrokerUnavailable, match="did not answer"):
            await connection.call("$JS.API.INFO", seconds=0.1)


async def test_a_question_that_nobody_hears_says_what_to_look_at() -> None:
    with NatsServer(jetstream=False) as server:
        connection = connection_to(server.url)
        await connection.connect()
        with pytest.raises(BrokerUnavailable, match="is it enabled on the server"):
            await connection.call("$JS.API.INFO")
        await connection.close()


async def test_many_questions_at_once_each_get_their_own_answer(nats_server: NatsServer) -> None:
    connection = connection_to(nats_server.url)
    await connection.connect()
    names = [f"s{number}" for number in range(50)]
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        asked = [
            tasks.create_task(
                connection.call(f"$JS.API.STREAM.CREATE.{name}", {"name": name, "subjects": [name]})
            )
            for name in names
        ]
    await connection.close()

    assert [task.result()["config"]["name"] for task in asked] == names
