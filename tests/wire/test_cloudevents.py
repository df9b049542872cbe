"""The JSON format and the HTTP binding."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from sidecar.errors import InvalidEvent, MalformedBody, UnsupportedMediaType
from sidecar.event import Event
from sidecar.wire.cloudevents import (
    Defaults,
    from_http,
    from_json,
    from_json_batch,
    to_http,
    to_json,
)
from sidecar.wire.timestamps import now_ns, parse_rfc3339

DEFAULTS = Defaults(source="/app", type="orders", content_type="text/plain")
NOON = parse_rfc3339("2026-01-31T12:00:00Z")
CORE = {"specversion": "1.0", "id": "1", "source": "/shop", "type": "t"}
AT_NOON = CORE | {"time": "2026-01-31T12:00:00Z"}


def event(**changes: Any) -> Event:
    attributes: dict[str, Any] = {"id": "1", "source": "/shop", "type": "t", "time_ns": NOON}
    return Event(**attributes | changes)


def text(**members: Any) -> bytes:
    return json.dumps(AT_NOON | members).encode()


def problem(data: bytes) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        from_json(data)
    str(caught.value).encode()
    return caught.value


# -- JSON, in


def test_the_specs_example_is_read() -> None:
    """JSON format 1.0.2, 3.2, "Example with application/json-formatted data" (its first)."""
    read = from_json(
        b"""{
            "specversion" : "1.0",
            "type" : "com.example.someevent",
            "source" : "/mycontext",
            "subject": null,
            "id" : "C234-1234-1234",
            "time" : "2018-04-05T17:31:00Z",
            "comexampleextension1" : "value",
            "comexampleothervalue" : 5,
            "datacontenttype" : "application/json",
            "data" : {
                "appinfoA" : "abc",
                "appinfoB" : 123,
                "appinfoC" : true
            }
        }"""
    )

    assert (read.id, read.source, read.type) == (
        "C234-1234-1234",
        "/mycontext",
        "com.example.someevent",
    )
    assert read.time_ns == parse_rfc3339("2018-04-05T17:31:00Z")
    assert read.subject == ""
    assert read.extensions == {"comexampleextension1": "value", "comexampleothervalue": "5"}
    assert json.loads(read.data or b"") == {"appinfoA": "abc", "appinfoB": 123, "appinfoC": True}


@pytest.mark.parametrize(
    ("members", "data", "content_type"),
    [
        ({}, None, ""),
        ({"datacontenttype": "a/b"}, None, "a/b"),
        ({"data": {"a": [1, 2.50]}}, b'{"a": [1, 2.5]}', "application/json"),
        ({"data": "x"}, b'"x"', "application/json"),
        ({"data": None}, b"null", "application/json"),
        ({"data": "é", "datacontenttype": "a/b+json"}, b'"\\u00e9"', "a/b+json"),
        ({"data": "é", "datacontenttype": "text/plain"}, "é".encode(), "text/plain"),
        ({"data": "<a/>", "datacontenttype": "application/xml"}, b"<a/>", "application/xml"),
        ({"data": {"a": 1}, "datacontenttype": "text/plain"}, b'{"a": 1}', "text/plain"),
        ({"data_base64": "/w=="}, b"\xff", ""),
        ({"data_base64": ""}, b"", ""),
        ({"data_base64": "e30=", "datacontenttype": "a/json"}, b"{}", "a/json"),
    ],
)
def test_data_is_what_its_content_type_says(
    members: dict[str, Any], data: bytes | None, content_type: str
) -> None:
    """JSON format 1.0.2, 3.1: a JSON value unless told otherwise, text from strings, or Base64."""
    assert from_json(text(**members)) == event(data=data, content_type=content_type)


@pytest.mark.parametrize(
    ("value", "canonical"),
    [("x", "x"), ("", ""), (5, "5"), (-7, "-7"), (True, "true"), (False, "false"), (1.5, "1.5")],
)
def test_an_extension_has_its_canonical_text(value: object, canonical: str) -> None:
    assert from_json(text(tenant=value)).extensions == {"tenant": canonical}


def test_null_is_absent() -> None:
    members = {"tenant": None, "subject": None, "partitionkey": None, "datacontenttype": None}

    assert from_json(text(**members)) == event()


def test_partitionkey_is_the_key() -> None:
    assert from_json(text(partitionkey="k", tenant="a")) == event(
        key="k", extensions={"tenant": "a"}
    )


def test_the_last_of_two_members_counts() -> None:
    assert from_json(text().replace(b'"1.0"', b'"1.0", "id": "0"')).id == "1"


@pytest.mark.parametrize("missing", CORE)
def test_what_cloudevents_requires_is_required(missing: str) -> None:
    for members in ({}, {missing: None}, {missing: ""}):
        rest = {name: value for name, value in CORE.items() if name != missing}

        assert problem(json.dumps(rest | members).encode()).metadata["field"] == missing


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"specversion": "0.3"}, "specversion"),
        ({"specversion": 1.0}, "specversion"),
        ({"id": 5}, "id"),
        ({"source": ["/shop"]}, "source"),
        ({"type": {}}, "type"),
        ({"time": "noon"}, "time"),
        ({"subject": True}, "subject"),
        ({"subject": "a\nb"}, "subject"),
        ({"dataschema": "a b"}, "dataschema"),
        ({"Tenant": "a"}, "extensions"),
        ({"my_ext": "a"}, "extensions"),
        ({"": "a"}, "extensions"),
        ({"tenant": []}, "extensions"),
        ({"tenant": "\x00"}, "tenant"),
        ({"data": 1, "data_base64": "MQ=="}, "data"),
        ({"data_base64": "!"}, "data_base64"),
        ({"data_base64": 5}, "data_base64"),
        ({"datacontenttype": "application/cloudevents+json"}, "datacontenttype"),
    ],
)
def test_a_broken_member_is_named(members: dict[str, Any], field: str) -> None:
    assert problem(text(**members)).metadata["field"] == field


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        text(data="x").replace(b'"x"', b'"\xff"'),
        text(data="x").replace(b'"x"', b'{"\xc0\xa0": 1}'),
        text(data="x").replace(b'"x"', b"NaN"),
        text(data="x").replace(b'"x"', b"[" * 100_000),
        text(data="x").replace(b'"x"', b"[" * 100_000 + b"]" * 100_000),
        text(tenant=1).replace(b'"tenant": 1', b'"tenant": 1e999'),
        text(id="x").replace(b'"x"', b'"\\ud800"'),
        text(data="x", datacontenttype="text/plain").replace(b'"x"', b'"\\ud800"'),
    ],
)
def test_what_is_not_json_or_not_utf_8_is_an_invalid_event(data: bytes) -> None:
    assert problem(data).code == "EVENT_INVALID"


def test_a_bad_event_of_a_batch_fails_alone() -> None:
    batch = b"[%b, 5, {}, %b]" % (text(), text(id="2"))
    first, number, nothing, last = from_json_batch(batch)

    assert (first, last) == (event(), event(id="2"))
    assert isinstance(number, InvalidEvent)
    assert isinstance(nothing, InvalidEvent)


def test_an_empty_batch_is_one() -> None:
    assert from_json_batch(b" [] ") == []


@pytest.mark.parametrize("data", [b"", b"{}", b"[", b"[1,]", b"[" * 100_000, b"null"])
def test_what_is_no_array_is_no_batch(data: bytes) -> None:
    with pytest.raises(MalformedBody):
        from_json_batch(data)


# -- JSON, out


@pytest.mark.parametrize(
    ("data", "content_type", "members"),
    [
        (None, "application/json", {}),
        (b'{"a": 1}', "application/json", {"data": {"a": 1}}),
        (b" [1]\n", "text/json; charset=utf-8", {"data": [1]}),
        (b'"x"', "application/vnd.a+JSON", {"data": "x"}),
        (b"null", "application/json", {"data": None}),
        (b"{", "application/json", {"data_base64": "ew=="}),
        (b"", "application/json", {"data_base64": ""}),
        (b'"\xff"', "application/json", {"data_base64": "Iv8i"}),
        (b"[" * 5000, "application/json", {"data_base64": base64.b64encode(b"[" * 5000).decode()}),
        (b"{}{}", "application/json", {"data_base64": "e317fQ=="}),
        ("é\0".encode(), "text/plain", {"data": "é\0"}),
        (b"", "text/plain", {"data": ""}),
        (b"<a/>", "image/svg+xml", {"data": "<a/>"}),
        (b"\xff", "text/plain", {"data_base64": "/w=="}),
        (b"a", "text/plain; charset=iso-8859-1", {"data_base64": "YQ=="}),
        (b"a", 'text/plain; charset="UTF-8"', {"data": "a"}),
        (b"a", "application/octet-stream", {"data_base64": "YQ=="}),
        (b"{}", "", {"data_base64": "e30="}),
    ],
)
def test_data_is_shown_as_readable_as_it_safely_can_be(
    data: bytes | None, content_type: str, members: dict[str, Any]
) -> None:
    """JSON format 1.0.2, 3.1: JSON as a value, never as a string of JSON; bytes as Base64."""
    shown = json.loads(to_json(event(data=data, content_type=content_type)))
    if content_type:
        members = members | {"datacontenttype": content_type}

    assert shown == AT_NOON | members


def test_every_attribute_is_a_member() -> None:
    shown = json.loads(
        to_json(event(key="k", subject="s", schema="d", extensions={"a": "1"}, headers={"x": "y"}))
    )

    assert shown == AT_NOON | {"partitionkey": "k", "subject": "s", "dataschema": "d", "a": "1"}


# -- HTTP, in

Pairs = list[tuple[bytes, bytes]]
BINARY: Pairs = [
    (b"ce-specversion", b"1.0"),
    (b"ce-id", b"1"),
    (b"ce-source", b"/shop"),
    (b"ce-type", b"t"),
    (b"ce-time", b"2026-01-31T12:00:00Z"),
]
STRUCTURED: Pairs = [(b"content-type", b"application/cloudevents+json")]
BATCH: Pairs = [(b"content-type", b"application/cloudevents-batch+json; charset=utf-8")]
TRACE: Pairs = [(b"traceparent", b"00-1"), (b"baggage", b"a=%20")]


def http_problem(headers: Pairs, body: bytes = b"") -> InvalidEvent:
    [error] = from_http(headers, body, DEFAULTS)
    assert isinstance(error, InvalidEvent)
    return error


def test_binary_mode_is_read_from_headers() -> None:
    headers = [
        (b"host", b"x"),
        *BINARY,
        (b"content-type", b"a/b"),
        (b"ce-subject", b"%C3%BC 100%25"),
        (b"ce-dataschema", b"https://x/y"),
        (b"ce-partitionkey", b"k"),
        (b"ce-tenant", b'"a b"'),
        (b"authorization", b"secret"),
        *TRACE,
    ]

    assert from_http(headers, b"x", DEFAULTS) == [
        event(
            data=b"x",
            key="k",
            content_type="a/b",
            subject="ü 100%",
            schema="https://x/y",
            extensions={"tenant": "a b"},
            headers={"traceparent": "00-1", "baggage": "a=%20"},
        )
    ]


def test_any_iterable_of_headers_will_do() -> None:
    assert from_http(iter(BINARY), b"", DEFAULTS) == [event()]


@pytest.mark.parametrize("missing", range(4))
def test_one_required_header_makes_it_binary_and_needs_the_others(missing: int) -> None:
    """A forgotten ce- header must not turn an event into a plain body."""
    name = BINARY[missing][0]

    assert http_problem([pair for pair in BINARY if pair[0] != name]).metadata["field"] == (
        name.decode().removeprefix("ce-")
    )
    assert http_problem([BINARY[missing]]).code == "EVENT_INVALID"


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        (b"ce-specversion", b"1.1", "specversion"),
        (b"ce-time", b"noon", "time"),
        (b"ce-subject", b"%C0%A0", "subject"),
        (b"ce-subject", b"%0A", "subject"),
        (b"ce-subject", b"\xff", "subject"),
        (b"ce-my_ext", b"x", "extensions"),
        (b"ce-\xff", b"x", "extensions"),
        (b"ce-data", b"x", "extensions"),
        (b"content-type", b"a/\xff", "datacontenttype"),
    ],
)
def test_a_broken_header_is_named(name: bytes, value: bytes, field: str) -> None:
    assert http_problem([*BINARY, (name, value)]).metadata["field"] == field


def test_structured_mode_is_read_from_the_body() -> None:
    assert from_http([*STRUCTURED, *TRACE], text(), DEFAULTS) == [
        event(headers={"traceparent": "00-1", "baggage": "a=%20"})
    ]
    assert from_http([(b"content-type", b"Application/CloudEvents+Json ;x=y")], text(), DEFAULTS)


def test_a_batch_is_read_in_order_and_fails_one_by_one() -> None:
    first, second, third = from_http([*BATCH, TRACE[0]], b"[%b,{},%b]" % (text(), text()), DEFAULTS)

    assert first == third == event(headers={"traceparent": "00-1"})
    assert isinstance(second, InvalidEvent)


def test_defaults_are_not_for_what_claims_to_be_an_event() -> None:
    [error] = from_http(STRUCTURED, b'{"specversion":"1.0","id":"1","type":"t"}', DEFAULTS)

    assert isinstance(error, InvalidEvent)
    assert error.metadata["field"] == "source"


def test_a_plain_body_is_data_with_the_defaults() -> None:
    before = now_ns()
    [made] = from_http([(b"content-type", b"a/b"), (b"ce-tenant", b"x"), *TRACE], b"x", DEFAULTS)

    assert isinstance(made, Event)
    assert (made.source, made.type, made.data, made.content_type) == ("/app", "orders", b"x", "a/b")
    assert len(made.id) == 32
    assert before <= made.time_ns <= now_ns()
    assert made.headers == {"traceparent": "00-1", "baggage": "a=%20"}


def test_a_plain_body_without_a_content_type_has_the_default() -> None:
    [made] = from_http([], b"x", DEFAULTS)
    [empty] = from_http([], b"", DEFAULTS)

    assert isinstance(made, Event)
    assert made.content_type == "text/plain"
    assert isinstance(empty, Event)
    assert empty.data is None


def test_a_plain_body_without_a_default_type_is_refused() -> None:
    [error] = from_http([], b"x", Defaults(source="/app", type=""))

    assert isinstance(error, InvalidEvent)
    assert error.metadata["field"] == "type"


def test_trace_headers_that_come_twice_are_a_list() -> None:
    headers = [*BINARY, (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]

    assert from_http(headers, b"", DEFAULTS) == [event(headers={"tracestate": "a=1,b=2"})]


@pytest.mark.parametrize("value", [b"\xff", b"a\x00b", b"a" * 8193])
def test_a_bad_trace_does_not_cost_the_event(value: bytes) -> None:
    """W3C Trace Context: who cannot read it goes on without."""
    assert from_http([*BINARY, (b"baggage", value)], b"", DEFAULTS) == [event()]


@pytest.mark.parametrize(
    ("headers", "body"),
    [(STRUCTURED, b""), (STRUCTURED, b"[]"), (STRUCTURED, b"{"), (BATCH, b"{}"), (BATCH, b"[")],
)
def test_a_body_that_is_not_what_it_says_fails_the_call(headers: Pairs, body: bytes) -> None:
    with pytest.raises(MalformedBody, match="JSON"):
        from_http(headers, body, DEFAULTS)


@pytest.mark.parametrize(
    "media_type",
    [b"application/cloudevents+avro", b"application/cloudevents", b"application/cloudevents+xml"],
)
def test_an_unknown_event_format_is_refused_with_the_way_out(media_type: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match=r"application/cloudevents\+json"):
        from_http([(b"content-type", media_type)], b"{}", DEFAULTS)


# -- HTTP, out


def test_binary_mode_has_the_content_type_where_http_has_it() -> None:
    headers, body = to_http(
        event(
            data=b"x",
            key="k",
            content_type="a/b",
            subject="Euro €",
            extensions={"tenant": '"a"'},
            headers={"traceparent": "00-1", "sidecar-dead-letter-reason": "no\nfür ü"},
        )
    )

    assert body == b"x"
    assert headers == [
        ("ce-specversion", "1.0"),
        ("ce-id", "1"),
        ("ce-source", "/shop"),
        ("ce-type", "t"),
        ("ce-time", "2026-01-31T12:00:00Z"),
        ("content-type", "a/b"),
        ("ce-subject", "Euro%20%E2%82%AC"),
        ("ce-partitionkey", "k"),
        ("ce-tenant", "%22a%22"),
        ("traceparent", "00-1"),
        ("sidecar-dead-letter-reason", "no%0Af%C3%BCr %C3%BC"),
    ]


@pytest.mark.parametrize("name", ["content-length", "transfer-encoding", "host", "connection"])
def test_a_publisher_cannot_frame_the_push_request(name: str) -> None:
    headers, body = to_http(event(headers={name: "5"}))

    assert name not in dict(headers)
    assert body == b""
