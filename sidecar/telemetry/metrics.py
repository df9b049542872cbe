"""Every metric: its name, help text and labels, fed by facts and by looks at what is there."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import sidecar
from sidecar.event import Durability, Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sidecar.telemetry.facts import DeadLettered, Published, Settled

# A second series per counter that no dashboard uses.
disable_created_metrics()  # type: ignore[no-untyped-call]

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class BrokerGauges:
    """One broker, as it is when the metrics are scraped."""

    name: str
    connected: bool
    pending_events: int
    pending_bytes: int


@dataclass(frozen=True, slots=True)
class SubscriptionGauges:
    """One subscription, as it is when the metrics are scraped."""

    name: str
    in_flight: int
    retry_waiting: int
    lanes: int
    dropped: int


DESCRIBED = "described"
"""The label of all that apps describe, together: subscriptions, and topics of their dead letters."""


class Metrics:
    """
    Counts facts. Labels come from the configuration and from closed sets, never from input.

    A name that was not `declared` is counted as "described".
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._published = Counter(
            "sidecar_published_events_total",
            "Events that apps asked to publish, by what became of them.",
            ["broker", "topic", "result", "error"],
            registry=self.registry,
        )
        self._publish_duration = Histogram(
            "sidecar_publish_duration_seconds",
            "From an event's arrival to the broker's answer.",
            ["broker", "topic", "result"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._delivered = Counter(
            "sidecar_delivered_events_total",
            "Deliveries that ended, by how.",
            ["subscription", "result"],
            registry=self.registry,
        )
        self._dead_letters = Counter(
            "sidecar_dead_letters_total",
            "Events that were stored as dead letters.",
            ["subscription", "reason"],
            registry=self.registry,
        )
        self._reconnects = Counter(
            "sidecar_broker_reconnects_total",
            "Times the connection came back.",
            ["broker"],
            registry=self.registry,
        )
        build = Gauge(
            "sidecar_build_info",
            "Always 1; the labels tell the version.",
            ["version", "python"],
            registry=self.registry,
        )
        build.labels(sidecar.__version__, platform.python_version()).set(1)
        self._counts: dict[tuple[str, str, str, str], Counter] = {}
        self._subscriptions: frozenset[str] = frozenset()
        self._topics: frozenset[str] = frozenset()

    def declared(self, subscriptions: Iterable[str], topics: Iterable[str]) -> None:
        """
        The names that the configuration has, each a label of its own.

        *topics* are the patterns of the routes, and those of the subscriptions' dead letters.
        """
        self._subscriptions, self._topics = frozenset(subscriptions), frozenset(topics)

    def _subscription(self, name: str) -> str:
        return name if name in self._subscriptions else DESCRIBED

    def published(self, fact: Published) -> None:
        counts: dict[tuple[str, str], int] = {}
        for outcome in fact.outcomes:
            key = _result(outcome)
            counts[key] = counts.get(key, 0) + 1
        topic = fact.topic if not fact.topic or fact.topic in self._topics else DESCRIBED
        for (result, error), count in counts.items():
            labels = (fact.broker, topic, result, error)
            counter = self._counts.get(labels)
            if counter is None:
                counter = self._counts[labels] = self._published.labels(*labels)
            counter.inc(count)
        if fact.broker:
            result = next(iter(counts))[0]
            self._publish_duration.labels(fact.broker, topic, result).observe(fact.seconds)

    def settled(self, fact: Settled) -> None:
        self._delivered.labels(self._subscription(fact.subscription), fact.result).inc(fact.count)

    def dead_lettered(self, fact: DeadLettered) -> None:
        self._dead_letters.labels(self._subscription(fact.subscription), fact.reason).inc()

    def reconnected(self, broker: str) -> None:
        self._reconnects.labels(broker).inc()

    def look_at(
        self,
        brokers: Callable[[], Sequence[BrokerGauges]],
        subscriptions: Callable[[], Sequence[SubscriptionGauges]],
    ) -> None:
        """Where gauges come from: looked at when scraped, so the path of an event pays nothing."""
        self.registry.register(_Gauges(brokers, subscriptions, self._subscription))


_RESULTS = {
    Durability.STORED: "stored",
    Durability.SENT: "sent",
    Durability.SPOOLED: "spooled",
}


def _result(outcome: object) -> tuple[str, str]:
    if type(outcome) is Receipt:
        return ("duplicate" if outcome.duplicate else _RESULTS[outcome.durability]), ""
    return "failed", getattr(outcome, "code", "")


class _Gauges(Collector):
    def __init__(
        self,
        brokers: Callable[[], Sequence[BrokerGauges]],
        subscriptions: Callable[[], Sequence[SubscriptionGauges]],
        label: Callable[[str], str],
    ) -> None:
        """*label* is that of a subscription; what shares one is summed."""
        self._brokers = brokers
        self._subscriptions = subscriptions
        self._label = label

    def collect(self) -> Iterable[Metric]:
        brokers, subscriptions = self._brokers(), self._subscriptions()
        for name, text, field in (
            ("sidecar_broker_connected", "1 when connected.", "connected"),
            ("sidecar_publish_queue_events", "Published, not answered yet.", "pending_events"),
            ("sidecar_publish_queue_bytes", "Bytes published, not answered yet.", "pending_bytes"),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["broker"])
            for broker in brokers:
                gauge.add_metric([broker.name], float(getattr(broker, field)))
            yield gauge
        for name, text, field in (
            ("sidecar_in_flight_events", "Handed over, not settled.", "in_flight"),
            ("sidecar_retry_waiting_events", "Failed, waiting to be tried again.", "retry_waiting"),
            ("sidecar_lanes", "Keys with events here.", "lanes"),
            (
                "sidecar_dropped_events",
                "Lost since the subscription opened; 0 is right.",
                "dropped",
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["subscription"])
            sums: dict[str, float] = {}
            for subscription in subscriptions:
                label = self._label(subscription.name)
                sums[label] = sums.get(label, 0.0) + getattr(subscription, field)
            for label, value in sums.items():
                gauge.add_metric([label], value)
            yield gauge
