"""What can be said of push in the configuration: what is taken can be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar import config
from sidecar.delivery.consumers import Delivery
from sidecar.delivery.push.client import Client
from sidecar.delivery.push.requests import Requests
from sidecar.errors import ConfigInvalid
from sidecar.event import Event

if TYPE_CHECKING:
    from sidecar.config import Subscription

URL = "http://127.0.0.1:8080/events"


def subscription(**push: Any) -> Subscription:
    """Raises ConfigInvalid."""
    described = {"name": "billing", "topic": "orders.>", "push": {"url": URL} | push}
    checked = config.check({"brokers": {"m": {"type": "memory"}}, "subscriptions": [described]})
    return checked.subscriptions[0]


def problem(**push: Any) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        subscription(**push)
    (only,) = caught.value.problems
    return only


@pytest.mark.parametrize(
    ("url", "address"),
    [
        (URL, ("", URL)),
        ("https://app.test/a?b=c", ("", "https://app.test/a?b=c")),
        ("http://[::1]:80/", ("", "http://[::1]:80/")),
        ("unix:///run/app.sock:/events", ("/run/app.sock", "http://app/events")),
        ("unix:///run/\u00e4.sock", ("/run/\u00e4.sock", "http://app/")),
    ],
)
def test_these_are_addresses(url: str, address: tuple[str, str]) -> None:
    assert config.push_address(subscription(url=url).push.url) == address  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b/",
        f"http://{'a' * 70}/",
        "http://app/a b",
        "http://app/\r\nhost: evil",
        "http://app/\u00e9",
        "unix:///run/app.sock:/a b",
        "unix:///run/app.sock:/a\r\nhost: evil",
        "ftp://app/",
        "http://app:0/",
    ],
)
def test_these_are_none_and_would_fail_only_at_the_first_event(url: str) -> None:
    assert "is not an address" in problem(url=url)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"a b": "1"}, "'a b' is not a header's name"),
        ({"": "1"}, "'' is not a header's name"),
        ({"Content-Length": "1"}, "'Content-Length' is the sidecar's own"),
        ({"host": "1"}, "'host' is the sidecar's own"),
        ({"ce-id": "1"}, "'ce-id' is the sidecar's own"),
        ({"Sidecar-Attempt": "1"}, "'Sidecar-Attempt' is the sidecar's own"),
    ],
)
def test_a_header_that_is_none_or_ours_is_refused(headers: dict[str, str], said: str) -> None:
    assert said in problem(headers=headers)


@pytest.mark.parametrize("value", ["s3cret\r\nevil: 1", "s3cret\u2026", "s3cret\x00"])
def test_a_value_that_cannot_be_sent_is_refused_and_not_shown(value: str) -> None:
    said = problem(headers={"authorization": value})

    assert "the value of 'authorization' is not printable ASCII" in said
    assert "s3cret" not in said


def test_the_user_agent_may_be_another() -> None:
    delivery = Delivery("t", Event("1", "/s", "t", 1), "orders.new", 1, None)
    head, _ = Requests(subscription(headers={"User-Agent": "shop"})).of([delivery])

    assert head.count(b"user-agent") == 1
    assert b"user-agent: shop\r\n" in head


ANY = st.text("aZ-:/ \r\n\t\u00e9?#%", max_size=8)


@given(headers=st.dictionaries(ANY, ANY, max_size=3), path=ANY)
def test_whatever_is_taken_makes_a_request_of_its_lines(headers: dict[str, str], path: str) -> None:
    try:
        settings = subscription(url=f"http://app.test/{path}", headers=headers)
    except ConfigInvalid:
        return
    assert settings.push is not None
    delivery = Delivery("t", Event("1", "/s", "t", 1), "orders.new", 1, None)
    head, _ = Requests(settings).of([delivery])
    client = Client(*config.push_address(settings.push.url), connect_seconds=1)
    first, *_, last = (client._start + head).split(b"\r\n")

    assert last == b""
    assert len(first.split(b" ")) == 3
    fixed = 2 + 5 + 2  # host, user-agent; ce-…; ours of the event
    names = {name.lower() for name in headers} - {"user-agent"}
    assert (client._start + head).count(b"\r\n") == 1 + fixed + 1 + len(names)
