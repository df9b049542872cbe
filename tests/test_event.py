"""The rules of topics and patterns: what is a name of ours, and what is the brokers' own."""

from __future__ import annotations

import pytest

from sidecar.errors import InvalidTopic
from sidecar.event import check_pattern, check_topic, check_type_pattern

RESERVED = ["_INBOX.x", "_INBOX", "_sys.a", "__consumer_offsets", "_"]


@pytest.mark.parametrize("topic", RESERVED)
def test_a_topic_that_begins_with_an_underscore_is_the_brokers_own(topic: str) -> None:
    """A stream over _INBOX would store the replies that NATS sends."""
    with pytest.raises(InvalidTopic, match='begin with "_" are the brokers'):
        check_topic(topic)


@pytest.mark.parametrize("pattern", [*RESERVED, "_INBOX.>", "_INBOX.*", "_sys.*.a"])
def test_a_pattern_cannot_ask_for_the_brokers_own(pattern: str) -> None:
    with pytest.raises(InvalidTopic, match="is reserved"):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", [">", "*", "*.x", "*.>", "orders._a", "a_b.c", "-"])
def test_wildcards_and_later_underscores_are_fine(pattern: str) -> None:
    check_pattern(pattern)


def test_types_of_events_are_free_to_begin_with_an_underscore() -> None:
    check_topic("orders._a.b_")
    check_type_pattern("_internal.>")
