"""Whatever make_event accepts survives Kafka; whatever a record holds does no harm."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.errors import InvalidEvent
from sidecar.wire.cloudevents import make_event, to_http
from sidecar.wire.kafka import decode, encode, key_bytes, key_text
from sidecar.wire.nats import encode as to_nats
from tests.wire.test_round_trips import (
    BODIES,
    DEFAULTS,
    EVENTS,
    NONE,
    TEXT,
    assert_same_but_for_white_space,
    check_message,
    replace,
)

if TYPE_CHECKING:
    from random import Random

    from sidecar.event import Event

Record = tuple[list[tuple[str, bytes | None]], bytes | None, bytes | None]

# What looks like our own form of keys that are no text.
TRICKY = (
    st.binary(max_size=12)
    | st.text().map(str.encode)
    | st.sampled_from([b"", b"base64:", b"base64", b"base64:YQ==", b"base64:/w==", b"base64:/x=="])
)
KEYS = st.recursive(
    TRICKY, lambda inner: inner.map(lambda raw: b"base64:" + base64.b64encode(raw)), max_leaves=4
)
KEYED_EVENTS = st.builds(
    lambda event, key: replace(event, key=key or event.key),
    EVENTS,
    st.just("") | KEYS.map(key_text),
)


def record(event: Event, *, structured: bool = False) -> Record:
    """As it comes back from a broker."""
    headers, value, key = encode(event, structured=structured)
    return (
        [(name, text.encode() if isinstance(text, str) else text) for name, text in headers],
        value,
        key,
    )


@given(KEYED_EVENTS)
def test_an_event_survives_kafka_in_binary_mode(event: Event) -> None:
    """All of it, with no data and empty data told apart."""
    assert decode(*record(event), NONE) == event


@given(KEYED_EVENTS)
def test_an_event_survives_kafka_as_json(event: Event) -> None:
    assert_same_but_for_white_space(decode(*record(event, structured=True), NONE), event)


@given(EVENTS)
def test_only_an_event_without_data_in_binary_mode_is_a_tombstone(event: Event) -> None:
    assert (encode(event)[1] is None) is (event.data is None)
    assert encode(event, structured=True)[1] is not None


@given(KEYED_EVENTS, st.randoms(use_true_random=False))
def test_neither_the_order_nor_the_case_of_headers_matters(event: Event, random: Random) -> None:
    """Our own layout has a way of its own, which must say the same as the patient one."""
    headers, value, key = record(event)
    shuffled = [(name.upper(), text) for name, text in headers]
    random.shuffle(shuffled)

    assert decode(shuffled, value, key, NONE) == decode(headers, value, key, NONE)


@given(KEYS)
def test_a_record_key_survives_being_published_again(raw: bytes) -> None:
    """A redrive must not move a record to another partition, nor give it another identity."""
    text = key_text(raw)

    assert text
    assert text.encode()
    assert key_bytes(text) == raw


@given(TEXT | KEYS.map(lambda raw: raw.decode("utf-8", "ignore")))
def test_a_key_that_an_app_chose_survives(text: str) -> None:
    """Also one that looks like our form for bytes."""
    try:
        key = make_event(id="1", source="/s", type="t", time_ns=0, data=None, key=text).key
    except InvalidEvent:
        return

    assert not key or key_text(key_bytes(key)) == key


# -- hostile records

NAMES = (
    st.sampled_from(
        [
            "ce_specversion",
            "ce_id",
            "ce_source",
            "ce_type",
            "ce_time",
            "ce_subject",
            "ce_partitionkey",
            "CE_Id",
            "content-type",
            "Content-Type",
            "ce_",
            "ce-id",
        ]
    )
    | st.text(max_size=6)
    | st.text(max_size=4).map(lambda name: f"ce_{name}")
)
VALUES = (
    st.none()
    | st.sampled_from(
        [b"1.0", b"application/cloudevents+json", b"text/plain", b"2026-01-31T12:00:00Z", b"a"]
    )
    | st.binary(max_size=12)
)
COMPLETE: st.SearchStrategy[list[tuple[str, bytes | None]]] = st.just(
    [
        ("ce_specversion", b"1.0"),
        ("ce_id", b"1"),
        ("ce_source", b"/s"),
        ("ce_type", b"t"),
        ("ce_time", b"2026-01-31T12:00:00Z"),
    ]
)
HEADERS = st.builds(
    lambda start, more: start + more,
    st.just([]) | COMPLETE,
    st.lists(st.tuples(NAMES, VALUES), max_size=8),
)


@settings(max_examples=300)
@given(st.none() | HEADERS, st.none() | BODIES, st.none() | KEYS)
def test_no_record_is_worse_than_invalid(
    headers: list[tuple[str, bytes | None]] | None, value: bytes | None, key: bytes | None
) -> None:
    """And what is taken can be stored again, as a dead letter has to be, and pushed to the app."""
    try:
        event = decode(headers, value, key, DEFAULTS)
    except InvalidEvent as error:
        check_message(error)
        return

    assert decode(*record(event), NONE) == event
    assert decode(*record(event, structured=True), NONE).key == event.key
    assert key is None or encode(event)[2] == key
    to_nats(event)
    to_http(event)


@settings(max_examples=200)
@given(event=KEYED_EVENTS, at=st.integers(min_value=0), damage=VALUES, structured=st.booleans())
def test_a_damaged_record_is_an_event_or_invalid(
    event: Event, at: int, damage: bytes | None, *, structured: bool
) -> None:
    headers, value, key = record(event, structured=structured)
    at %= len(headers)
    headers[at] = (headers[at][0], damage)

    try:
        decode(headers, value, key, DEFAULTS)
    except InvalidEvent as error:
        check_message(error)
