"""What makes an event: defaults, and the rules of attributes and headers."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from sidecar.errors import InvalidEvent
from sidecar.event import Event
from sidecar.wire.attributes import (
    MAX_ATTRIBUTE_BYTES,
    MAX_HEADER_BYTES,
    header_text,
    new_id,
    percent_decode,
    percent_encode,
)
from sidecar.wire.cloudevents import Defaults, make_event
from sidecar.wire.timestamps import MAX_TIME_NS, MIN_TIME_NS, now_ns


def event(**changes: Any) -> Event:
    attributes: dict[str, Any] = {
        "id": "1",
        "source": "/shop",
        "type": "orders.created",
        "time_ns": 0,
        "data": b"{}",
    }
    return make_event(**attributes | changes)


def problem(**changes: Any) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        event(**changes)
    str(caught.value).encode()  # messages travel: a lone surrogate would break the answer
    return caught.value


# -- defaults


def test_defaults_fill_in_only_what_is_absent() -> None:
    defaults = Defaults(source="/d", type="d", content_type="text/plain", id="d", time_ns=7)

    assert event(defaults=defaults, content_type="a/b") == event(content_type="a/b")
    assert make_event(
        id="", source="", type="", time_ns=None, data=b"x", defaults=defaults
    ) == Event("d", "/d", "d", 7, b"x", content_type="text/plain")


def test_no_data_has_no_content_type_by_default() -> None:
    defaults = Defaults(source="/d", type="d", content_type="text/plain")

    assert not event(data=None, defaults=defaults).content_type


def test_an_id_and_a_time_are_made_where_nobody_gives_them() -> None:
    before = now_ns()
    made = event(id="", time_ns=None)

    assert UUID(made.id).version == 4
    assert before <= made.time_ns <= now_ns()


def test_new_ids_are_random_uuids_of_32_digits() -> None:
    ids = [new_id() for _ in range(200)]

    assert len(set(ids)) == 200
    assert all(UUID(made).hex == made and UUID(made).version == 4 for made in ids)
    assert {UUID(made).variant for made in ids} == {"specified in RFC 4122"}


@pytest.mark.parametrize("name", ["source", "type"])
def test_without_a_source_or_a_type_it_is_no_event(name: str) -> None:
    assert problem(**{name: ""}).metadata["field"] == name


# -- strings

FORBIDDEN = ["\x00", "\n", "\r", "\x1f", "\x7f", "\x85", "\x9f", "\ud800", "\udfff"]
NONCHARACTERS = ["\ufdd0", "\ufdef", "\ufffe", "\uffff", "\U0001fffe", "\U0010ffff"]
FIELDS = {
    "id": "id",
    "source": "source",
    "type": "type",
    "key": "partitionkey",
    "subject": "subject",
    "schema": "dataschema",
}


@pytest.mark.parametrize("bad", FORBIDDEN + NONCHARACTERS)
@pytest.mark.parametrize("name", FIELDS)
def test_what_cloudevents_forbids_in_strings_is_refused(name: str, bad: str) -> None:
    """CloudEvents 1.0, Type System: no control characters, surrogates and noncharacters."""
    assert problem(**{name: f"a{bad}b"}).metadata["field"] == FIELDS[name]


@pytest.mark.parametrize("good", ["é", "日本", "🎉", "\u200d", "\ue000", "\ufffd", "\u0378"])
@pytest.mark.parametrize("name", FIELDS)
def test_other_unicode_is_taken_as_it_is(name: str, good: str) -> None:
    """Also joiners, private use, and what Unicode has not assigned yet."""
    assert getattr(event(**{name: f"a:{good}"}), name) == f"a:{good}"


@pytest.mark.parametrize("name", ["id", "type", "key", "subject"])
def test_spaces_are_text(name: str) -> None:
    assert getattr(event(**{name: " a b "}), name) == " a b "


@pytest.mark.parametrize("space", [" ", "\u00a0", "\u2003"])
@pytest.mark.parametrize(("name", "field"), [("source", "source"), ("schema", "dataschema")])
def test_uris_have_no_spaces(name: str, field: str, space: str) -> None:
    assert problem(**{name: f"/a{space}b"}).metadata["field"] == field


@pytest.mark.parametrize("char", ["a", "é", "🎉"])
@pytest.mark.parametrize("name", FIELDS)
def test_an_attribute_is_bounded_in_bytes(name: str, char: str) -> None:
    longest = char * (MAX_ATTRIBUTE_BYTES // len(char.encode()))

    assert getattr(event(**{name: longest}), name) == longest
    assert problem(**{name: longest + "a"}).metadata["field"] == FIELDS[name]


def test_the_bound_is_of_each_attribute_not_of_their_sum() -> None:
    long = "a" * MAX_ATTRIBUTE_BYTES

    assert event(id=long, key=long, subject=long).subject == long


@pytest.mark.parametrize("time_ns", [MIN_TIME_NS - 1, MAX_TIME_NS + 1])
def test_a_time_that_has_no_text_is_refused(time_ns: int) -> None:
    assert problem(time_ns=time_ns).metadata["field"] == "time"


@pytest.mark.parametrize("time_ns", [MIN_TIME_NS, MAX_TIME_NS])
def test_times_reach_from_the_year_1_to_9999(time_ns: int) -> None:
    assert event(time_ns=time_ns).time_ns == time_ns


@pytest.mark.parametrize(
    "bad",
    [
        "text/plain\r\nx: y",
        "text/plän",
        "a" * (MAX_ATTRIBUTE_BYTES + 1),
        "application/cloudevents+json",
        " Application/CloudEvents",
    ],
)
def test_a_content_type_that_a_header_cannot_hold_is_refused(bad: str) -> None:
    """Also CloudEvents' own, which would turn the data into the event."""
    assert problem(content_type=bad).metadata["field"] == "datacontenttype"


