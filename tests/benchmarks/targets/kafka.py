"""Kafka on a real cluster of one node, and confluent-kafka by itself."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from typing import TYPE_CHECKING, Any, ClassVar

import confluent_kafka
import psutil
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from tests.benchmarks import events
from tests.benchmarks.loads.latency import Clock, measured
from tests.benchmarks.meter import Meter, wait_until_idle
from tests.benchmarks.spec import Spec
from tests.benchmarks.targets.target import Target
from tests.support.kafka import DEADLINE_SECONDS, KafkaCluster, install
from tests.support.kafka_jars.install import available

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.benchmarks.spec import Sample

UNDER_WAY = 20_000
"""Events that the raw producer may have in its queue."""
POLL_EVERY = 100
"""Events between two looks for answers: with one for each the producer is slower."""
CONSUME = 500
"""Messages of one raw call."""
COMMIT_EVERY = 100
"""Events between two commits, where they come one by one."""
LOG_LEVEL = 3
"""Errors only: a new cluster makes it warn that it has to ask again for its producer id."""
WAIT_SECONDS = 0.1
LOOK_SECONDS = 0.01
WARM_TOPIC = "warm-up"
WARM_SECONDS = 20.0
WARM_EVENTS = 100_000
"""After so many Java has compiled what it runs all the time, and the first group has been made."""


class _Publisher:
    """The library's own pipelined publishing: `produce` with a callback for each event."""

    def __init__(self, spec: Spec, **settings: Any) -> None:
        self._producer = Producer(
            {
                "bootstrap.servers": spec.broker_url,
                "log_level": LOG_LEVEL,
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": "lz4",
                "queue.buffering.max.messages": UNDER_WAY,
                **settings,
            }
        )
        self._topic = spec.topic
        self._ids = events.Ids(spec.keys)

    def publish(self, answered: Callable[[KafkaError | None, Message], None]) -> None:
        """*answered* is called within `publish` or `poll`."""
        number, key = self._ids.take(1)
        headers = events.kafka_headers(f"{self._ids.prefix}-{number:010d}")
        while True:
            try:
                self._producer.produce(
                    self._topic, events.DATA, f"{key:03d}", headers=headers, on_delivery=answered
                )
            except BufferError:
                self._producer.poll(WAIT_SECONDS)
            else:
                break
        if number % POLL_EVERY == 0:
            self._producer.poll(0)

    def poll(self) -> None:
        self._producer.poll(0)

    def flush(self) -> None:
        self._producer.flush()


def _consumer(spec: Spec) -> Consumer:
    consumer = Consumer(
        {
            "bootstrap.servers": spec.broker_url,
            "log_level": LOG_LEVEL,
            # How late it looks whether there is room for more: 1 s, more than it takes to read all.
            "fetch.queue.backoff.ms": 10,
            "group.id": spec.subscription,
            "group.protocol": "consumer",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([spec.topic])
    return consumer


async def _publish(spec: Spec) -> Sample:
    meter = Meter(spec)
    publisher = _Publisher(spec)

    def answered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            meter.failed(1, error.str())
        else:
            meter.events += 1

    # With the first answer it is connected, and has its producer id.
    publisher.publish(answered)
    publisher.flush()

    def publish() -> None:
        while not meter.stopping:
            publisher.publish(answered)
        publisher.flush()

    async with asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(meter.sample())
        await asyncio.to_thread(publish)
    return sampling.result()


async def _fill(spec: Spec) -> Sample:
    """As many events as asked for."""
    meter = Meter(spec)
    publisher = _Publisher(spec)

    def answered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            raise KafkaException(error)
        meter.events += 1

    def fill() -> None:
        for _ in range(spec.events):
            publisher.publish(answered)
        publisher.flush()

    await asyncio.to_thread(fill)
    meter.run_out.set()
    return await meter.sample()


async def _consume(spec: Spec) -> Sample:
    """Read in batches, and commit each one once it was read, without waiting for the answer."""
    await wait_until_idle(psutil.Process(spec.broker_pid))
    meter = Meter(spec)
    loop = asyncio.get_running_loop()
    first = asyncio.Event()

    def consume() -> None:
        consumer = _consumer(spec)
        while not meter.stopping and meter.events < spec.events:
            messages = consumer.consume(CONSUME, WAIT_SECONDS)
            for message in messages:
                if error := message.error():
                    meter.failed(1, error.str())
                    continue
                message.headers(), message.key(), message.value()
                meter.events += 1
            if messages:
                loop.call_soon_threadsafe(first.set)
                consumer.commit(asynchronous=True)
        loop.call_soon_threadsafe(meter.run_out.set)
        consumer.close()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(consume))
        return await meter.sample(first)


async def _latency(spec: Spec) -> Sample:
    """A producer that does not wait for company, and a consumer that polls in a thread."""
    meter = Meter(spec)
    publisher = _Publisher(spec, **{"linger.ms": 0})

    def answered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            meter.failed(1, error.str())

    def send(_number: int) -> None:
        publisher.publish(answered)
        publisher.poll()

    clock = Clock(send)

    def consume() -> None:
        consumer = _consumer(spec)
        while not meter.stopping:
            message = consumer.poll(WAIT_SECONDS)
            if message is None:
                continue
            if error := message.error():
                meter.failed(1, error.str())
                continue
            headers = dict(message.headers() or ())
            clock.received(events.number_of(headers["ce_id"].decode()))
            meter.events += 1
            if meter.events % COMMIT_EVERY == 0:
                consumer.commit(asynchronous=True)
        consumer.close()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(consume))
        sample = await measured(spec, meter, clock)
    await asyncio.to_thread(publisher.flush)
    return sample


