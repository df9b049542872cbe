"""The Kafka binding, header by header."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.errors import InvalidEvent
from sidecar.event import Event
from sidecar.wire.cloudevents import Defaults
from sidecar.wire.kafka import decode, encode, key_bytes, key_text
from sidecar.wire.timestamps import parse_rfc3339

DEFAULTS = Defaults(
    source="/orders", type="orders", content_type="text/plain", id="orders:0:7", time_ns=7
)
NOON = parse_rfc3339("2026-01-31T12:00:00Z")

Headers = list[tuple[str, bytes | None]]

REQUIRED: Headers = [
    ("ce_specversion", b"1.0"),
    ("ce_id", b"1"),
    ("ce_source", b"/shop"),
    ("ce_type", b"orders.created"),
]
TIME: Headers = [("ce_time", b"2026-01-31T12:00:00Z")]
JSON: Headers = [("content-type", b"application/cloudevents+json; charset=UTF-8")]


def event(**changes: Any) -> Event:
    attributes: dict[str, Any] = {
        "id": "1",
        "source": "/shop",
        "type": "orders.created",
        "time_ns": NOON,
    }
    return Event(**attributes | changes)


def sent(made: Event, *, structured: bool = False) -> dict[str, bytes]:
    headers, _, _ = encode(made, structured=structured)
    values = {name: value.encode() if isinstance(value, str) else value for name, value in headers}
    assert len(values) == len(headers)
    return values


def read(
    headers: Headers | None = None, value: bytes | None = b"x", key: bytes | None = None
) -> Event:
    return decode(headers, value, key, DEFAULTS)


def problem(headers: Headers, value: bytes | None = b"x", key: bytes | None = None) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        decode(headers, value, key, DEFAULTS)
    str(caught.value).encode()
    return caught.value


# -- binary mode


def test_binary_mode_has_attributes_in_headers_and_nothing_is_percent_encoded() -> None:
    """Underscore, UTF-8, and datacontenttype as content-type."""
    made = event(
        data=b"<a/>",
        key="k 1",
        content_type="text/xml; charset=utf-8",
        subject="ü 100%",
        schema="https://x/y",
        extensions={"tenant": '"a"'},
        headers={"traceparent": "00-1"},
    )

    assert encode(made)[1:] == (b"<a/>", b"k 1")
    assert sent(made) == {
        "ce_specversion": b"1.0",
        "ce_id": b"1",
        "ce_source": b"/shop",
        "ce_type": b"orders.created",
        "ce_time": b"2026-01-31T12:00:00Z",
        "content-type": b"text/xml; charset=utf-8",
        "ce_subject": "ü 100%".encode(),
        "ce_dataschema": b"https://x/y",
        "ce_tenant": b'"a"',
        "traceparent": b"00-1",
    }


def test_the_binary_example_of_the_specification_is_read() -> None:
    """Kafka binding 1.0.2, section 3.2.5."""
    headers: Headers = [
        ("ce_specversion", b"1.0"),
        ("ce_type", b"com.example.someevent"),
        ("ce_source", b"/mycontext/subcontext"),
        ("ce_id", b"1234-1234-1234"),
        ("ce_time", b"2018-04-05T03:56:24Z"),
        ("content-type", b"application/avro"),
    ]

    assert read(headers, b"\x00avro", b"mykey") == Event(
        "1234-1234-1234",
        "/mycontext/subcontext",
        "com.example.someevent",
        parse_rfc3339("2018-04-05T03:56:24Z"),
        b"\x00avro",
        "mykey",
        "application/avro",
    )


def test_header_names_match_in_any_case_and_order() -> None:
    headers: Headers = [
        ("TraceParent", b"00-1"),
        ("CE_Tenant", b"A"),
        ("Content-Type", b" text/xml\t"),
        ("ce_TIME", b"2026-01-31t12:00:00z"),
        ("CE_TYPE", b"orders.created"),
        ("Ce_Source", b"/shop"),
        ("CE_ID", b"1"),
        ("ce_SpecVersion", b"1.0"),
    ]

    assert read(headers) == event(
        data=b"x",
        content_type="text/xml",
        extensions={"tenant": "A"},
        headers={"traceparent": "00-1"},
    )


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ["X-Request", "__TypeId__", "x", "not a token", "ce-id", "é"])
def test_other_headers_do_not_disturb_an_event(name: str, place: str) -> None:
    more: Headers = [(name, b"y")]
    headers = more + REQUIRED + TIME if place == "first" else REQUIRED + TIME + more
    is_token = name.isascii() and " " not in name and name != "ce-id"

    assert read(headers) == event(data=b"x", headers={name.lower(): "y"} if is_token else {})


def test_all_attributes_are_read_as_utf_8_and_never_percent_decoded() -> None:
    more: Headers = [
        ("ce_subject", "ü%41".encode()),
        ("ce_dataschema", b"/%C3"),
        ("ce_tenant", "€".encode()),
    ]

    assert read(REQUIRED + TIME + more) == event(
        data=b"x", subject="ü%41", schema="/%C3", extensions={"tenant": "€"}
    )
    assert read(REQUIRED + TIME + more[:1]).subject == "ü%41"


def test_a_missing_time_is_that_of_the_record() -> None:
    assert read(REQUIRED).time_ns == 7
    assert read([*REQUIRED, ("ce_time", b"")]).time_ns == 7
    assert read([*REQUIRED, ("ce_time", None)]).time_ns == 7


def test_of_an_attribute_that_comes_twice_the_last_counts() -> None:
    for again in ("ce_id", "CE_ID"):
        assert read([*REQUIRED, *TIME, (again, b"2")]).id == "2"
    assert read([("content-type", b"a/b"), *REQUIRED, ("Content-Type", b"c/d")]).content_type == (
        "c/d"
    )


def test_a_header_that_comes_twice_is_a_list() -> None:
    twice: Headers = [("tracestate", b"a=1"), ("TraceState", b"b=2")]

    assert read(REQUIRED + TIME + twice).headers == {"tracestate": "a=1,b=2"}
    assert read(REQUIRED + TIME + twice[:1] * 2).headers == {"tracestate": "a=1,a=1"}
    assert read(twice).headers == {"tracestate": "a=1,b=2"}


def test_an_attribute_as_over_nats_is_understood() -> None:
    headers: Headers = [*REQUIRED, *TIME, ("ce_datacontenttype", b"text/xml")]

    assert read(headers).content_type == "text/xml"
    assert read([*headers, ("content-type", b"a/b")]).content_type == "a/b"


@pytest.mark.parametrize("missing", range(4))
def test_some_ce_headers_without_all_required_is_no_event(missing: int) -> None:
    headers = [header for number, header in enumerate(REQUIRED) if number != missing]
    name = REQUIRED[missing][0]

    for nothing in ([], [b""], [None]):
        more = [(name, value) for value in nothing]
        assert problem([*headers, *TIME, *more]).metadata["field"] == name.removeprefix("ce_")


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("ce_specversion", b"0.3", "specversion"),
        ("ce_time", b"yesterday", "time"),
        ("ce_time", b"\xff", "time"),
        ("ce_subject", b"\xc0\xa0", "subject"),
        ("ce_subject", b"a\r\nb", "subject"),
        ("ce_subject", b"a" * 5000, "subject"),
        ("ce_id", b"\x00", "id"),
        ("ce_id", "\uffff".encode(), "id"),
        ("ce_id", b"a" * 5000, "id"),
        ("ce_source", b"/\xffshop", "source"),
        ("ce_source", b"a b", "source"),
        ("ce_type", b"a" * 5000, "type"),
        ("ce_tenant", b"\xff", "tenant"),
        ("ce_my-ext", b"x", "extensions"),
        ("ce_data", b"x", "extensions"),
        ("ce_", b"x", "extensions"),
        ("ce_datacontenttype", b"application/cloudevents+json", "datacontenttype"),
        ("content-type", b"a" * 5000, "datacontenttype"),
    ],
)
def test_a_broken_attribute_is_named(name: str, value: bytes, field: str) -> None:
    others = [header for header in REQUIRED + TIME if header[0] != name]

    assert problem([*others, (name, value)]).metadata["field"] == field


def test_a_content_type_that_cannot_be_one_says_nothing() -> None:
    for value in (b"\xff", "ü".encode(), b"a\x00b", b"", None):
        assert read([*REQUIRED, *TIME, ("content-type", value)]) == event(data=b"x")


# -- tombstones


def test_an_event_without_data_is_a_tombstone() -> None:
    assert encode(event(data=None, key="k"))[1:] == (None, b"k")
    assert encode(event(data=b"", key="k"))[1:] == (b"", b"k")


def test_a_tombstone_is_an_event_without_data() -> None:
    for headers in (None, [], REQUIRED + TIME, [*REQUIRED, *TIME, ("content-type", b"a/b")]):
        assert read(headers, None, b"k").data is None
        assert read(headers, b"", b"k").data == b""


def test_a_structured_event_without_data_is_no_tombstone() -> None:
    _, value, key = encode(event(data=None, key="k"), structured=True)

    assert value is not None
    assert decode(JSON, value, key, DEFAULTS) == event(data=None, key="k")


# -- keys


@pytest.mark.parametrize("structured", [False, True])
def test_a_key_is_the_record_key_and_no_attribute(structured: bool) -> None:  # noqa: FBT001
    """The binding: a key from out of band must not be added to the event."""
    made = event(key="ü 1", data=b"x")
    _, value, key = encode(made, structured=structured)

    assert key == "ü 1".encode()
    assert "ce_partitionkey" not in sent(made, structured=structured)
    assert b"partitionkey" not in (value or b"")


def test_an_event_without_a_key_has_no_record_key() -> None:
    assert encode(event())[2] is None
    assert encode(event(), structured=True)[2] is None
    assert read(REQUIRED + TIME) == event(data=b"x")


@pytest.mark.parametrize("value", [b"k", b"other", b"\xff", b"\x00", b"a" * 5000, b"", None])
def test_a_record_key_wins_over_partitionkey(value: bytes | None) -> None:
    """Whatever the extension says, it is neither a reason to refuse nor to order otherwise."""
    headers: Headers = [*REQUIRED, *TIME, ("ce_partitionkey", value)]

    assert read(headers, key=b"k") == event(data=b"x", key="k")


@pytest.mark.parametrize("member", [b'"k"', b'"other"', b'"\\u0000"', b"[]", b"null"])
def test_a_record_key_wins_over_partitionkey_in_json(member: bytes) -> None:
    value = (
        b'{"specversion":"1.0","id":"1","source":"/shop","type":"orders.created",'
        b'"time":"2026-01-31T12:00:00Z","partitionkey":%b}' % member
    )

    assert read(JSON, value, b"k") == event(key="k")


def test_partitionkey_is_the_key_where_the_record_has_none() -> None:
    headers: Headers = [*REQUIRED, *TIME, ("ce_partitionkey", b"k")]

    assert read(headers) == event(data=b"x", key="k")
    assert problem([*REQUIRED, *TIME, ("ce_partitionkey", b"\xff")]).metadata["field"] == (
        "partitionkey"
    )


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"customer-17", "customer-17"),
        ("ü 😀".encode(), "ü 😀"),
        (b"base64", "base64"),
        (b"base64:not", "base64:not"),
        (b"base64:aGk=", "base64:aGk="),  # of "hi", which needs no Base64
        (b"", "base64:"),
        (b"\xff", "base64:/w=="),
        (b"\x00\x00\x00\x05", "base64:AAAABQ=="),
        ("\ufdd0".encode(), "base64:77eQ"),
        (b"a\nb", "base64:YQpi"),
        (b"base64:", "base64:YmFzZTY0Og=="),
        (b"base64:/w==", "base64:YmFzZTY0Oi93PT0="),
    ],
)
def test_a_key_of_any_bytes_has_a_text_of_its_own(raw: bytes, text: str) -> None:
    """Integers and UUIDs are usual; what is published again has to keep its partition."""
    assert key_text(raw) == text
    assert key_bytes(text) == raw
    for headers in (None, REQUIRED + TIME):
        made = read(headers, key=raw)

        assert made.key == text
        assert encode(made)[2] == encode(made, structured=True)[2] == raw


def test_a_key_that_is_too_long_is_refused() -> None:
    """It is an attribute in all other bindings; its limit holds for what stands for it."""
    for headers in ([], REQUIRED, REQUIRED + TIME):
        assert problem(headers, key=b"k" * 4097).metadata["field"] == "partitionkey"
        assert problem(headers, key=b"\xff" * 4000).metadata["field"] == "partitionkey"
        assert read(headers, key=b"k" * 4096).key == "k" * 4096


# -- headers


@pytest.mark.parametrize(
    "name", ["a b", "a:b", "a\r\nb", "", "ce_id", "ce-id", "nats-msg-id", "content-type", "é", "X"]
)
def test_a_header_that_could_mean_something_else_is_left_out(name: str) -> None:
    made = event(headers={name: "x", "fine": "y"})

    assert sent(made) == {**dict(REQUIRED), **dict(TIME), "fine": b"y"}
    assert sent(made, structured=True) == {**dict(JSON), "fine": b"y"}


@pytest.mark.parametrize("name", ["a b", "a:b", "", "CE-Id", "Nats-Msg-Id", "é", "\x00"])
def test_a_foreign_header_that_could_mean_something_else_is_left_out(name: str) -> None:
    """A push to the app would say it was an attribute."""
    for headers in ([], REQUIRED + TIME):
        assert read([*headers, (name, b"x"), ("Fine", b"y")]).headers == {"fine": "y"}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a=%20%C0", "a=%20%C0"),
        ("ü".encode(), "ü"),
        (b" a ", "a"),
        (b"", ""),
        (None, ""),
        (b"\x00\x00\x00\x05", "base64:AAAABQ=="),
        (b"\xff ", "base64:/yA="),
        (b"a\r\nb", "base64:YQ0KYg=="),
        (b"base64:", "base64:"),
        (b"base64:/w==", "base64:YmFzZTY0Oi93PT0="),
    ],
)
def test_a_foreign_header_is_printable_text_and_can_be_sent_again(
    raw: bytes | None, text: str
) -> None:
    """Some clients write integers there, and what is published again should keep them."""
    for headers in ([], REQUIRED + TIME):
        made = read([*headers, ("x", raw)])

        assert made.headers == {"x": text}
        assert sent(made)["x"] == (raw or b"").strip(b" " if text == "a" else b"")


def test_a_header_that_was_never_checked_can_be_sent() -> None:
    """As an app's reason in a dead letter."""
    for reason in ("a\x00b\ud800", "base64:\ud800"):
        assert decode(*encodable(event(headers={"reason": reason})), DEFAULTS).headers["reason"]


