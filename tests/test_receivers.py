"""Apps on the CloudEvents SDKs of Go, Node and Python, which know no sidecar, get its events by push."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

from sidecar.client import Event, Receipt, Sidecar, new_event
from tests.support.clients import BUILD_SECONDS, Language, build, environment
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.clients import Program

SECONDS = 30.0
COUNT = 100
FAILED = "7"
ATTEMPT = "sidecar-attempt"
PLACE = "Malm\u00f6 \u4e2d\u6587 100%"

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 60)

GO = Language("receivers/go", "Go, pushed to", ("go",), ("bin/receiver",))
NODE = Language(
    "receivers/node", "Node, pushed to", ("node", "npm"), ("node_modules/.package-lock.json",)
)
PYTHON = Language("receivers/python", "Python, pushed to", ("python3",), (".venv/bin/python",))

CONFIG = """
[brokers.memory]
type = "memory"

[[subscriptions]]
name = "pushed"
topic = "orders.>"
retry = {{ initial_seconds = 0.05, max_seconds = 0.05 }}
push = {{ url = "{url}", content_mode = "{mode}", max_batch_events = {batch} }}
"""


@pytest.fixture(scope="session", params=[GO, NODE, PYTHON], ids=["go", "node", "python"])
def program(request: pytest.FixtureRequest) -> Program:
    return build(request.param)


@pytest.fixture(scope="session", params=[GO, NODE], ids=["go", "node"])
def able_program(request: pytest.FixtureRequest) -> Program:
    """One that takes batches, and listens on Unix sockets."""
    return build(request.param)


@dataclass
class Receiver:
    """What a running program prints: a line for each event it got."""

    _lines: asyncio.StreamReader

    async def line(self) -> dict[str, Any]:
        async with asyncio.timeout(SECONDS):
            line = await self._lines.readline()
        assert line, "the program ended"
        found: dict[str, Any] = json.loads(line)
        return found

    async def until_all(self, count: int) -> list[dict[str, Any]]:
        """What it got until so many events went well, and one had failed before."""
        got: list[dict[str, Any]] = []
        well: set[str] = set()
        failed = False
        while len(well) < count or not failed:
            got.append(one := await self.line())
            failed = failed or one["failed"]
            if not one["failed"]:
                well.add(one["id"])
        return got


@asynccontextmanager
async def running(
    program: Program, mode: str, *, batch: int = 1, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[Receiver, SidecarProcess]]:
    """The program, and a sidecar that pushes to it."""
    options = ["--batches"] if batch > 1 else []
    app = await asyncio.create_subprocess_exec(
        *program.command,
        *("--listen", listen, "--fail", FAILED, *options),
        cwd=program.folder,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        limit=2**20,
    )
    assert app.stdout is not None
    receiver = Receiver(app.stdout)
    try:
        place = (await receiver.line())["listening"]
        url = f"unix://{place}:/events" if listen.startswith("unix:") else f"http://{place}/events"
        sidecar = SidecarProcess(CONFIG.format(url=url, mode=mode, batch=batch))
        await asyncio.to_thread(sidecar.start)
        try:
            yield receiver, sidecar
        finally:
            await asyncio.to_thread(sidecar.close)
    finally:
        app.kill()
        await app.wait()


DATA: tuple[tuple[str, bytes], ...] = (
    ("application/json", '{"order":1,"name":"\u00e4"}'.encode()),
    ("text/plain", "two\nlines \u00e4".encode()),
    ("application/octet-stream", bytes(range(256))),
)


def made(number: int) -> Event:
    content_type, data = DATA[number % len(DATA)]
    return new_event(
        "order.created",
        data,
        id=str(number),
        source="/shop",
        key=f"customer-{number % 10}",
        subject=f"order/{number}",
        content_type=content_type,
        time_ns=1_767_225_600_123_000_000 + number * 1_000_000,
        extensions={"place": PLACE, "comexampleother": "plain"},
    )


async def publish(sidecar: SidecarProcess, *events: Event) -> None:
    async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
        for answer in await client.publish("orders.created", events):
            assert isinstance(answer, Receipt), answer


def check(got: dict[str, Any], *, percent: bool) -> None:
    """
    Every attribute as it was published.

    *percent*: in binary mode the SDKs of Go and Node do not undo the percent-encoding that the HTTP
    binding asks for in headers (3.1.3.2): their apps see it in what is not ASCII.
    """
    event = made(int(got["id"]))
    assert (got["source"], got["type"], got["subject"]) == (event.source, event.type, event.subject)
    assert datetime.fromisoformat(got["time"]).timestamp() * 1000 == event.time_ns // 1_000_000
    assert got["datacontenttype"] == event.content_type
    assert base64.b64decode(got["data"]) == event.data
    extensions = dict(got["extensions"])
    if percent:
        assert extensions["place"].isascii()
        extensions["place"] = unquote(extensions["place"])
    assert extensions == {"partitionkey": event.key, **event.extensions}


@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_each_event_comes_whole_and_once_and_the_failed_one_again(
    program: Program, mode: str
) -> None:
    async with running(program, mode) as (receiver, sidecar):
        await publish(sidecar, *(made(number) for number in range(COUNT)))
        got = await receiver.until_all(COUNT)

    for one in got:
        check(one, percent=mode == "binary" and program.folder.name != "python")
    ids = [one["id"] for one in got]
    assert Counter(ids) == Counter(map(str, range(COUNT))) + Counter([FAILED])
    assert [one["headers"][ATTEMPT] for one in got if one["id"] == FAILED] == ["1", "2"]
    for key in range(10):
        of_key = list(dict.fromkeys(int(i) for i in ids if int(i) % 10 == key))
        assert of_key == list(range(key, COUNT, 10))


async def test_batches_come_whole_and_the_failed_one_again(able_program: Program) -> None:
    """A batch is answered as a whole: all that came with the failed event come a second time."""
    async with running(able_program, "structured", batch=20) as (receiver, sidecar):
        await publish(sidecar, *(made(number) for number in range(COUNT)))
        got = await receiver.until_all(COUNT)

    for one in got:
        check(one, percent=False)
        assert one["headers"]["content-type"].startswith("application/cloudevents-batch+json")
    assert {one["id"] for one in got} == {str(number) for number in range(COUNT)}
    assert sorted(one["failed"] for one in got if one["id"] == FAILED) == [False, True]


async def test_an_app_on_a_unix_socket_is_pushed_to(able_program: Program, tmp_path: Path) -> None:
    place = f"unix:{tmp_path / 'app.sock'}"
    async with running(able_program, "binary", listen=place) as (receiver, sidecar):
        await publish(sidecar, made(1))
        got = await receiver.line()

    check(got, percent=True)
    assert (got["id"], got["failed"]) == ("1", False)
