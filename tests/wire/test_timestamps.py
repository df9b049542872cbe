"""Times as text, and back."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.wire.timestamps import MAX_TIME_NS, MIN_TIME_NS, format_rfc3339, now_ns, parse_rfc3339

NOON = int(datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()) * 10**9


@given(st.integers(MIN_TIME_NS, MAX_TIME_NS))
def test_every_nanosecond_of_the_years_1_to_9999_survives(time_ns: int) -> None:
    assert parse_rfc3339(format_rfc3339(time_ns)) == time_ns


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (NOON, "2026-01-31T12:00:00Z"),
        (NOON + 500_000_000, "2026-01-31T12:00:00.5Z"),
        (NOON + 1, "2026-01-31T12:00:00.000000001Z"),
        (NOON - 1, "2026-01-31T11:59:59.999999999Z"),
        (0, "1970-01-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (MIN_TIME_NS, "0001-01-01T00:00:00Z"),
        (MAX_TIME_NS, "9999-12-31T23:59:59.999999999Z"),
    ],
)
def test_the_fraction_is_as_short_as_it_can_be(time_ns: int, text: str) -> None:
    assert format_rfc3339(time_ns) == text


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-31T12:00:00Z",
        "2026-01-31t12:00:00z",
        "2026-01-31T12:00:00.000Z",
        "2026-01-31T12:00:00.000000000+00:00",
        "2026-01-31T12:00:00-00:00",
        "2026-01-31T13:30:00+01:30",
        "2026-01-30T12:01:00-23:59",
    ],
)
def test_offsets_and_small_letters_are_the_same_moment(text: str) -> None:
    assert parse_rfc3339(text) == NOON


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Z",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-01-31 12:00:00Z",
        "2026-01-31T12:00Z",
        "2026-01-31T12:00:00.Z",
        "2026-01-31T12:00:00.1234567890Z",
        "2026-01-31T12:00:00,5Z",
        "2026-01-31T12:00:00.5 Z",
        "2026-01-31T12:00:00.-5Z",
        "2026-01-31T12:00:00.٣Z",
        "٢026-01-31T12:00:00Z",
        "2026-02-30T12:00:00Z",
        "2026-13-01T12:00:00Z",
        "2026-01-31T24:00:00Z",
        "2026-12-31T23:59:60Z",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-00:01",
        "2026-01-31T12:00:00+24:00",
        "2026-01-31T12:00:00+01:60",
        "2026-01-31T12:00:00+0100",
        "2026-01-31T12:00:00Z\n",
        " 2026-01-31T12:00:00Z",
    ],
)
def test_what_is_not_rfc_3339_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="RFC 3339"):
        parse_rfc3339(text)


@given(st.text(alphabet="0123456789-+:.TtZz ", max_size=40))
def test_no_text_is_worse_than_a_value_error(text: str) -> None:
    try:
        time_ns = parse_rfc3339(text)
    except ValueError:
        return

    assert parse_rfc3339(format_rfc3339(time_ns)) == time_ns


@pytest.mark.parametrize("time_ns", [MIN_TIME_NS - 1, MAX_TIME_NS + 1, 10**40])
def test_other_years_have_no_text(time_ns: int) -> None:
    with pytest.raises(ValueError, match="RFC 3339"):
        format_rfc3339(time_ns)


def test_now_is_between_two_looks_at_the_clock() -> None:
    before = datetime.now(UTC).timestamp()
    now = now_ns() / 1e9
    after = datetime.now(UTC).timestamp()

    assert before - 1e-3 <= now <= after + 1e-3