class Kafka(Target):
    """One node, and a topic of one partition that is made anew each time."""

    name = "kafka"
    most_consumed: ClassVar[int] = 300_000
    raw_loads: ClassVar[Mapping[str, Callable[[Spec], Awaitable[Sample]]]] = {
        "raw-publish": _publish,
        "raw-consume": _consume,
        "raw-latency": _latency,
        "fill": _fill,
    }

    @classmethod
    def missing(cls) -> str | None:
        return available()

    def __init__(self) -> None:
        # A deleted topic's files go at once, not a minute later, in somebody else's round.
        self._cluster = KafkaCluster(config={"log.segment.delete.delay.ms": "0"})

    def start(self) -> None:
        self._cluster.start()
        self.empty(WARM_TOPIC)
        warm_up = Spec(
            load="raw-consume",
            target=self.name,
            broker_url=self.url,
            broker_pid=self.pid,
            topic=WARM_TOPIC,
            subscription=WARM_TOPIC,
            events=WARM_EVENTS,
            warm_seconds=0,
            seconds=WARM_SECONDS,
        )
        asyncio.run(_fill(warm_up))
        asyncio.run(_consume(warm_up))

    def close(self) -> None:
        self._cluster.close()

    @property
    def url(self) -> str:
        return self._cluster.bootstrap_servers

    @property
    def pid(self) -> int:
        return self._cluster.pid()

    @property
    def version(self) -> str:
        jar = next((install().folder / "libs").glob("kafka_2*.jar"))
        client = importlib.metadata.version("confluent-kafka")
        return (
            f"Kafka {jar.stem.rpartition('-')[2]}, confluent-kafka {client} "
            f"with librdkafka {confluent_kafka.libversion()[0]}"
        )

    @property
    def config(self) -> str:
        return f'[brokers.work]\ntype = "kafka"\nbootstrap_servers = ["{self.url}"]\n'

    def empty(self, topic: str) -> None:
        """
        Delete and create it.

        Non-obvious: the answer to a deletion is the controller's, and the node goes on with the old
        topic for a moment. Created before it has forgotten that one, the new one would seem to be
        there while events still go where they are deleted.
        """
        admin = AdminClient({"bootstrap.servers": self.url})
        try:
            admin.delete_topics([topic])[topic].result(DEADLINE_SECONDS)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise
        deadline = time.monotonic() + DEADLINE_SECONDS
        while topic in admin.list_topics(timeout=DEADLINE_SECONDS).topics:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Kafka still has {topic} after it was deleted")
            time.sleep(LOOK_SECONDS)
        self._cluster.create_topic(topic)
