"""Push: whatever event it is, the request can be sent, and the decoder of the HTTP door reads it back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config import check
from sidecar.delivery.consumers import Delivery
from sidecar.delivery.push.requests import Requests
from sidecar.wire.cloudevents import Defaults, from_http, from_json, to_json
from tests.wire.test_round_trips import EVENTS, replace, without_a_mark_for_no_data

if TYPE_CHECKING:
    from sidecar.event import Event

NONE = Defaults(source="", type="")
TRACE = frozenset({"traceparent", "tracestate", "baggage"})


def requests(**push: object) -> Requests:
    described = {"name": "billing", "topic": "o.>", "push": {"url": "http://app/"} | push}
    settings = check({"brokers": {"m": {"type": "memory"}}, "subscriptions": [described]})
    return Requests(settings.subscriptions[0])


def sent(made: Requests, *events: Event) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers, as a server has them, and body."""
    head, body = made.of([Delivery("t", event, "o.new", 3, None) for event in events])
    assert head.endswith(b"\r\n")
    lines = [line.partition(b": ") for line in head[:-2].split(b"\r\n")]
    assert all(separator for _, separator, _ in lines)
    return [(name, value) for name, _, value in lines], body


def check_ours(headers: list[tuple[bytes, bytes]]) -> None:
    names = [name for name, _ in headers]
    assert len(set(names)) == len(names)
    assert dict(headers)[b"sidecar-subscription"] == b"billing"


@given(EVENTS)
def test_an_event_is_read_back_in_binary_mode(event: Event) -> None:
    headers, body = sent(requests(), event)

    check_ours(headers)
    assert dict(headers)[b"sidecar-attempt"] == b"3"
    (got,) = from_http(headers, body, NONE)
    assert got == without_a_mark_for_no_data(replace(event, headers=got.headers))  # type: ignore[union-attr]
    assert got.headers.keys() == TRACE & event.headers.keys()


@given(EVENTS)
def test_an_event_is_read_back_in_structured_mode(event: Event) -> None:
    headers, body = sent(requests(content_mode="structured"), event)

    check_ours(headers)
    (got,) = from_http(headers, body, NONE)
    assert replace(got, headers={}) == replace(from_json(to_json(event)), headers={})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["binary", "structured"])
@given(events=st.lists(EVENTS, min_size=1, max_size=4))
def test_a_batch_is_read_back(mode: str, events: list[Event]) -> None:
    headers, body = sent(requests(content_mode=mode, max_batch_events=4), *events)

    check_ours(headers)
    assert from_http(headers, body, NONE) == [from_json(to_json(event)) for event in events]
