"""Metrics: what an app names is no label, however much it names."""

from __future__ import annotations

import json
from collections import Counter

from prometheus_client import generate_latest

from sidecar import config
from sidecar.brokers.memory import MemoryBroker
from sidecar.client import Sidecar, new_event
from sidecar.errors import BrokerRefused, InvalidEvent, TopicMissing
from sidecar.event import Durability, Event, Receipt
from sidecar.publishing.publisher import Publisher
from sidecar.publishing.routes import Routes
from sidecar.telemetry.facts import DeadLettered, Published, Settled
from sidecar.telemetry.metrics import MAX_REMEMBERED, Metrics, SubscriptionGauges
from tests.support.sidecar_process import SidecarProcess

STORED = Receipt("1", "work", "any", Durability.STORED)
DUPLICATE = Receipt("1", "work", "any", Durability.STORED, duplicate=True)


def gauges(name: str) -> SubscriptionGauges:
    return SubscriptionGauges(name, in_flight=1, retry_waiting=2, lanes=3, held_bytes=5, dropped=4)


def metrics() -> Metrics:
    made = Metrics()
    made.declared(["billing"], ["orders.>", "dlq.{topic}"], ["order.paid", "order.*", "order.>"])
    return made


def publisher(told: Metrics) -> Publisher:
    """Of a memory broker that gets the topics orders.> and, on any topic, the type stock.low."""
    memory = config.Memory(type="memory")
    routes = [
        config.Route(topic="orders.>", broker="work"),
        config.Route(event_type="stock.low", broker="work"),
    ]
    return Publisher(
        Routes(routes),
        {"work": MemoryBroker("work", memory)},
        settings=config.Publishing(),
        limits=config.Limits(max_event_bytes=1024),
        facts=told,
    )


def event(event_id: str, event_type: str, data: bytes = b"") -> Event:
    return Event(id=event_id, source="/shop", type=event_type, time_ns=1, data=data)


def lines(made: Metrics, *names: str) -> list[str]:
    """The samples of these metrics."""
    text = generate_latest(made.registry).decode()
    return [line for line in text.splitlines() if line.startswith(names)]


def sums(made: Metrics, name: str, *labels: str) -> Counter[tuple[str, ...]]:
    """The samples of one metric, added up by the values of these labels."""
    found: Counter[tuple[str, ...]] = Counter()
    for family in made.registry.collect():
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels[label] for label in labels)] += int(sample.value)
    return found


def test_facts_of_described_subscriptions_are_counted_together() -> None:
    made = metrics()
    for name in ("billing", "once-1", "once-2"):
        made.settled(Settled(name, "ack", 2))
        made.dead_lettered(DeadLettered(name, "rejected"))

    assert lines(made, "sidecar_delivered_events_total", "sidecar_dead_letters_total") == [
        'sidecar_delivered_events_total{result="ack",subscription="billing"} 2.0',
        'sidecar_delivered_events_total{result="ack",subscription="described"} 4.0',
        'sidecar_dead_letters_total{reason="rejected",subscription="billing"} 1.0',
        'sidecar_dead_letters_total{reason="rejected",subscription="described"} 2.0',
    ]


def test_gauges_of_described_subscriptions_are_summed() -> None:
    made = metrics()
    made.look_at(list, lambda: [gauges(name) for name in ("billing", "once-1", "once-2")])

    assert lines(made, "sidecar_in_flight_events{", "sidecar_dropped_events{") == [
        'sidecar_in_flight_events{subscription="billing"} 1.0',
        'sidecar_in_flight_events{subscription="described"} 2.0',
        'sidecar_dropped_events{subscription="billing"} 4.0',
        'sidecar_dropped_events{subscription="described"} 8.0',
    ]


def test_a_dead_letter_topic_that_an_app_describes_is_no_label() -> None:
    made = metrics()
    for topic in ("orders.>", "dlq.{topic}", "once-1.{topic}", "once-2.{topic}", ""):
        made.published(Published("work", topic, ["order.paid"], [STORED], 0.1))
    published = lines(made, "sidecar_published_events_total")
    durations = lines(made, "sidecar_publish_duration_seconds_count")

    for topic, count in (("orders.>", 1), ("dlq.{topic}", 1), ("described", 2), ("", 1)):
        labels = f'broker="work",error="",event_type="order.paid",result="stored",topic="{topic}"'
        assert f"sidecar_published_events_total{{{labels}}} {count}.0" in published
    assert (len(published), len(durations)) == (4, 4)


# -- types of events


def test_the_label_of_a_type_is_the_first_entry_that_matches() -> None:
    made = metrics()
    types = ["order.paid", "order.created", "order.created.late", "order", "stock.low", "order.new"]
    made.published(Published("work", "orders.>", types, [STORED] * 6, 0.1))

    assert sums(made, "sidecar_published_events_total", "event_type") == {
        ("order.paid",): 1,
        ("order.*",): 2,
        ("order.>",): 1,
        ("other",): 2,
    }


def test_nothing_declared_is_nothing_told_apart() -> None:
    made = Metrics()
    made.published(Published("work", "orders.>", ["order.paid"], [STORED], 0.1))

    assert sums(made, "sidecar_published_events_total", "topic", "event_type") == {
        ("described", "other"): 1
    }