def test_a_content_type_has_no_spaces_around_it() -> None:
    assert event(content_type=" text/plain ").content_type == "text/plain"


# -- extensions


@pytest.mark.parametrize(
    "name",
    ["", "A", "a-b", "a_b", "ä", "a" * 65, "\ud800", "id", "specversion", "data", "data_base64"],
)
def test_a_bad_name_is_no_extension(name: str) -> None:
    assert problem(extensions={name: "x"}).metadata["field"] == "extensions"


def test_an_extension_keeps_the_rules_of_strings() -> None:
    assert problem(extensions={"tenant": "a\nb"}).metadata["field"] == "tenant"
    assert event(extensions={"tenant": "", "a" * 64: "é"}).extensions == {
        "tenant": "",
        "a" * 64: "é",
    }


def test_partitionkey_is_the_key() -> None:
    """In whatever form it comes, an event has one key, and no extension beside it."""
    made = event(extensions={"partitionkey": "k", "tenant": "a"})

    assert (made.key, made.extensions) == ("k", {"tenant": "a"})
    assert event(key="k", extensions={"partitionkey": "k"}) == event(key="k")
    assert problem(key="k", extensions={"partitionkey": "other"}).metadata == {
        "field": "partitionkey"
    }


def test_an_event_does_not_change_with_the_callers_dict() -> None:
    extensions, headers = {"tenant": "a"}, {"x": "y"}
    made = event(extensions=extensions, headers=headers)
    extensions["tenant"] = headers["x"] = "changed"

    assert made == event(extensions={"tenant": "a"}, headers={"x": "y"})


# -- headers


@pytest.mark.parametrize(
    "name",
    ["", "X", "a b", "a_b", "a:b", "a\r\nb", "ce-id", "ce-", "nats-msg-id", "content-type", "é"],
)
def test_a_header_that_is_not_the_apps_to_set_is_refused(name: str) -> None:
    assert problem(headers={name: "x"}).metadata["field"] == "headers"


@pytest.mark.parametrize("value", ["a\r\nce-id: 2", "\n", "a\tb", "\x00", "\ud800", "\u2028"])
def test_a_header_value_is_one_printable_line(value: str) -> None:
    assert problem(headers={"x": value}).metadata["field"] == "headers"


def test_a_header_value_is_bounded() -> None:
    assert event(headers={"baggage": "a" * MAX_HEADER_BYTES}).headers
    assert problem(headers={"baggage": "a" * (MAX_HEADER_BYTES + 1)}).metadata["field"] == "headers"


def test_spaces_around_a_header_value_are_not_part_of_it() -> None:
    assert event(headers={"x": " a b "}).headers == {"x": "a b"}


def test_an_error_never_quotes_an_attributes_value() -> None:
    """Values are the app's data; messages end up in logs."""
    for name in (*FIELDS, "content_type"):
        assert "hunter2" not in str(problem(**{name: "hunter2\n"}))
    assert "hunter2" not in str(problem(extensions={"tenant": "hunter2\n"}))
    assert "hunter2" not in str(problem(headers={"x": "hunter2\n"}))


# -- percent-encoding


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("Euro € 😀", "Euro%20%E2%82%AC%20%F0%9F%98%80"),
        ("100%", "100%25"),
        ('say "hi"', "say%20%22hi%22"),
        ("!#$&'()*+,/:;<=>?@[\\]^_`{|}~-.", "!#$&'()*+,/:;<=>?@[\\]^_`{|}~-."),
        ("\u007f\u0080", "%7F%C2%80"),
        ("ü", "%C3%BC"),
        ("", ""),
    ],
)
def test_space_quote_percent_and_what_is_not_printable_ascii_is_encoded(
    text: str, encoded: str
) -> None:
    """HTTP binding 1.0.2, 3.1.3.2; the first row is its example."""
    assert percent_encode(text) == encoded
    assert percent_decode("subject", encoded) == text


@pytest.mark.parametrize(
    ("received", "meant"),
    [
        ("%c3%bc", "ü"),
        ("%C3%bC", "ü"),
        ("%41b", "Ab"),
        ("%2541", "%41"),
        ("%252525", "%2525"),
        ('"quoted"', "quoted"),
        ('"a \\"b\\" \\\\ c"', 'a "b" \\ c'),
        ('"%20"', " "),
        ('"\\%41"', "A"),
        ('"open', '"open'),
        ('"', '"'),
        ('""', ""),
        ("100%", "100%"),
        ("%zz%4", "%zz%4"),
        ("ü%C3%BC", "üü"),
        ("a%20%E2%82%ACb", "a €b"),
    ],
)
def test_decoding_is_lenient_and_happens_once(received: str, meant: str) -> None:
    """Quotes first, then one round; needless escapes and small letters are fine."""
    assert percent_decode("subject", received) == meant


@pytest.mark.parametrize(
    "received", ["%C0%A0", "%C0%80", "%E2%82", "%ED%A0%80", "%FF", "%F4%90%80%80", "%E2%82x%AC"]
)
def test_escapes_that_are_not_utf_8_are_refused(received: str) -> None:
    """Overlong forms and surrogates are not UTF-8: HTTP binding 1.0.2, 3.1.3.2."""
    with pytest.raises(InvalidEvent) as caught:
        percent_decode("subject", received)

    assert caught.value.metadata["field"] == "subject"


def test_a_header_text_never_ends_its_line() -> None:
    assert header_text("a%20b é") == "a%20b é"
    assert header_text("a\r\nb\x00") == "a%0D%0Ab%00"
    assert header_text("\ud800") == "%3F"
    assert header_text("é\n", ascii_only=True) == "%C3%A9%0A"
