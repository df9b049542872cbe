"""The embedded server: it answers, it comes back, it keeps its data, and it never outlives us."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats
import psutil
import pytest

from sidecar.config import MIB, Embedded
from sidecar.embedded import EmbeddedServer, find_binary
from sidecar.errors import EmbeddedServerFailed
from tests.support.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from nats.aio.client import Client

DEADLINE_SECONDS = 10

ANOTHER_SIDECAR = """
import asyncio, sys, uvloop
from sidecar.config import Embedded
from sidecar.embedded import EmbeddedServer

async def main():
    server = EmbeddedServer(
        Embedded(data_dir=sys.argv[1]), max_payload_bytes=1024, on_log=lambda level, line: None
    )
    await server.start()
    print(server.pid, flush=True)
    await server.supervise()

new_loop = uvloop.new_event_loop if sys.argv[2] == "uvloop" else asyncio.new_event_loop
with asyncio.Runner(loop_factory=new_loop) as runner:
    runner.run(main())
"""


ends_with_its_parent = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the next start ends it"
)


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class Log:
    """What the server and its supervision said, and a way to wait for more of it."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, level: str, line: str) -> None:
        self.lines.append((level, line))

    def has(self, level: str, part: str) -> bool:
        return any(found == level and part in line for found, line in self.lines)


def server_in(directory: Path, log: Log | None = None, **settings: Any) -> EmbeddedServer:
    return EmbeddedServer(
        Embedded(data_dir=str(directory), **settings),
        max_payload_bytes=2 * MIB,
        on_log=log or Log(),
    )


@asynccontextmanager
async def supervised(server: EmbeddedServer) -> AsyncIterator[EmbeddedServer]:
    await server.start()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(server.supervise())
            try:
                yield server
            finally:
                await server.stop()
    finally:
        await server.stop()


@asynccontextmanager
async def connected(url: str, token: str | None = None) -> AsyncIterator[Client]:
    async def ignore(error: Exception) -> None:
        """Reconnecting is what some of these tests are about; nats-py would print it."""

    client = await nats.connect(
        url,
        token=token,
        connect_timeout=2,
        reconnect_time_wait=0.02,
        max_reconnect_attempts=-1,
        error_cb=ignore,
    )
    try:
        yield client
    finally:
        await client.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


async def kill(sidecar: asyncio.subprocess.Process) -> None:
    sidecar.kill()
    await sidecar.communicate()  # To the end of its output too: only then is its transport closed.


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def left_behind(home: Path) -> subprocess.Popen[bytes]:
    """A server that runs on what an embedded one left in *home*, and that nobody looks after."""
    server = subprocess.Popen(
        [find_binary(""), "-c", home / "server.conf"], stderr=subprocess.DEVNULL
    )
    (home / "server.pid").write_text(str(server.pid))
    return server


