"""What an app describes with the client arrives at the sidecar as the configuration would say it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import typer

from sidecar import config
from sidecar.cli.subscribe import job_of
from sidecar.client import Filter, RetryPolicy, RetryRule, Settlement, SubscriptionSpec, Verdict
from sidecar.client.messages import set_target, settlement_to
from sidecar.v1 import pubsub_pb2 as pb
from sidecar.wire import proto


def arrived(**described: Any) -> config.Subscription:
    """The subscription as the sidecar has it, over the bytes of a request."""
    request = pb.PullRequest()
    set_target(request, SubscriptionSpec("billing", "orders.>", **described))
    received = pb.PullRequest.FromString(request.SerializeToString())
    return config.check_subscription(proto.subscription_from(received.spec))


def declared(**settings: Any) -> config.Subscription:
    return config.check_subscription({"name": "billing", "topic": "orders.>", **settings})


def test_what_is_left_out_has_the_configurations_default() -> None:
    assert arrived() == arrived(retry=RetryPolicy()) == declared()


@pytest.mark.parametrize(
    ("described", "settings"),
    [
        ({"ordering": "key"}, {"ordering": "key"}),
        ({"ordering": "key_per_replica"}, {"ordering": "key_per_replica"}),
        ({"ordering": "none"}, {"ordering": "none"}),
        ({"max_in_flight": 7}, {"max_in_flight": 7}),
        ({"max_in_flight_bytes": 5_000_000}, {"max_in_flight_bytes": 5_000_000}),
        ({"lease_seconds": 1.5}, {"lease_seconds": 1.5}),
        ({"expired": "drop"}, {"expired": "drop"}),
        ({"expired": "dead_letter"}, {"expired": "dead_letter"}),
        ({"duplicate_window_seconds": 90}, {"duplicate_window_seconds": 90}),
        ({"watchdog_seconds": 0}, {"watchdog_seconds": 0}),
        ({"watchdog_seconds": 2.5}, {"watchdog_seconds": 2.5}),
        ({"event_types": ["a.>"]}, {"event_types": ["a.>"]}),
        ({"start": datetime(2026, 1, 31, tzinfo=UTC)}, {"start": "2026-01-31T00:00:00Z"}),
        ({"dead_letter_topic": "dead"}, {"dead_letter": {"topic": "dead"}}),
    ],
)
def test_each_part_of_a_description_arrives(
    described: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert arrived(**described) == declared(**settings)


def test_a_whole_retry_policy_arrives() -> None:
    policy = RetryPolicy(
        max_attempts=7,
        initial_seconds=0.5,
        max_seconds=60,
        multiplier=3,
        jitter=0,
        total_seconds=3600,
        max_crashes=2,
        rules=[
            RetryRule("RATE_LIMITED", "retry_uncounted", delay_seconds=0.25),
            RetryRule("BAD_*", "reject"),
            RetryRule("*", "retry"),
        ],
    )

    assert arrived(retry=policy) == declared(
        retry={
            "max_attempts": 7,
            "initial_seconds": 0.5,
            "max_seconds": 60,
            "multiplier": 3,
            "jitter": 0,
            "total_seconds": 3600,
            "max_crashes": 2,
            "rules": [
                {"reason": "RATE_LIMITED", "action": "retry_uncounted", "delay_seconds": 0.25},
                {"reason": "BAD_*", "action": "reject"},
                {"reason": "*", "action": "retry"},
            ],
        }
    )


PAID = Filter.exact(type="order.paid", source="/shop")
EU = Filter.prefix(subject="eu/")
XL = Filter.suffix(size="xl")


@pytest.mark.parametrize(
    ("condition", "as_configured"),
    [
        (PAID, {"exact": {"type": "order.paid", "source": "/shop"}}),
        (EU, {"prefix": {"subject": "eu/"}}),
        (XL, {"suffix": {"size": "xl"}}),
        (~EU, {"not": {"prefix": {"subject": "eu/"}}}),
        (EU & XL, {"all": [{"prefix": {"subject": "eu/"}}, {"suffix": {"size": "xl"}}]}),
        (EU | XL, {"any": [{"prefix": {"subject": "eu/"}}, {"suffix": {"size": "xl"}}]}),
        (
            EU & ~XL & PAID,
            {
                "all": [
                    {"prefix": {"subject": "eu/"}},
                    {"not": {"suffix": {"size": "xl"}}},
                    {"exact": {"type": "order.paid", "source": "/shop"}},
                ]
            },
        ),
        (
            EU & (XL | PAID),
            {
                "all": [
                    {"prefix": {"subject": "eu/"}},
                    {
                        "any": [
                            {"suffix": {"size": "xl"}},
                            {"exact": {"type": "order.paid", "source": "/shop"}},
                        ]
                    },
                ]
            },
        ),
    ],
)
def test_filters_arrive_as_they_are_combined(
    condition: Filter, as_configured: dict[str, Any]
) -> None:
    assert arrived(filters=[condition]) == declared(filters=[as_configured])


def test_a_nack_takes_its_reason_and_whether_it_counts_along() -> None:
    settlement = Settlement("billing.1", Verdict.NACK, 2.5, "RATE_LIMITED: later", uncounted=True)
    message = pb.Settlement.FromString(settlement_to(settlement).SerializeToString())

    assert proto.settlements_from([message]) == [settlement]


def filters_of(*texts: str, name: str = "look") -> list[Filter]:
    job = job_of(
        target="unix:/nowhere",
        subscription="orders.>",
        name=name,
        start="",
        broker="",
        filters=texts,
        count=None,
        ack=True,
    )
    assert isinstance(job.subscription, SubscriptionSpec)
    return list(job.subscription.filters)


def test_the_commands_filters_are_exact_or_begin_before_a_star() -> None:
    assert filters_of("type=order.paid", "subject=eu/*", "comexampleeq=a=b") == [
        Filter.exact(type="order.paid"),
        Filter.prefix(subject="eu/"),
        Filter.exact(comexampleeq="a=b"),
    ]


@pytest.mark.parametrize(
    ("text", "name", "fault"),
    [
        ("type", "look", "use ATTRIBUTE=VALUE"),
        ("=x", "look", "use ATTRIBUTE=VALUE"),
        ("type=x", "", "give it a --name"),
    ],
)
def test_a_filter_that_says_nothing_is_refused(text: str, name: str, fault: str) -> None:
    with pytest.raises(typer.BadParameter, match=fault):
        filters_of(text, name=name)
