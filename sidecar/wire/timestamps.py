"""RFC 3339 text <-> nanoseconds since 1970 (UTC), and the wall clock."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_NS = 1_000_000_000

_TO_THE_SECOND = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})")
_OFFSET = re.compile(r"([+-])([01][0-9]|2[0-3]):([0-5][0-9])")

MIN_TIME_NS = -62_135_596_800 * _NS
"""The start of the year 1, the first that RFC 3339 and Python both know."""
MAX_TIME_NS = 253_402_300_800 * _NS - 1
"""The last nanosecond of the year 9999."""

_UTC_MARKS = frozenset("Zz")

_EXAMPLE = "not an RFC 3339 time of the years 1 to 9999, as 2026-01-31T12:00:00.5Z"


_SCALES: dict[int, int] = {digits: 10 ** (9 - digits) for digits in range(1, 10)}


def now_ns() -> int:
    """The wall clock. The only place that reads it, so that it is easy to find."""
    return time.time_ns()


def format_rfc3339(time_ns: int) -> str:
    """
    UTC with "Z", the fraction without trailing zeros: "2026-01-31T12:00:00.5Z".

    Raises ValueError outside of the years 1 to 9999.
    """
    seconds, fraction = divmod(time_ns, _NS)
    if not fraction:
        return _text_of(seconds) + "Z"
    return f"{_text_of(seconds)}.{fraction:09d}".rstrip("0") + "Z"


def parse_rfc3339(text: str) -> int:
    """
    Nanoseconds since 1970, UTC. Any offset, up to 9 digits of fraction, "t" and "z" too.

    Raises ValueError, also for leap seconds and for times whose UTC is outside of the years 1 to 9999.
    """
    if text[-1:] in _UTC_MARKS:
        return _ns_of(text[:19]) + _fraction(text[19:-1])
    offset = _OFFSET.fullmatch(text[-6:])
    if offset is None:
        raise ValueError(_EXAMPLE)
    shift = (int(offset[2]) * 60 + int(offset[3])) * 60 * _NS
    local = _ns_of(text[:19]) + _fraction(text[19:-6])
    time_ns = local - shift if offset[1] == "+" else local + shift
    if not MIN_TIME_NS <= time_ns <= MAX_TIME_NS:
        raise ValueError(_EXAMPLE)
    return time_ns


def _fraction(text: str) -> int:
    if not text:
        return 0
    digits = text[1:]
    scale = _SCALES.get(len(digits))
    if scale is None or text[0] != "." or not (digits.isascii() and digits.isdigit()):
        raise ValueError(_EXAMPLE)
    return int(digits) * scale


# The events of one second share all but their fraction: 0.1 us instead of 1.


@lru_cache(maxsize=1024)
def _text_of(seconds: int) -> str:
    try:
        return (_EPOCH + timedelta(seconds=seconds)).isoformat()[:19]
    except OverflowError as error:
        raise ValueError(_EXAMPLE) from error


@lru_cache(maxsize=1024)
def _ns_of(text: str) -> int:
    match = _TO_THE_SECOND.fullmatch(text)
    if match is None:
        raise ValueError(_EXAMPLE)
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as error:
        raise ValueError(_EXAMPLE) from error
    return (moment - _EPOCH) // _SECOND * _NS
