"""An event comes out as it went in, whatever is in it, and whoever published it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from sidecar.event import Event
from tests.conformance.acting import event, interest, publish, take

if TYPE_CHECKING:
    from sidecar.broker import Broker
    from tests.conformance.conftest import World
    from tests.conformance.harness import Harness

FULL = Event(
    id="id with spaces, 'quotes', \"double\" and 100 %",
    source="/shop/ünïcode?a=b",
    type="order.created.v2",
    time_ns=1_769_860_800_123_456_789,
    data=bytes(range(256)),
    key="customer/4711 Ω",
    content_type="application/octet-stream",
    subject="Bestellung № 7 — 注文 🛒",
    schema="https://example.com/schemas/order?version=2#it",
    extensions={"tenant": "acmé", "empty": "", "number": "7"},
    headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
)

EVENTS = {
    "every attribute": FULL,
    "no data": event(data=None),
    "no data though a key": event(data=None, key="k"),
    "empty data": event(data=b"", content_type="text/plain"),
    "not UTF-8": event(data=b"\xff\xfe\x00\r\n\r\nMSG a 1 5\r\n"),
    "JSON": event(data=b'{"specversion": "1.0"}', content_type="application/json"),
    "long": event("i" * 300, source="/" + "s" * 500, data=b"x" * 200_000),
    "other headers": event(data=b"x", headers={"tracestate": "a=1,b=2", "baggage": "k=v;p=1"}),
}


@pytest.mark.parametrize("name", EVENTS)
async def test_an_event_comes_out_as_it_went_in(broker: Broker, topic: str, name: str) -> None:
    source = await broker.subscribe(interest(topic))
    await publish(broker, topic, [EVENTS[name]])
    (taken,) = await take(source, 1)

    assert taken.event == EVENTS[name]
    assert taken.topic == topic
    assert not taken.problem


async def test_a_batch_of_all_of_them_comes_out_in_order(broker: Broker, topic: str) -> None:
    """Each with an id of its own: the same (source, id) would be one event."""
    batch = [event(f"{n}", data=one.data, key=one.key) for n, one in enumerate(EVENTS.values())]
    source = await broker.subscribe(interest(topic))
    await publish(broker, topic, batch)
    taken = await take(source, len(batch))

    assert [i.event and (i.event.id, i.event.key) for i in taken] == [(e.id, e.key) for e in batch]


@pytest.mark.needs("foreign")
async def test_a_plain_message_is_an_event_by_defaults(
    broker: Broker, harness: Harness, topic: str
) -> None:
    """Its type is the topic; its data is as it was; it has an id, a source and a time."""
    source = await broker.subscribe(interest(topic))
    await harness.publish_foreign(topic, b"\x00plain\xff")
    await harness.publish_foreign(topic, b"{}", {"X-Kind": "test", "Content-Type": "text/json"})
    plain, with_headers = (i.event for i in await take(source, 2))

    assert plain is not None
    assert with_headers is not None
    assert (plain.type, plain.data, plain.content_type) == (topic, b"\x00plain\xff", "")
    assert plain.id
    assert plain.source
    assert plain.time_ns
    assert plain.id != with_headers.id
    assert (with_headers.content_type, dict(with_headers.headers)) == (
        "text/json",
        {"x-kind": "test"},
    )


@pytest.mark.needs("foreign", "redelivers")
async def test_a_plain_message_is_the_same_event_each_time_it_comes(
    broker: Broker, harness: Harness, topic: str
) -> None:
    source = await broker.subscribe(interest(topic))
    await harness.publish_foreign(topic, b"plain")
    (first,) = await take(source, 1)
    source.release([first.handle])
    (again,) = await take(source, 1)

    assert again.event == first.event
    assert (first.failures.attempts, again.failures.attempts) == (0, 0)


@pytest.mark.needs("foreign")
@pytest.mark.parametrize(
    ("headers", "data"),
    [
        ({"ce-specversion": "1.0", "ce-id": "1"}, b"no source and no type"),
        ({"ce-specversion": "9.9", "ce-id": "1", "ce-source": "/a", "ce-type": "b"}, b"x"),
        ({"Content-Type": "application/cloudevents+json"}, b"{not json \xff"),
        ({"Content-Type": "application/cloudevents+json"}, b"[1, 2]"),
        pytest.param(
            None,
            json.dumps({"specversion": "1.0", "id": 7}).encode(),
            marks=pytest.mark.needs("bare-json"),
        ),
    ],
)
async def test_what_claims_to_be_an_event_and_is_none_comes_with_its_problem(
    broker: Broker, harness: Harness, topic: str, headers: dict[str, str] | None, data: bytes
) -> None:
    """And with its bytes, for the dead letters; what comes behind it is not held up."""
    source = await broker.subscribe(interest(topic))
    await harness.publish_foreign(topic, data, headers)
    await publish(broker, topic, [event("good")])
    bad, good = await take(source, 2)

    assert bad.event is None
    assert bad.problem
    assert bad.raw == data
    assert good.event is not None
    assert good.event.id == "good"


@pytest.mark.needs("frames")
async def test_a_topic_that_is_not_text_holds_up_nothing(world: World, topic: str) -> None:
    """Other clients may publish on subjects that are not UTF-8: stored, it can be a dead letter."""
    broker = await world.sidecar()
    first = topic.partition(".")[0]
    source = await broker.subscribe(interest(f"{first}.>"))
    reader, writer = await asyncio.open_connection(*world.harness.address)
    await reader.readline()
    writer.write(b"CONNECT {}\r\nPUB %b.\xff\xfe 3\r\nbad\r\nPING\r\n" % first.encode())
    async with asyncio.timeout(5):
        while b"PONG" not in await reader.readline():
            pass
    writer.close()
    await writer.wait_closed()
    await publish(broker, topic, [event("good")])
    stored = [f"{first}.\ufffd\ufffd"] if broker.capabilities.redelivers else []
    taken = await take(source, len(stored) + 1, ack=True)

    assert [incoming.topic for incoming in taken] == [*stored, topic]