def children_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def gone(pid: int) -> bool:
    """True also for a process that has ended and that nobody has waited for."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


async def answer_to(url: str, shown: dict[str, str]) -> bytes:
    """What a bare CONNECT with *shown* is answered."""
    host, _, port = url.removeprefix("nats://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await reader.readline()  # INFO
        connect = {"verbose": True, "pedantic": False, **shown}
        writer.write(b"CONNECT " + json.dumps(connect).encode() + b"\r\n")
        answer = await reader.readline()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


async def publish(client: Client, *bodies: bytes) -> list[int]:
    stream = client.jetstream()
    return [(await stream.publish("orders.created", body)).seq for body in bodies]


async def stored(client: Client) -> list[bytes]:
    stream = client.jetstream()
    state = (await stream.stream_info("orders")).state
    return [
        (await stream.get_msg("orders", seq)).data or b""
        for seq in range(state.first_seq, state.last_seq + 1)
    ]


async def another_sidecar(directory: Path) -> tuple[asyncio.subprocess.Process, int]:
    """A process that holds *directory*, on the same kind of loop, and the pid of its nats-server."""
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    sidecar = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ANOTHER_SIDECAR, str(directory), loop),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert sidecar.stdout is not None
    return sidecar, int(await sidecar.stdout.readline())


async def test_the_server_answers_whoever_has_the_token(tmp_path: Path) -> None:
    async with (
        supervised(server_in(tmp_path)) as server,
        connected(server.url, server.token) as client,
    ):
        info = client._server_info

        assert info["host"] == "127.0.0.1"
        assert info["port"] == int(server.url.rpartition(":")[2])
        assert info["jetstream"] is True
        assert info["max_payload"] == 2 * MIB


@pytest.mark.parametrize("shown", [{}, {"auth_token": ""}, {"auth_token": "wrong"}])
async def test_whoever_has_not_the_token_is_refused(tmp_path: Path, shown: dict[str, str]) -> None:
    """Other users of the machine reach the loopback port too."""
    async with supervised(server_in(tmp_path)) as server:
        assert await answer_to(server.url, shown) == b"-ERR 'Authorization Violation'\r\n"


async def test_the_token_is_in_no_file_that_others_can_read(tmp_path: Path) -> None:
    """Files are 0600 in a directory that is 0700, and the token is not on the command line."""
    async with supervised(server_in(tmp_path / "data")) as server:
        home = tmp_path / "data" / "nats"
        assert server.pid is not None
        arguments = psutil.Process(server.pid).cmdline()
        modes = {name: mode_of(home / name) for name in ("server.conf", "server.pid", "lock")}

        assert modes == {"server.conf": 0o600, "server.pid": 0o600, "lock": 0o600}
        assert mode_of(home) == 0o700
        assert mode_of(home.parent) == 0o700
        assert server.token in (home / "server.conf").read_text()
        assert not any(server.token in argument for argument in arguments)


async def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    """It may be a mounted volume, or shared; only what is ours is made private."""
    directory = tmp_path / "volume"
    directory.mkdir(mode=0o755)
    async with supervised(server_in(directory)):
        assert mode_of(directory) == 0o755
        assert mode_of(directory / "nats") == 0o700


async def test_a_path_of_any_characters_does_as_data_directory(tmp_path: Path) -> None:
    directory = tmp_path / 'a "b" $c \\d é'
    async with (
        supervised(server_in(directory)) as server,
        connected(server.url, server.token) as client,
    ):
        await client.jetstream().add_stream(name="orders", subjects=["orders.>"])

        assert await publish(client, b"one") == [1]
        assert (directory / "nats" / "jetstream").is_dir()


async def test_a_data_directory_in_use_is_refused_by_name(tmp_path: Path) -> None:
    """The message says which directory, who has it and what to do."""
    sidecar, _ = await another_sidecar(tmp_path)
    try:
        with pytest.raises(EmbeddedServerFailed) as refused:
            await server_in(tmp_path).start()

        assert str(tmp_path) in refused.value.message
        assert f"process {sidecar.pid}" in refused.value.message
        assert "embedded.data_dir" in refused.value.message
    finally:
        await kill(sidecar)


async def test_a_data_directory_is_free_again_after_a_stop(tmp_path: Path) -> None:
    first = server_in(tmp_path)
    await first.start()
    await first.stop()
    async with supervised(server_in(tmp_path)) as second:
        assert second.alive
        assert not first.alive


async def test_a_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedServerFailed, match=r"embedded\.data_dir") as refused:
        await server_in(tmp_path / "file" / "data").start()

    assert str(tmp_path / "file") in refused.value.message


async def test_a_killed_server_is_back_on_its_port_with_its_data(tmp_path: Path) -> None:
    """A client just reconnects: same port, same token, every acknowledged event."""
    log = Log()
    async with (
        supervised(server_in(tmp_path, log)) as server,
        connected(server.url, server.token) as client,
    ):
        url, pid = server.url, server.pid
        assert pid is not None
        await client.jetstream().add_stream(name="orders", subjects=["orders.>"])
        await publish(client, b"one", b"two")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: server.restarts == 1)
        await until(lambda: client.is_connected and client.stats["reconnects"] == 1)
        sequences = await publish(client, b"three")

        assert sequences == [3]
        assert await stored(client) == [b"one", b"two", b"three"]
        assert server.url == url
        assert server.pid not in {None, pid}
        assert log.has("error", "nats-server ended (SIGKILL): starting it again")
        assert log.has("info", "nats-server is back on port")


async def test_a_taken_port_is_waited_for(tmp_path: Path) -> None:
    """Clients know no other port: a new one would leave them outside for ever."""
    log = Log()
    async with supervised(server_in(tmp_path, log)) as server:
        url, pid = server.url, server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        taker = await taken(int(url.rpartition(":")[2]))
        await until(lambda: log.has("error", "address already in use"))
        taker.close()
        await taker.wait_closed()
        await until(lambda: server.restarts == 1)

        assert server.url == url
        assert server.alive


async def taken(port: int) -> asyncio.Server:
    """A listener of ours on *port*, as soon as it is free."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            with contextlib.suppress(OSError):
                return await asyncio.start_server(lambda _, w: w.close(), "127.0.0.1", port)
            await asyncio.sleep(0)


async def test_events_survive_a_stop_and_a_start(tmp_path: Path) -> None:
    async with supervised(server_in(tmp_path)) as server:
        async with connected(server.url, server.token) as client:
            await client.jetstream().add_stream(name="orders", subjects=["orders.>"])
            await publish(client, b"one", b"two")
        first_token = server.token
    async with (
        supervised(server_in(tmp_path)) as server,
        connected(server.url, server.token) as client,
    ):
        assert await stored(client) == [b"one", b"two"]
        assert server.token != first_token


async def test_a_stop_leaves_no_process(tmp_path: Path) -> None:
    """Neither the server nor its guard."""
    server = server_in(tmp_path)
    await server.start()
    pid = server.pid
    assert pid is not None
    processes = [pid, *children_of(pid)]
    await server.stop()
    await until(lambda: all(map(gone, processes)))

    assert not server.alive
    assert server.pid is None
    assert len(processes) == (2 if sys.platform == "linux" else 1)


