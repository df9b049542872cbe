"""Publish → receive at a fixed rate: an open-loop schedule, latency from the intended send time."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from sidecar.v1 import pubsub_pb2 as pb
from tests.benchmarks import events
from tests.benchmarks.loads import grpc
from tests.benchmarks.loads.http2 import Call, GrpcConnection
from tests.benchmarks.meter import FIRST_SECONDS, Meter

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.spec import Sample, Spec

RATE = 1000


class Clock:
    """
    Calls *send* with the number of each event when it is due, whatever became of those before.

    A thread sleeps until then: timers of the loop come up to a millisecond late. Number 0 goes ahead:
    when it has arrived the consumer is at work, and the schedule begins.
    """

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send
        self._begin = 0.0
        self._stop = threading.Event()
        self._latencies: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._at_work = asyncio.Event()

    async def start(self) -> None:
        self._send(0)
        async with asyncio.timeout(FIRST_SECONDS):
            await self._at_work.wait()
        self._begin = time.perf_counter() + 0.1
        threading.Thread(target=self._run, daemon=True).start()

    def received(self, number: int) -> None:
        """From any thread."""
        if number:
            self._latencies.append(time.perf_counter() - self._begin - number / RATE)
        else:
            self._loop.call_soon_threadsafe(self._at_work.set)

    def forget(self) -> None:
        """The warm-up is over."""
        self._latencies.clear()

    def stop(self, sample: Sample) -> Sample:
        """The sample with what was seen since `forget`."""
        self._stop.set()
        cuts = statistics.quantiles(self._latencies, n=100)
        return msgspec.structs.replace(sample, p50_seconds=cuts[49], p99_seconds=cuts[98])

    def _run(self) -> None:
        number = 1
        while not self._stop.is_set():
            now = time.perf_counter() - self._begin
            due = int(now * RATE) + 1
            for late in range(number, due):
                self._loop.call_soon_threadsafe(self._send, late)
            number = max(number, due)
            time.sleep(max(0.0, number / RATE - (time.perf_counter() - self._begin)))


async def measured(spec: Spec, meter: Meter, clock: Clock) -> Sample:
    """Run the clock through warm-up and window."""
    await clock.start()
    asyncio.get_running_loop().call_later(spec.warm_seconds, clock.forget)
    return clock.stop(await meter.sample())


async def latency(spec: Spec) -> Sample:
    """Unary publishes on one connection, a Subscribe stream on another."""
    meter = Meter(spec)
    ids = events.Ids()
    publishing = await GrpcConnection.connect(spec.grpc_socket, grpc.PUBLISH)
    consuming = await GrpcConnection.connect(spec.grpc_socket, grpc.SUBSCRIBE)
    publish = grpc.UnaryPublish(publishing, events.publish_request(ids, spec.topic))
    opened = asyncio.Event()
    call: Call

    def send(_number: int) -> None:
        publish.start(ids.take(1), answered)
        publishing.flush()

    def answered(failure: str) -> None:
        if failure:
            meter.failed(1, failure)

    clock = Clock(send)

    def on_message(message: bytes) -> None:
        response = pb.SubscribeResponse.FromString(message)
        if response.HasField("opened"):
            opened.set()
        for delivery in response.deliveries:
            clock.received(events.number_of(delivery.event.id))
        if response.deliveries:
            meter.events += len(response.deliveries)
            call.send(grpc.acks([delivery.token for delivery in response.deliveries]))

    call = consuming.call(on_message, meter.run_out.set)
    call.send(grpc.subscribe(spec))
    consuming.flush()
    async with asyncio.timeout(10):
        await opened.wait()
    return await measured(spec, meter, clock)
