"""The NATS binding, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.errors import InvalidEvent
from sidecar.event import Event
from sidecar.wire.cloudevents import Defaults
from sidecar.wire.nats import MAX_MSG_ID_LENGTH, decode, encode, msg_id
from sidecar.wire.timestamps import parse_rfc3339

DEFAULTS = Defaults(source="/orders", type="orders", id="orders:7", time_ns=7)
NOON = parse_rfc3339("2026-01-31T12:00:00Z")
PLAIN = Event("1", "/shop", "orders.created", NOON, b"{}", content_type="application/json")


def block(*lines: str) -> bytes:
    return "\r\n".join(("NATS/1.0", *lines, "", "")).encode()


REQUIRED = ("ce-specversion: 1.0", "ce-id: 1", "ce-source: /shop", "ce-type: orders.created")
TIME = "ce-time: 2026-01-31T12:00:00Z"


def event(**changes: Any) -> Event:
    attributes: dict[str, Any] = {
        "id": "1",
        "source": "/shop",
        "type": "orders.created",
        "time_ns": NOON,
    }
    return Event(**attributes | changes)


def problem(headers: bytes | None, payload: bytes = b"") -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        decode(headers, payload, DEFAULTS)
    str(caught.value).encode()
    return caught.value


# -- binary mode


def test_binary_mode_has_every_attribute_in_a_header() -> None:
    """Also datacontenttype, unlike over HTTP and Kafka; the key is partitionkey."""
    headers, payload = encode(
        event(
            data=b"<a/>",
            key="k 1",
            content_type="text/xml; charset=utf-8",
            subject="ü",
            schema="https://x/y",
            extensions={"tenant": "100%"},
            headers={"traceparent": "00-1"},
        )
    )

    assert payload == b"<a/>"
    assert headers == block(
        "ce-specversion: 1.0",
        "ce-id: 1",
        "ce-source: /shop",
        "ce-type: orders.created",
        "ce-datacontenttype: text/xml;%20charset=utf-8",
        TIME,
        "ce-partitionkey: k%201",
        "ce-subject: %C3%BC",
        "ce-dataschema: https://x/y",
        "ce-tenant: 100%25",
        "traceparent: 00-1",
    )


def test_extra_lines_come_right_behind_the_version() -> None:
    for structured in (False, True):
        headers, _ = encode(PLAIN, structured=structured, extra=b"Nats-Msg-Id: x\r\n")

        assert headers.startswith(b"NATS/1.0\r\nNats-Msg-Id: x\r\n")
        assert headers.endswith(b"\r\n\r\n")
        assert decode(headers, encode(PLAIN, structured=structured)[1], DEFAULTS) == PLAIN


@pytest.mark.parametrize("attack", ["a\r\nce-id: 2", "a\nb", "\r\n\r\npayload", "a\x00b"])
@pytest.mark.parametrize("structured", [False, True])
def test_no_value_can_start_a_line(attack: str, structured: bool) -> None:  # noqa: FBT001
    """Even of an event that was never checked, as one with an app's reason in a header."""
    injected = event(
        id=attack,
        source=attack,
        type=attack,
        key=attack,
        subject=attack,
        schema=attack,
        content_type=attack,
        extensions={"tenant": attack},
        headers={"sidecar-dead-letter-reason": attack},
    )
    headers, _ = encode(injected, structured=structured)
    clean, _ = encode(
        event(
            key="k",
            subject="s",
            schema="d",
            content_type="c",
            extensions={"tenant": "t"},
            headers={"sidecar-dead-letter-reason": "r"},
        ),
        structured=structured,
    )

    assert headers.count(b"\r\n") == clean.count(b"\r\n")
    assert headers.count(b"\n") == clean.count(b"\n")
    assert headers.index(b"\r\n\r\n") == len(headers) - 4


@pytest.mark.parametrize(
    "name", ["a b", "a:b", "a\r\nb", "", "ce-id", "nats-msg-id", "content-type", "é"]
)
def test_a_header_that_could_mean_something_else_is_left_out(name: str) -> None:
    headers, _ = encode(event(headers={name: "x", "fine": "y"}))

    assert headers == block(*REQUIRED, TIME, "fine: y")


def test_header_names_match_in_any_case() -> None:
    headers = block(
        "CE-SpecVersion: 1.0",
        "Ce-Id:1",
        "ce-SOURCE:   /shop \t",
        "cE-Type: orders.created",
        "Ce-Time: 2026-01-31t12:00:00z",
        "CE-PartitionKey: k",
        "CE-Tenant: A",
        "TraceParent: 00-1",
    )

    assert decode(headers, b"x", DEFAULTS) == event(
        data=b"x", key="k", extensions={"tenant": "A"}, headers={"traceparent": "00-1"}
    )