def test_a_batch_of_mixed_types_counts_each_event_under_its_own() -> None:
    """Also where one fails: its neighbours of the same type are counted as stored."""
    made = metrics()
    batch = [
        ("order.paid", STORED),
        ("order.created", STORED),
        ("order.paid", BrokerRefused("no")),
        ("stock.low", DUPLICATE),
        ("order.paid", STORED),
        ("stock.high", DUPLICATE),
    ]
    types, outcomes = zip(*batch, strict=True)
    made.published(Published("work", "orders.>", types, outcomes, 0.1))
    labels = ("broker", "topic", "event_type", "result", "error")

    assert sums(made, "sidecar_published_events_total", *labels) == {
        ("work", "orders.>", "order.paid", "stored", ""): 2,
        ("work", "orders.>", "order.*", "stored", ""): 1,
        ("work", "orders.>", "order.paid", "failed", "BROKER_REFUSED"): 1,
        ("work", "orders.>", "other", "duplicate", ""): 2,
    }


def test_a_batch_took_its_time_once_for_each_type_and_result_in_it() -> None:
    """Success and failure apart; one type's failures together, whatever their errors."""
    made = metrics()
    types = ["order.paid"] * 5 + ["stock.low", "stock.high"]
    failures = [BrokerRefused("no"), TopicMissing("no"), TopicMissing("no")]
    for _ in range(3):
        fact = Published("work", "orders.>", types, [STORED, STORED, *failures, STORED, STORED], 2)
        made.published(fact)

    for name, each in (("count", 3), ("sum", 6)):
        found = sums(made, f"sidecar_publish_duration_seconds_{name}", "event_type", "result")
        assert found == {
            ("order.paid", "stored"): each,
            ("order.paid", "failed"): each,
            ("other", "stored"): each,
        }


async def test_ten_thousand_types_add_no_series() -> None:
    """What an app makes up is one label, however many types that are."""
    made = metrics()
    publishing = publisher(made)
    await publishing.publish("orders.new", [event("first", "stock.first")])
    before = len(lines(made, "sidecar_"))
    for start in range(0, 10_000, 1_000):
        batch = [event(str(n), f"stock.{n}") for n in range(start, start + 1_000)]
        await publishing.publish("orders.new", batch)

    assert len(lines(made, "sidecar_")) == before
    assert sums(made, "sidecar_published_events_total", "event_type", "result") == {
        ("other", "stored"): 10_001
    }


def test_what_is_remembered_of_types_is_bounded_and_still_right() -> None:
    made = metrics()
    for number in range(3 * MAX_REMEMBERED):
        types = [f"order.{number}", f"stock.{number}", "order.paid"]
        made.published(Published("work", "orders.>", types, [STORED] * 3, 0.1))
    remembered = made._event_type.cache_info().currsize  # type: ignore[attr-defined]

    assert remembered == MAX_REMEMBERED
    assert sums(made, "sidecar_published_events_total", "event_type") == {
        ("order.*",): 3 * MAX_REMEMBERED,
        ("other",): 3 * MAX_REMEMBERED,
        ("order.paid",): 3 * MAX_REMEMBERED,
    }


async def test_what_reaches_no_broker_is_counted_by_the_type_it_has() -> None:
    """A bad event has none: nobody could read it."""
    made = metrics()
    publishing = publisher(made)
    bad, large = InvalidEvent("no id"), event("large", "order.paid", b"x" * 1025)
    await publishing.publish("stock", [bad, event("a", "stock.low"), large, bad])
    await publishing.publish("stock", [event("b", "order.paid"), event("c", "order.created")])
    labels = ("broker", "event_type", "result", "error")

    assert sums(made, "sidecar_published_events_total", *labels) == {
        ("work", "other", "stored", ""): 1,
        ("", "other", "failed", "EVENT_INVALID"): 2,
        ("", "order.paid", "failed", "EVENT_TOO_LARGE"): 1,
        ("", "order.paid", "failed", "ROUTE_MISSING"): 1,
        ("", "order.*", "failed", "ROUTE_MISSING"): 1,
    }
    assert sums(made, "sidecar_publish_duration_seconds_count", "broker") == {("work",): 1}


async def test_the_first_200_types_of_the_configuration_are_labels() -> None:
    """Those of [metrics], then those of the routes, as the sidecar runs with them."""
    named = [f"order.{n}" for n in range(config.MAX_EVENT_TYPES - 1)]
    running = SidecarProcess(
        f"""
metrics = {{ event_types = {json.dumps(named)} }}
brokers = {{ work = {{ type = "memory" }} }}
routes = [
  {{ event_type = "order.>", broker = "work" }},
  {{ event_type = "stock.>", broker = "work" }},
  {{ topic = ">", broker = "work" }},
]
"""
    )
    with running:
        async with Sidecar(f"unix:{running.grpc_socket}") as sidecar:
            types = ["order.0", "order.198", "order.199", "order.200", "stock.low", "price"]
            await sidecar.publish("any", [new_event(type_, {}) for type_ in types])
        counts = {
            label: running.metric("sidecar_published_events_total", event_type=label)
            for label in ("order.0", "order.198", "order.>", "stock.>", "other")
        }

    assert counts == {"order.0": 1, "order.198": 1, "order.>": 2, "stock.>": 0, "other": 2}
