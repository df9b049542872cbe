"""Every metric: its name, help text and labels, fed by facts and by looks at what is there."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, TypeAlias, TypeVar

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
from sidecar.event import Durability, Receipt, pattern_matcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sidecar.telemetry.facts import (
        DeadLettered,
        Published,
        Pushed,
        Reestablished,
        Settled,
        Skipped,
    )

# A second series per counter that no dashboard uses.
disable_created_metrics()  # type: ignore[no-untyped-call]

_ItemT = TypeVar("_ItemT")
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
    held_bytes: int
    dropped: int
    push_requests: int = 0
    push_concurrency: int = 0
    push_circuit_open: bool = False


DESCRIBED = "described"
"""The label of all that apps describe, together: subscriptions, and topics of their dead letters."""
OTHER = "other"
"""The label of all types of events that no entry of the configuration matches, together."""
MAX_REMEMBERED = 1024
"""Types whose label is remembered: they come from outside."""


class Metrics:
    """
    Counts facts. Labels come from the configuration and from closed sets, never from input.

    A name that was not `declared` is counted as "described", a type as "other".
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._published = Counter(
            "sidecar_published_events_total",
            "Events that apps asked to publish, by what became of them.",
            ["broker", "topic", "event_type", "result", "error"],
            registry=self.registry,
        )
        self._publish_duration = Histogram(
            "sidecar_publish_duration_seconds",
            "From a batch's arrival to the broker's answer, once per type and result in it.",
            ["broker", "topic", "event_type", "result"],
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
        self._skipped = Counter(
            "sidecar_skipped_events_total",
            "Events that were acked without being handed over, by why.",
            ["subscription", "reason"],
            registry=self.registry,
        )
        self._reestablished = Counter(
            "sidecar_subscription_reestablished_total",
            "Times the watchdog subscribed anew.",
            ["subscription"],
            registry=self.registry,
        )
        self._push_duration = Histogram(
            "sidecar_push_duration_seconds",
            "Requests of push, by what came of them.",
            ["subscription", "outcome"],
            buckets=_BUCKETS,
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
        # `labels` takes a lock and a microsecond; there are as many to remember as there are series.
        self._counter = cache(self._published.labels)
        self._duration = cache(self._publish_duration.labels)
        self._ended = cache(self._delivered.labels)
        self._answered = cache(self._push_duration.labels)
        self.declared((), (), ())

    def declared(
        self, subscriptions: Iterable[str], topics: Iterable[str], event_types: Iterable[str]
    ) -> None:
        """
        The names that the configuration has, each a label of its own.

        *topics* are the patterns of the routes, and those of the subscriptions' dead letters;
        *event_types* are patterns too, of which the first that matches is a type's label.
        """
        self._subscriptions, self._topics = frozenset(subscriptions), frozenset(topics)
        self._event_type = _label_by_type(event_types)

    def _subscription(self, name: str) -> str:
        return name if name in self._subscriptions else DESCRIBED

    def published(self, fact: Published) -> None:
        counts = self._counts(fact)
        topic = fact.topic if not fact.topic or fact.topic in self._topics else DESCRIBED
        for (event_type, (result, error)), count in counts.items():
            self._counter(fact.broker, topic, event_type, result, error).inc(count)
        if fact.broker:
            for event_type, result in {(label, result) for label, (result, _) in counts}:
                self._duration(fact.broker, topic, event_type, result).observe(fact.seconds)

    def _counts(self, fact: Published) -> Mapping[tuple[str, _Result], int]:
        """How many events of the batch have the same label of their type and the same result."""
        results = map(_result, fact.outcomes)
        if len(set(fact.types)) == 1:  # as most have: one look-up, and half the time of the other
            event_type = self._event_type(fact.types[0])
            return {(event_type, result): n for result, n in _tally(results).items()}
        # Not strict: who is told of a fact never raises.
        return _tally(zip(map(self._event_type, fact.types), results, strict=False))

    def settled(self, fact: Settled) -> None:
        self._ended(self._subscription(fact.subscription), fact.result).inc(fact.count)

    def dead_lettered(self, fact: DeadLettered) -> None:
        self._dead_letters.labels(self._subscription(fact.subscription), fact.reason).inc()

    def skipped(self, fact: Skipped) -> None:
        self._skipped.labels(self._subscription(fact.subscription), fact.why).inc(fact.count)

    def pushed(self, fact: Pushed) -> None:
        subscription = self._subscription(fact.subscription)
        self._answered(subscription, fact.outcome).observe(fact.seconds)

    def reestablished(self, fact: Reestablished) -> None:
        self._reestablished.labels(self._subscription(fact.subscription)).inc()

    def reconnected(self, broker: str) -> None:
        self._reconnects.labels(broker).inc()

    def look_at(
        self,
        brokers: Callable[[], Sequence[BrokerGauges]],
        subscriptions: Callable[[], Sequence[SubscriptionGauges]],
    ) -> None:
        """Where gauges come from: looked at when scraped, so the path of an event pays nothing."""
        self.registry.register(_Gauges(brokers, subscriptions, self._subscription))


def _label_by_type(patterns: Iterable[str]) -> Callable[[str], str]:
    """The first of *patterns* that matches a type, else "other"."""
    rules = [(pattern_matcher(pattern), pattern) for pattern in patterns]

    @lru_cache(maxsize=MAX_REMEMBERED)
    def label(event_type: str) -> str:
        for matcher, pattern in rules:
            if matcher.fullmatch(event_type):
                return pattern
        return OTHER

    return label


def _tally(items: Iterable[_ItemT]) -> dict[_ItemT, int]:
    """As collections.Counter does, which takes a microsecond more for a batch of one."""
    counts: dict[_ItemT, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


_Result: TypeAlias = tuple[str, str]
"""The labels result and error."""
_RESULTS: Mapping[Durability, _Result] = {
    Durability.STORED: ("stored", ""),
    Durability.SENT: ("sent", ""),
    Durability.SPOOLED: ("spooled", ""),
}
_DUPLICATE = ("duplicate", "")


def _result(outcome: object) -> _Result:
    if type(outcome) is Receipt:
        return _DUPLICATE if outcome.duplicate else _RESULTS[outcome.durability]
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
            ("sidecar_push_requests", "Requests of push under way.", "push_requests"),
            (
                "sidecar_push_concurrency",
                "Requests of push that may be under way.",
                "push_concurrency",
            ),
            (
                "sidecar_push_circuit_open",
                "1 while the app is down, and nothing is pushed.",
                "push_circuit_open",
            ),
            ("sidecar_held_bytes", "Bytes of the events that are here.", "held_bytes"),
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
