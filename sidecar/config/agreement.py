"""What no single table can know: between tables, on the data as it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.event import (
    pattern_covers,
    pattern_matcher,
    patterns_overlap,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

from sidecar.config.problems import KeyPath, Problem, as_table, as_tables, did_you_mean, dotted
from sidecar.config.tables import (
    EMBEDDED_BROKER,
    STORING_TYPES,
    Admin,
    Grpc,
    Http,
    Limits,
    Publishing,
    Settings,
)
from sidecar.config.values import listed, shown


def cross_checks(data: Mapping[str, object]) -> Iterator[Problem]:
    """What no single table can know. Unreadable parts are skipped: they have their own problem."""
    yield from _shared_places(data)
    yield from _pending_holds_an_event(data)
    routes, subscriptions = as_tables(data.get("routes")), as_tables(data.get("subscriptions"))
    yield from _repeated_names(("subscriptions",), subscriptions)
    brokers = data.get("brokers", {})
    if not isinstance(brokers, dict):
        return
    for name, broker in brokers.items():
        streams = as_tables(as_table(broker).get("streams"))
        yield from _repeated_names(("brokers", name, "streams"), streams)
        yield from _lingers_too_long(name, as_table(broker), as_table(data.get("publishing")))
    types = {name: as_table(b).get("type") for name, b in brokers.items()}
    types = types or {EMBEDDED_BROKER: "jetstream"}
    yield from _unknown_brokers(routes, subscriptions, types)
    if not data.get("routes"):
        if len(types) > 1:
            yield Problem(
                ("routes",), f'no topic has a broker; add topic = ">" for one of: {listed(types)}'
            )
            return
        routes = [{"topic": ">", "broker": next(iter(types))}]
    for i, subscription in enumerate(subscriptions):
        for path, text in _subscription_problems(subscription, routes, types):
            yield Problem(("subscriptions", i, *path), text)


def _shared_places(data: Mapping[str, object]) -> Iterator[Problem]:
    doors: dict[str, Settings] = {"grpc": Grpc(), "http": Http(), "admin": Admin()}
    taken: dict[str, str] = {}
    for door, defaults in doors.items():
        for key, default in defaults:
            place = as_table(data.get(door)).get(key, default)
            if not isinstance(place, str) or not place or place.endswith(":0"):
                continue
            if place in taken:
                yield Problem((door, key), f"is {taken[place]} already; give each its own")
            taken.setdefault(place, f"{door}.{key}")


def _pending_holds_an_event(data: Mapping[str, object]) -> Iterator[Problem]:
    limits, publishing = as_table(data.get("limits")), as_table(data.get("publishing"))
    event = limits.get("max_event_bytes", Limits().max_event_bytes)
    pending = publishing.get("max_pending_bytes", Publishing().max_pending_bytes)
    if isinstance(event, int) and isinstance(pending, int) and pending < event:
        path = ("publishing", "max_pending_bytes")
        yield Problem(path, f"{pending} is less than limits.max_event_bytes; use at least {event}")


def _lingers_too_long(
    name: str, broker: dict[str, object], publishing: dict[str, object]
) -> Iterator[Problem]:
    linger = broker.get("linger_seconds")
    timeout = publishing.get("timeout_seconds", Publishing().timeout_seconds)
    if isinstance(linger, int | float) and isinstance(timeout, int | float) and linger >= timeout:
        path = ("brokers", name, "linger_seconds")
        yield Problem(path, f"{linger:g} is not less than publishing.timeout_seconds, {timeout:g}")


def _repeated_names(path: KeyPath, tables: list[dict[str, object]]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for i, table in enumerate(tables):
        name = table.get("name")
        if isinstance(name, str) and seen.setdefault(name, i) != i:
            first = dotted((*path, seen[name]))
            yield Problem((*path, i, "name"), f"{shown(name)} is {first} already; choose another")


def _unknown_brokers(
    routes: list[dict[str, object]],
    subscriptions: list[dict[str, object]],
    known: Mapping[str, object],
) -> Iterator[Problem]:
    named: list[tuple[KeyPath, object]] = []
    for i, route in enumerate(routes):
        named.append((("routes", i, "broker"), route.get("broker")))
    for i, subscription in enumerate(subscriptions):
        named.append((("subscriptions", i, "broker"), subscription.get("broker")))
        dead_letter = as_table(subscription.get("dead_letter"))
        named.append((("subscriptions", i, "dead_letter", "broker"), dead_letter.get("broker")))
    for path, name in named:
        if isinstance(name, str) and name not in known:
            meant = did_you_mean(name, known)
            yield Problem(path, f"no broker {shown(name)}; {meant}there are: {listed(known)}")


def _subscription_problems(
    subscription: dict[str, object],
    routes: list[dict[str, object]],
    types: Mapping[str, object],
) -> Iterator[Problem]:
    topic, dead_letter = subscription.get("topic"), as_table(subscription.get("dead_letter"))
    if not isinstance(topic, str):
        return
    if "broker" not in subscription and not any(_may_match(route, topic) for route in routes):
        yield Problem(("topic",), f"no route has {topic!r}; add one, or name a broker here")
    named = [table["broker"] for table in (dead_letter, subscription) if "broker" in table]
    broker = named[0] if named else _routed(topic, routes)
    if isinstance(broker, str) and types.get(broker) == "nats":
        storing = [name for name, type_ in types.items() if type_ in STORING_TYPES]
        way_out = f"use {listed(storing)}" if storing else "add one, of type jetstream or kafka"
        yield Problem(
            ("dead_letter", "broker"),
            f"dead letters need a broker that stores, and {broker!r} is core NATS; {way_out}",
        )
    template = dead_letter.get("topic")
    elsewhere = dead_letter.get("broker") not in (None, subscription.get("broker"))
    if isinstance(template, str) and not elsewhere and comes_back(topic, template):
        yield Problem(
            ("dead_letter", "topic"),
            own_dead_letters(topic, template),
        )


def _routed(topic: str, routes: list[dict[str, object]]) -> object:
    """The broker of a subscription to *topic*. None: unknown, or decided when it runs."""
    first = next((route for route in routes if _may_match(route, topic)), None)
    pattern = first and first.get("topic")
    covered = isinstance(pattern, str) and pattern_covers(pattern, topic)
    return first.get("broker") if first and covered else None


def _may_match(route: dict[str, object], topic: str) -> bool:
    """A route that asks for an event type says nothing of subscriptions."""
    pattern = route.get("topic", ">")
    return "event_type" not in route and (
        not isinstance(pattern, str) or patterns_overlap(pattern, topic)
    )


def own_dead_letters(topic: str, template: str) -> str:
    return (
        f"{template!r} is part of {topic!r}, so that the subscription gets its own dead letters; "
        'use a topic outside of it, as "dlq.{topic}", or another dead_letter.broker'
    )


def comes_back(topic: str, template: str) -> bool:
    """Dead letters on *template* are part of *topic*, which may be a pattern."""
    some = topic.replace("*", "any").replace(">", "any")
    return pattern_matcher(topic).fullmatch(template.replace("{topic}", some)) is not None