def test_values_are_decoded_once_and_unquoted() -> None:
    headers = block(
        *REQUIRED, TIME, "ce-subject: %c3%bc%2541", 'ce-tenant: "a \\"b\\""', "ce-raw: ü€"
    )

    assert decode(headers, b"", DEFAULTS) == event(
        subject="ü%41", extensions={"tenant": 'a "b"', "raw": "ü€"}
    )


def test_control_headers_of_nats_are_never_part_of_the_event() -> None:
    for lines in (("Nats-Msg-Id: 1", *REQUIRED, TIME), (*REQUIRED, TIME, "nats-stream: x")):
        assert decode(block(*lines), b"", DEFAULTS) == event()
    assert not decode(block("NATS-Sequence: 1", "Nats-Subject: x"), b"x", DEFAULTS).headers


def test_a_header_that_comes_twice_is_a_list() -> None:
    twice = ("tracestate: a=1", "TraceState: b=2")

    assert decode(block(*REQUIRED, TIME, *twice), b"", DEFAULTS).headers == {
        "tracestate": "a=1,b=2"
    }
    assert decode(block(*REQUIRED, TIME, twice[0], twice[0]), b"", DEFAULTS).headers == {
        "tracestate": "a=1,a=1"
    }


def test_plain_headers_are_neither_decoded_nor_a_reason_to_refuse() -> None:
    """Baggage has escapes of its own; what is not UTF-8 or no name is the sender's business."""
    headers = block(*REQUIRED, TIME, "baggage: a=%20%C0", "X_Foo: y", "no colon", ": no name")

    assert decode(headers, b"", DEFAULTS) == event(headers={"baggage": "a=%20%C0", "x_foo": "y"})
    assert decode(b"NATS/1.0\r\nx: \xff\r\n\r\n", b"x", DEFAULTS).headers == {"x": "\ufffd"}


def test_empty_data_and_no_data_differ_by_the_content_type() -> None:
    """An empty payload says nothing by itself."""
    assert decode(*encode(event(data=None)), DEFAULTS).data is None
    assert decode(*encode(event(data=b"")), DEFAULTS).data is None
    assert decode(*encode(event(data=b"", content_type="a/b")), DEFAULTS).data == b""


def test_a_missing_time_is_when_the_broker_stored_it() -> None:
    assert decode(block(*REQUIRED), b"", DEFAULTS).time_ns == 7


def test_a_content_type_as_over_http_is_understood() -> None:
    headers = block(*REQUIRED, TIME, "Content-Type: text/plain")

    assert decode(headers, b"x", DEFAULTS) == event(data=b"x", content_type="text/plain")


@pytest.mark.parametrize("missing", range(4))
def test_some_ce_headers_without_all_required_is_no_event(missing: int) -> None:
    lines = [line for number, line in enumerate(REQUIRED) if number != missing]
    name = REQUIRED[missing].partition(":")[0].removeprefix("ce-")

    assert problem(block(*lines)).metadata["field"] == name
    assert problem(block(*lines, f"ce-{name}: ")).metadata["field"] == name


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("ce-specversion: 0.3", "specversion"),
        ("ce-time: yesterday", "time"),
        ("ce-subject: %C0%A0", "subject"),
        ("ce-subject: a%0D%0Ab", "subject"),
        ("ce-id: %00", "id"),
        ("ce-id: %EF%BF%BF", "id"),
        ("ce-source: a%20b", "source"),
        ("ce-type: " + "a" * 5000, "type"),
        ("ce-tenant: %FF", "tenant"),
        ("ce-my_ext: x", "extensions"),
        ("ce-data: x", "extensions"),
        ("ce-: x", "extensions"),
        ("ce-datacontenttype: application/cloudevents+json", "datacontenttype"),
    ],
)
def test_a_broken_attribute_is_named(line: str, field: str) -> None:
    name = line.partition(":")[0]
    lines = [other for other in (*REQUIRED, TIME) if not other.startswith(f"{name}:")]

    assert problem(block(*lines, line)).metadata["field"] == field


def test_attributes_that_are_not_utf_8_are_refused() -> None:
    headers = block(*REQUIRED, TIME).replace(b"/shop", b"/\xffshop")

    assert problem(headers).metadata["field"] == "source"


# -- structured mode


