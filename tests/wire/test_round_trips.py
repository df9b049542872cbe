"""Whatever make_event accepts survives every binding; whatever comes in does no harm."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.errors import InvalidEvent, SidecarError
from sidecar.event import Event
from sidecar.wire.cloudevents import (
    Defaults,
    from_http,
    from_json,
    from_json_batch,
    make_event,
    to_http,
    to_json,
)
from sidecar.wire.nats import decode, encode, msg_id
from sidecar.wire.timestamps import MAX_TIME_NS, MIN_TIME_NS

if TYPE_CHECKING:
    from collections.abc import Mapping

NONE = Defaults(source="", type="")
DEFAULTS = Defaults(source="/app", type="t")

TEXT = st.text(max_size=40) | st.text('abc-19 "%\\é€😀/:=', max_size=20)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=64)
HEADER_NAMES = st.text("abcdehinst-019", min_size=1, max_size=12)
CONTENT_TYPES = st.sampled_from(
    ["", "application/json", "a/b+json; x=y", "text/plain", "application/xml", "image/png"]
) | st.text("abc/+;= ", max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
DATA = (
    st.none()
    | st.binary(max_size=60)
    | st.text().map(lambda text: text.encode("utf-8", "replace"))
    | JSON.map(lambda value: json.dumps(value).encode())
)
ATTRIBUTES = st.fixed_dictionaries(
    {
        "id": TEXT,
        "source": TEXT,
        "type": TEXT,
        "time_ns": st.integers(MIN_TIME_NS, MAX_TIME_NS),
        "data": DATA,
        "key": TEXT,
        "content_type": CONTENT_TYPES,
        "subject": TEXT,
        "schema": TEXT,
        "extensions": st.dictionaries(NAMES, TEXT, max_size=3),
        "headers": st.dictionaries(HEADER_NAMES, TEXT, max_size=3),
    }
)


def accepted(attributes: dict[str, Any]) -> st.SearchStrategy[Event]:
    """The event, if the rules let it in."""
    try:
        return st.just(make_event(**attributes, defaults=DEFAULTS))
    except InvalidEvent:
        return st.nothing()


TIDY = str.maketrans({chr(code): "_" for code in (*range(0x20), *range(0x7F, 0xA0))})


def tidy(attributes: dict[str, Any]) -> dict[str, Any]:
    """Closer to what the rules accept, so that most examples get through."""
    clean: dict[str, Any] = {
        name: value.translate(TIDY) if isinstance(value, str) else value
        for name, value in attributes.items()
    }
    clean["source"] = "".join(clean["source"].split())
    clean["schema"] = "".join(clean["schema"].split())
    return clean | {
        "headers": {
            name: "".join(char for char in value if char.isprintable())
            for name, value in attributes["headers"].items()
        }
    }


EVENTS = ATTRIBUTES.map(tidy).flatmap(accepted)


def replace(event: Event, **changes: Any) -> Event:
    return msgspec.structs.replace(event, **changes)


def without_a_mark_for_no_data(event: Event) -> Event:
    """Bindings whose empty body is empty data if there is a content type, and else no data."""
    return replace(event, data=event.data or (b"" if event.content_type else None))


def check_message(error: InvalidEvent) -> None:
    """It names the attribute, and can be sent: no lone surrogates."""
    assert error.metadata["field"]
    f"{error}{error.metadata}".encode()


@given(EVENTS)
def test_an_event_survives_nats_in_binary_mode(event: Event) -> None:
    headers, payload = encode(event, extra=b"Nats-Msg-Id: x\r\n")

    assert decode(headers, payload, NONE) == without_a_mark_for_no_data(event)


@given(EVENTS)
def test_an_event_survives_nats_as_json(event: Event) -> None:
    headers, payload = encode(event, structured=True, extra=b"Nats-Msg-Id: x\r\n")

    assert_same_but_for_white_space(decode(headers, payload, NONE), event)


@given(EVENTS)
def test_an_event_survives_json(event: Event) -> None:
    """All of it; headers are no part of the JSON."""
    assert_same_but_for_white_space(from_json(to_json(event)), replace(event, headers={}))


def assert_same_but_for_white_space(actual: Event, expected: Event) -> None:
    """White space around a JSON value is no part of it."""
    if "json" in expected.content_type and expected.data and actual.data != expected.data:
        expected = replace(expected, data=expected.data.strip(b" \t\r\n"))

    assert actual == expected


@given(
    EVENTS,
    st.dictionaries(
        st.sampled_from(["traceparent", "tracestate", "baggage"]),
        st.text("ab=%, ;-01", max_size=20).map(str.strip),
    ),
)
def test_an_event_survives_http_in_binary_mode(event: Event, trace: Mapping[str, str]) -> None:
    event = replace(event, headers=trace)
    headers, body = to_http(event)
    pairs = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]

    assert from_http(pairs, body, NONE) == [without_a_mark_for_no_data(event)]


@given(st.lists(EVENTS, max_size=4))
def test_a_batch_is_its_events(events: list[Event]) -> None:
    batch = b"[%b]" % b",".join(to_json(event) for event in events)

    assert from_json_batch(batch) == [from_json(to_json(event)) for event in events]


@given(EVENTS)
def test_an_accepted_event_is_accepted_again_unchanged(event: Event) -> None:
    """Nothing is normalised twice into something else."""
    assert make_event(**msgspec.structs.asdict(event)) == event


@given(EVENTS)
def test_the_fast_and_the_patient_decoder_agree(event: Event) -> None:
    """Our own layout has a way of its own; another order of the lines must not matter."""
    headers, payload = encode(event)
    version, *lines = headers.removesuffix(b"\r\n\r\n").split(b"\r\n")
    shuffled = b"\r\n".join((version, *reversed(lines), b"", b""))

    assert decode(shuffled, payload, NONE) == decode(headers, payload, NONE)


@given(EVENTS, EVENTS)
def test_message_ids_are_equal_only_for_equal_identities(one: Event, other: Event) -> None:
    same = (one.source, one.id) == (other.source, other.id)

    assert (msg_id(one) == msg_id(other)) is same


@given(ATTRIBUTES)
def test_make_event_accepts_or_refuses_and_nothing_else(attributes: dict[str, Any]) -> None:
    try:
        event = make_event(**attributes, defaults=DEFAULTS)
    except InvalidEvent as error:
        check_message(error)
        return

    assert event.id
    assert event.source
    assert event.type


# -- hostile bytes

LINES = st.lists(
    st.sampled_from(
        [
            b"NATS/1.0",
            b"ce-specversion: 1.0",
            b"ce-id: 1",
            b"ce-source: /s",
            b"ce-type: t",
            b"ce-time: 2026-01-31T12:00:00Z",
            b"Content-Type: application/cloudevents+json",
            b"content-type: text/plain",
            b"ce-datacontenttype: application/json",
            b"",
        ]
    )
    | st.binary(max_size=12)
    | st.binary(max_size=12).map(lambda value: b"ce-subject: " + value)
    | st.binary(max_size=12).map(lambda value: b"ce-id: %" + value)
    | st.binary(max_size=12).map(lambda name: b"ce-" + name + b": x"),
    max_size=14,
).map(b"\r\n".join)
JSON_EVENTS = st.dictionaries(
    st.sampled_from(["specversion", "id", "source", "type", "time", "data", "data_base64"])
    | st.text(max_size=5),
    st.just("1.0") | JSON,
).map(lambda members: json.dumps(members).encode())
BODIES = st.binary() | JSON_EVENTS | JSON.map(lambda value: json.dumps(value).encode())


@settings(max_examples=300)
@given(st.none() | st.binary() | LINES, BODIES)
def test_no_nats_message_is_worse_than_invalid(headers: bytes | None, payload: bytes) -> None:
    """And what is taken can be stored again, as a dead letter has to be."""
    try:
        event = decode(headers, payload, DEFAULTS)
    except InvalidEvent:
        return

    assert decode(*encode(event), NONE) == without_a_mark_for_no_data(event)
    assert decode(*encode(event, structured=True), NONE).id == event.id
    to_http(event)


@settings(max_examples=300)
@given(
    EVENTS.map(encode),
    st.integers(min_value=0),
    st.integers(0, 3),
    st.binary(max_size=3) | st.sampled_from([b"\r\n", b"%", b'"', b"ce-", b": "]),
)
def test_a_damaged_block_is_an_event_or_invalid(
    message: tuple[bytes, bytes], at: int, length: int, damage: bytes
) -> None:
    headers, payload = message
    at %= len(headers)
    damaged = headers[:at] + damage + headers[at + length :]

    try:
        decode(damaged, payload, DEFAULTS)
    except InvalidEvent as error:
        check_message(error)


@settings(max_examples=300)
@given(BODIES)
def test_no_json_is_worse_than_invalid(data: bytes) -> None:
    try:
        event = from_json(data)
    except InvalidEvent as error:
        check_message(error)
    else:
        assert_same_but_for_white_space(from_json(to_json(event)), event)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"ce-id", b"ce-source", b"ce-type", b"ce-specversion", b"ce-time", b"content-type"]
            )
            | st.binary(max_size=8)
            | st.binary(max_size=4).map(lambda name: b"ce-" + name),
            st.sampled_from(
                [
                    b"1.0",
                    b"application/cloudevents+json",
                    b"application/cloudevents-batch+json",
                    b"application/cloudevents",
                    b"2026-01-31T12:00:00Z",
                ]
            )
            | st.binary(max_size=12),
        )
    ),
    BODIES,
)
def test_no_http_request_is_worse_than_a_sidecar_error(
    headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    try:
        outcomes = from_http(headers, body, DEFAULTS)
    except SidecarError as error:
        str(error).encode()
        return

    assert all(isinstance(outcome, Event | InvalidEvent) for outcome in outcomes)


@given(BODIES)
def test_no_batch_is_worse_than_a_sidecar_error(data: bytes) -> None:
    try:
        outcomes = from_json_batch(data)
    except SidecarError:
        return

    assert all(isinstance(outcome, Event | InvalidEvent) for outcome in outcomes)