def encodable(made: Event) -> tuple[Headers, bytes | None, bytes | None]:
    """The record, once it has been through a broker."""
    _, value, key = encode(made)
    return list(sent(made).items()), value, key


# -- structured mode


def test_structured_mode_is_json_with_a_content_type() -> None:
    made = event(data=b"[1]", content_type="a/json", key="k", headers={"traceparent": "00-1"})
    _, value, key = encode(made, structured=True)

    assert sent(made, structured=True) == {**dict(JSON), "traceparent": b"00-1"}
    assert key == b"k"
    assert value == (
        b'{"specversion":"1.0","id":"1","source":"/shop","type":"orders.created",'
        b'"time":"2026-01-31T12:00:00Z","datacontenttype":"a/json","data":[1]}'
    )


@pytest.mark.parametrize(
    "headers",
    [
        JSON,
        [("Content-Type", b" Application/CloudEvents+JSON")],
        [*JSON, ("ce_id", b"other")],
        [*REQUIRED, *TIME, *JSON],
        [("ce_id", b"other"), ("x", b"y"), *JSON],
    ],
)
def test_structured_mode_is_known_by_the_content_type_alone(headers: Headers) -> None:
    """The binding lets senders repeat attributes as headers; the JSON is what counts."""
    made = event(data=b"{}", content_type="application/json")
    _, value, _ = encode(made, structured=True)

    assert read(headers, value) == event(
        data=b"{}",
        content_type="application/json",
        headers={"x": "y"} if ("x", b"y") in headers else {},
    )