def test_structured_mode_is_json_with_a_content_type() -> None:
    headers, payload = encode(event(data=b"[1]", content_type="a/json", key="k"), structured=True)

    assert headers == block("Content-Type: application/cloudevents+json; charset=UTF-8")
    assert payload == (
        b'{"specversion":"1.0","id":"1","source":"/shop","type":"orders.created",'
        b'"time":"2026-01-31T12:00:00Z","datacontenttype":"a/json","partitionkey":"k","data":[1]}'
    )


@pytest.mark.parametrize(
    "headers",
    [
        block("content-type: Application/CloudEvents+JSON"),
        block("Content-Type: application/cloudevents+json; charset=UTF-8", "ce-id: other"),
        block("Nats-Msg-Id: 1"),
        block(),
        b"",
        None,
    ],
)
def test_structured_mode_is_known_by_content_type_or_by_itself(headers: bytes | None) -> None:
    """Senders of the first version of the binding set no header at all."""
    _, payload = encode(PLAIN, structured=True)

    assert decode(headers, payload, DEFAULTS) == PLAIN


def test_headers_travel_beside_a_structured_event() -> None:
    headers, payload = encode(event(headers={"traceparent": "00-1"}), structured=True)

    assert decode(headers, payload, DEFAULTS).headers == {"traceparent": "00-1"}


def test_a_structured_event_without_a_time_has_the_brokers() -> None:
    payload = b'{"specversion":"1.0","id":"1","source":"/shop","type":"t"}'

    assert decode(None, payload, DEFAULTS).time_ns == 7


@pytest.mark.parametrize(
    ("content_type", "payload"),
    [
        ("application/cloudevents+json", b""),
        ("application/cloudevents+json", b"{"),
        ("application/cloudevents+json", b"[]"),
        ("application/cloudevents+json", b'{"specversion":"1.0"}'),
        ("application/cloudevents+avro", b"{}"),
        ("application/cloudevents-batch+json", b"[]"),
    ],
)
def test_what_claims_to_be_structured_and_is_not_is_refused(
    content_type: str, payload: bytes
) -> None:
    assert problem(block(f"Content-Type: {content_type}"), payload).code == "EVENT_INVALID"


# -- plain messages


@pytest.mark.parametrize("headers", [None, b"", block(), block("X: y")])
@pytest.mark.parametrize("payload", [b"hello", b"{}", b"\xff", b'{"a":{"specversion":"1.0"}}'])
def test_a_plain_message_becomes_an_event_by_the_defaults(
    headers: bytes | None, payload: bytes
) -> None:
    made = decode(headers, payload, DEFAULTS)

    assert (made.id, made.source, made.type, made.time_ns) == ("orders:7", "/orders", "orders", 7)
    assert made.data == payload
    assert made.headers == ({"x": "y"} if headers == block("X: y") else {})


def test_a_plain_message_keeps_its_content_type() -> None:
    defaults = Defaults(source="/s", type="t", content_type="text/plain")

    assert decode(block("Content-Type: a/b"), b"x", defaults).content_type == "a/b"
    assert decode(None, b"x", defaults).content_type == "text/plain"
    assert decode(b"NATS/1.0\r\nContent-Type: \xff\r\n\r\n", b"x", defaults).content_type == (
        "text/plain"
    )


def test_a_plain_message_without_a_payload_has_no_data() -> None:
    assert decode(None, b"", DEFAULTS).data is None


def test_a_plain_json_object_with_specversion_inside_a_broken_body_is_data() -> None:
    payload = b'{"specversion": '

    assert decode(None, payload, DEFAULTS).data == payload


# -- Nats-Msg-Id


def test_the_message_id_tells_every_source_and_id_apart() -> None:
    """(source, id) is the identity; no pair may look like another."""
    pairs = [("a", "b:c"), ("a:b", "c"), ("a:b:c", ""), ("1", "1:1"), ("1:1", "1"), ("a%3A", "b")]
    ids = {msg_id(event(source=source, id=id_)) for source, id_ in pairs}

    assert len(ids) == len(pairs)


def test_the_message_id_depends_on_nothing_but_source_and_id() -> None:
    assert msg_id(event()) == msg_id(event(data=b"x", key="k", type="t")) == "5:/shop:1"


@pytest.mark.parametrize("id_", ["a b", "ü", "a\r\nb", "x" * 5000, "ü" * 1000])
def test_the_message_id_fits_a_header(id_: str) -> None:
    made = msg_id(event(id=id_))

    assert len(made) <= MAX_MSG_ID_LENGTH
    assert made.isascii()
    assert made.isprintable()
    assert " " not in made


def test_long_message_ids_still_differ() -> None:
    assert msg_id(event(id="x" * 300)) != msg_id(event(id="x" * 301))