async def test_a_stop_does_not_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await server.stop()

    assert not server.alive


async def test_a_stop_in_the_middle_of_a_restart_leaves_no_process(tmp_path: Path) -> None:
    """The child that is just being made counts as well."""
    server = server_in(tmp_path)
    await server.start()
    async with asyncio.TaskGroup() as group:
        group.create_task(server.supervise())
        for _ in range(3):
            pid = server.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: server.pid not in {None, pid})  # type: ignore[misc]
        await server.stop()
    config = str(tmp_path / "nats" / "server.conf")
    await until(lambda: not any(config in p.cmdline() for p in psutil.Process().children(True)))  # noqa: FBT003

    assert not server.alive


@ends_with_its_parent
async def test_the_server_is_gone_when_the_sidecar_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, of which the sidecar cannot tell anybody."""
    sidecar, pid = await another_sidecar(tmp_path)
    processes = [pid, *children_of(pid)]
    await kill(sidecar)
    await until(lambda: all(map(gone, processes)))

    assert len(processes) == 2


@ends_with_its_parent
@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"], indirect=True)
async def test_a_server_that_hangs_is_gone_too_when_the_sidecar_is_killed(tmp_path: Path) -> None:
    """One that heeds nothing but SIGKILL; it takes 5 s, so it is shown on one loop only."""
    sidecar, pid = await another_sidecar(tmp_path)
    processes = [pid, *children_of(pid)]
    os.kill(pid, signal.SIGSTOP)
    await kill(sidecar)
    await until(lambda: all(map(gone, processes)))

    assert len(processes) == 2


async def test_a_server_left_by_a_dead_sidecar_is_ended(tmp_path: Path) -> None:
    """Where the kernel does not end children with their parent, the next start does."""
    log = Log()
    first = server_in(tmp_path)
    await first.start()
    await first.stop()
    left = left_behind(tmp_path / "nats")
    async with supervised(server_in(tmp_path, log)) as server:
        code = left.wait(DEADLINE_SECONDS)

        assert code in {0, 1, -signal.SIGTERM}  # It may not have come to its signal handler.
        assert server.alive
        assert log.has("warning", f"ending nats-server {left.pid}")


async def test_a_stranger_with_the_old_process_id_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    with NatsServer() as stranger:
        (tmp_path / "nats" / "server.pid").write_text(str(stranger.pid))
        async with supervised(server_in(tmp_path)):
            assert stranger.alive


async def test_a_missing_binary_is_named_with_its_setting(tmp_path: Path) -> None:
    binary = str(tmp_path / "nats-server")
    with pytest.raises(EmbeddedServerFailed, match=r"embedded\.binary") as refused:
        await server_in(tmp_path, binary=binary).start()

    assert binary in refused.value.message


async def test_a_binary_that_does_not_run_says_why_and_frees_the_directory(tmp_path: Path) -> None:
    binary = tmp_path / "nats-server"
    binary.write_bytes(b"\x7fELF but not really")
    binary.chmod(0o755)
    with pytest.raises(EmbeddedServerFailed, match=r"(?i)exec format error"):
        await server_in(tmp_path, binary=str(binary)).start()
    async with supervised(server_in(tmp_path)) as server:
        assert server.alive


async def test_a_binary_that_never_listens_is_given_up_and_ended(tmp_path: Path) -> None:
    """Its children too: it might be a script around the real one."""
    binary = tmp_path / "nats-server"
    binary.write_text(
        f"#!/bin/sh\nsleep 600 &\necho $$ $! > {tmp_path}/pids.new\n"
        f"mv {tmp_path}/pids.new {tmp_path}/pids\nwait\n"
    )
    binary.chmod(0o755)
    with pytest.raises(EmbeddedServerFailed, match=r"embedded\.start_timeout_seconds"):
        await server_in(tmp_path, binary=str(binary), start_timeout_seconds=1).start()
    processes = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    await until(lambda: all(map(gone, processes)))

    assert len(processes) == 2


async def test_the_servers_log_lines_come_with_their_level(tmp_path: Path) -> None:
    log = Log()
    async with supervised(server_in(tmp_path, log)) as server:
        await answer_to(server.url, {"auth_token": "wrong"})
        await until(lambda: log.has("error", "authentication error"))

        assert log.has("info", "Server is ready")
        assert not any(line.startswith("[") for _, line in log.lines)


async def test_a_test_server_comes_back_with_its_data_on_its_port() -> None:
    """What tests of drivers lean on."""
    with NatsServer(user="app", password="secret") as server:  # noqa: S106 - of this server only
        url = server.url.replace("//", "//app:secret@")
        async with connected(url) as client:
            await client.jetstream().add_stream(name="orders", subjects=["orders.>"])
            await publish(client, b"one")
            server.restart()
            server.kill()
            server.start()
            server.pause()
            server.resume()
            await until(lambda: client.is_connected and client.stats["reconnects"] > 0)

            assert await stored(client) == [b"one"]
            assert url.endswith(server.url.removeprefix("nats://"))
    assert not server.alive
    assert not server.directory.exists()
