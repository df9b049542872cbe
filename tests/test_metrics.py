"""Metrics: what an app names is no label, however much it names."""

from __future__ import annotations

from prometheus_client import generate_latest

from sidecar.event import Durability, Receipt
from sidecar.telemetry.facts import DeadLettered, Published, Settled
from sidecar.telemetry.metrics import Metrics, SubscriptionGauges


def gauges(name: str) -> SubscriptionGauges:
    return SubscriptionGauges(name, in_flight=1, retry_waiting=2, lanes=3, dropped=4)


def metrics() -> Metrics:
    made = Metrics()
    made.declared(["billing"], ["orders.>", "dlq.{topic}"])
    return made


def lines(made: Metrics, *names: str) -> list[str]:
    """The samples of these metrics."""
    text = generate_latest(made.registry).decode()
    return [line for line in text.splitlines() if line.startswith(names)]


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
    outcomes = [Receipt("1", "work", "any", Durability.STORED)]
    for topic in ("orders.>", "dlq.{topic}", "once-1.{topic}", "once-2.{topic}", ""):
        made.published(Published("work", topic, outcomes, 0.1))
    published = lines(made, "sidecar_published_events_total")
    durations = lines(made, "sidecar_publish_duration_seconds_count")

    for topic, count in (("orders.>", 1), ("dlq.{topic}", 1), ("described", 2), ("", 1)):
        labels = f'broker="work",error="",result="stored",topic="{topic}"'
        assert f"sidecar_published_events_total{{{labels}}} {count}.0" in published
    assert (len(published), len(durations)) == (4, 4)
