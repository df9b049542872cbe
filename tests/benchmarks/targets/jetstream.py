"""JetStream on a real nats-server, and nats-py by itself."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import subprocess
from typing import TYPE_CHECKING, Any, ClassVar

import nats
import psutil
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from sidecar.embedded import find_binary
from tests.benchmarks import events
from tests.benchmarks.loads.latency import Clock, measured
from tests.benchmarks.meter import Meter, wait_until_idle
from tests.benchmarks.targets.target import EMBEDDED, Target
from tests.support.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.benchmarks.spec import Sample, Spec

STREAM = "BENCHMARKS"
FETCH = 256
"""Messages of one raw pull."""


class _Publisher:
    """The library's own pipelined publishing: `publish_async`, up to 4,000 under way."""

    def __init__(self, client: Any, topic: str, keys: int = events.KEYS) -> None:
        self._stream = client.jetstream()
        self._topic = topic
        self._ids = events.Ids(keys)

    async def publish(self, answered: Callable[[asyncio.Future[Any]], None]) -> None:
        number, key = self._ids.take(1)
        headers = events.nats_headers(f"{self._ids.prefix}-{number:010d}", f"{key:03d}")
        future = await self._stream.publish_async(self._topic, events.DATA, headers=headers)
        future.add_done_callback(answered)


async def _publish(spec: Spec) -> Sample:
    client = await nats.connect(spec.broker_url)
    meter = Meter(spec)
    publisher = _Publisher(client, spec.topic)

    def answered(future: asyncio.Future[Any]) -> None:
        if error := future.exception():
            meter.failed(1, repr(error))
        else:
            meter.events += 1

    async with asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(meter.sample())
        while not meter.stopping:
            await publisher.publish(answered)
    return sampling.result()


async def _fill(spec: Spec) -> Sample:
    """As many events as asked for."""
    client = await nats.connect(spec.broker_url)
    meter = Meter(spec)
    publisher = _Publisher(client, spec.topic, spec.keys)

    def answered(future: asyncio.Future[Any]) -> None:
        future.result()
        meter.events += 1
        if meter.events == spec.events:
            meter.run_out.set()

    for _ in range(spec.events):
        await publisher.publish(answered)
    return await meter.sample()


async def _consume(spec: Spec) -> Sample:
    """Pull in batches, ack each message."""
    client = await nats.connect(spec.broker_url)
    await wait_until_idle(psutil.Process(spec.broker_pid))
    meter = Meter(spec)
    first = asyncio.Event()
    # The same policies as the sidecar's consumers.
    config = ConsumerConfig(
        ack_policy=AckPolicy.EXPLICIT, ack_wait=30, max_ack_pending=-1, max_deliver=-1
    )
    pull = await client.jetstream().pull_subscribe(
        spec.topic, durable=spec.subscription, stream=STREAM, config=config
    )
    async with asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(meter.sample(first))
        while not meter.stopping and meter.events < spec.events:
            for message in await pull.fetch(FETCH):
                await message.ack()
                meter.events += 1
            first.set()
        meter.run_out.set()
    return sampling.result()


async def _latency(spec: Spec) -> Sample:
    """`publish_async`, and a push consumer, which has the library's lowest latency."""
    client = await nats.connect(spec.broker_url)
    meter = Meter(spec)
    publisher = _Publisher(client, spec.topic)
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def answered(future: asyncio.Future[Any]) -> None:
        if error := future.exception():
            meter.failed(1, repr(error))

    def send(_number: int) -> None:
        task = loop.create_task(publisher.publish(answered))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    clock = Clock(send)

    async def on_message(message: Any) -> None:
        clock.received(events.number_of(message.headers["ce-id"]))
        meter.events += 1
        await message.ack()

    config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL, ack_wait=30, max_ack_pending=-1)
    await client.jetstream().subscribe(
        spec.topic, cb=on_message, manual_ack=True, stream=STREAM, config=config
    )
    return await measured(spec, meter, clock)


class JetStream(Target):
    """One nats-server with file storage; one stream for all topics of the benchmarks."""

    name = "jetstream"
    most_consumed: ClassVar[int] = 60_000
    raw_loads: ClassVar[Mapping[str, Callable[[Spec], Awaitable[Sample]]]] = {
        "raw-publish": _publish,
        "raw-consume": _consume,
        "raw-latency": _latency,
        "fill": _fill,
    }

    def __init__(self) -> None:
        self._server = NatsServer()

    def start(self) -> None:
        self._server.start()

    def close(self) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def version(self) -> str:
        binary = str(find_binary(""))
        server = subprocess.run([binary, "-v"], capture_output=True, text=True, check=True).stdout
        return (
            f"{server.strip().replace(': v', ' ')}, nats-py {importlib.metadata.version('nats-py')}"
        )

    @property
    def config(self) -> str:
        return f'[brokers.work]\ntype = "jetstream"\nservers = ["{self.url}"]\n'

    @property
    def starts(self) -> Mapping[str, str]:
        return {**super().starts, EMBEDDED: ""}

    def empty(self, topic: str) -> None:
        asyncio.run(_make_anew(self.url, topic))


async def _make_anew(url: str, topic: str) -> None:
    client = await nats.connect(url)
    try:
        manager = client.jsm()
        with contextlib.suppress(NotFoundError):
            await manager.delete_stream(STREAM)
        await manager.add_stream(name=STREAM, subjects=[topic])
    finally:
        await client.close()