def test_the_structured_example_of_the_specification_is_read() -> None:
    """Kafka binding 1.0.2, section 3.3.4, with some XML as its data."""
    value = (
        b'{"specversion" : "1.0", "type" : "com.example.someevent", '
        b'"source" : "/mycontext/subcontext", "id" : "1234-1234-1234", '
        b'"time" : "2018-04-05T03:56:24Z", "datacontenttype" : "application/xml", '
        b'"data" : "<a/>"}'
    )
    made = read([("content-type", b"application/cloudevents+json; charset=UTF-8")], value, b"mykey")

    assert (made.type, made.data, made.key) == ("com.example.someevent", b"<a/>", "mykey")


def test_a_structured_event_without_a_time_has_the_records() -> None:
    value = b'{"specversion":"1.0","id":"1","source":"/shop","type":"t"}'

    assert read(JSON, value).time_ns == 7


@pytest.mark.parametrize(
    ("content_type", "value"),
    [
        (b"application/cloudevents+json", None),
        (b"application/cloudevents+json", b""),
        (b"application/cloudevents+json", b"{"),
        (b"application/cloudevents+json", b"[]"),
        (b"application/cloudevents+json", b'{"specversion":"1.0"}'),
        (b"application/cloudevents+json", b'{"specversion":"\xff"}'),
        (b"application/cloudevents+avro", b"{}"),
        (b"application/cloudevents-batch+json", b"[]"),
    ],
)
def test_what_claims_to_be_structured_and_is_not_is_refused(
    content_type: bytes, value: bytes | None
) -> None:
    for more in ([], REQUIRED + TIME):
        assert problem([("content-type", content_type), *more], value).code == "EVENT_INVALID"


# -- plain records


@pytest.mark.parametrize("headers", [None, [], [("X", b"y")], [("X", b"y"), ("ce-id", b"z")]])
@pytest.mark.parametrize("value", [b"hello", b"{}", b"\xff", b"", b'{"specversion":"1.0"}', None])
def test_a_plain_record_becomes_an_event_by_the_defaults(
    headers: Headers | None, value: bytes | None
) -> None:
    assert read(headers, value, b"k") == Event(
        "orders:0:7",
        "/orders",
        "orders",
        7,
        value,
        "k",
        "" if value is None else "text/plain",
        headers={"x": "y"} if headers else {},
    )


def test_a_plain_record_keeps_its_content_type() -> None:
    assert read([("Content-Type", b"a/b")]).content_type == "a/b"
    assert read([("content-type", b"a/b")], None).content_type == "a/b"
    assert read([("content-type", b"\xff")]).content_type == "text/plain"
