"""Which broker an event goes to."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar.config import Route
from sidecar.errors import NoRoute
from sidecar.publishing import routes as module
from sidecar.publishing.routes import Routes

TOKENS = ("a", "b")
tokens = st.sampled_from(TOKENS)
names = st.lists(tokens, min_size=1, max_size=3).map(".".join)
patterns = st.one_of(
    st.just(">"),
    st.builds(
        lambda parts, rest: ".".join([*parts, *rest]),
        st.lists(st.sampled_from([*TOKENS, "*"]), min_size=1, max_size=3),
        st.sampled_from([[], [">"]]),
    ),
)
rules = st.tuples(st.none() | patterns, st.none() | patterns).filter(any)
EVERY_NAME = [".".join(p) for n in range(1, 6) for p in itertools.product(TOKENS, repeat=n)]


def make(*pairs: tuple[str | None, str | None]) -> Routes:
    """Routes to the brokers "0", "1", …, by (topic, event type)."""
    return Routes([Route(topic=t, event_type=e, broker=str(i)) for i, (t, e) in enumerate(pairs)])


def matches(pattern: str, name: str) -> bool:
    """As the NATS documentation has it: "*" is one token, ">" is one or more at the end."""
    left, right = pattern.split("."), name.split(".")
    for i, part in enumerate(left):
        if part == ">":
            return len(right) > i
        if i >= len(right) or part not in {"*", right[i]}:
            return False
    return len(left) == len(right)


def test_the_first_route_that_matches_wins() -> None:
    routes = make(("orders.created", None), ("orders.>", None), (">", None))

    assert [routes.route(t, "x").broker for t in ("orders.created", "orders.paid", "stock")] == [
        "0",
        "1",
        "2",
    ]


def test_a_route_with_a_topic_and_a_type_needs_both() -> None:
    routes = make(("orders.>", "order.*"), (None, "order.*"), (">", None))

    assert routes.route("orders.new", "order.created").broker == "0"
    assert routes.route("stock.new", "order.created").broker == "1"
    assert routes.route("orders.new", "order.created.late").broker == "2"


def test_no_route_names_what_had_none() -> None:
    with pytest.raises(NoRoute, match=r"'stock.low'.*'stock'") as caught:
        make(("orders.>", None)).route("stock.low", "stock")

    assert caught.value.metadata == {"topic": "stock.low", "event_type": "stock"}


@given(st.lists(rules, min_size=1, max_size=5), st.lists(st.tuples(names, names), max_size=20))
def test_routing_is_what_reading_the_rules_one_by_one_gives(
    pairs: list[tuple[str | None, str | None]], asked: list[tuple[str, str]]
) -> None:
    routes = make(*pairs)
    # Twice: from the rules, and from what is remembered.
    for topic, event_type in [*asked, *asked]:
        expected = next(
            (
                str(i)
                for i, (t, e) in enumerate(pairs)
                if (t is None or matches(t, topic)) and (e is None or matches(e, event_type))
            ),
            None,
        )
        try:
            got: str | None = routes.route(topic, event_type).broker
        except NoRoute:
            got = None

        assert got == expected


def test_what_is_remembered_is_bounded_and_still_right() -> None:
    routes = make(("orders.>", "odd"), (">", None))
    for number in range(3 * module.MAX_REMEMBERED):
        assert routes.route(f"orders.{number}", "odd" if number % 2 else "even").broker == str(
            (number + 1) % 2
        )

    assert len(routes._remembered) <= module.MAX_REMEMBERED


def test_types_are_not_looked_at_where_no_route_does() -> None:
    assert make(("a", None), (">", None)).by_topic_only
    assert not make(("a", None), (">", "t")).by_topic_only


@given(st.lists(patterns, min_size=1, max_size=4), patterns)
def test_a_subscription_goes_to_the_broker_that_has_all_its_topics(
    topics: list[str], pattern: str
) -> None:
    """Of topics of up to five tokens: one more than any pattern here can tell apart."""
    routes = make(*((topic, None) for topic in topics))
    brokers = set()
    for name in EVERY_NAME:
        if matches(pattern, name):
            try:
                brokers.add(routes.route(name, "x").broker)
            except NoRoute:
                brokers.add("none")
    try:
        got = routes.of_pattern(pattern).broker
    except NoRoute:
        # Several routes may have it between them, and still be one broker each: naming it helps.
        assert brokers != {"0"}
    else:
        assert brokers == {got}


def test_a_route_by_type_says_nothing_of_subscriptions() -> None:
    routes = make((None, "order.*"), ("orders.>", "order.*"), ("orders.>", None))

    assert routes.of_pattern("orders.*").broker == "2"
    with pytest.raises(NoRoute):
        routes.of_pattern("stock.>")
