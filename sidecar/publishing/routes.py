"""Which broker an event goes to: by topic and by type, the first matching route wins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.errors import NoRoute
from sidecar.event import pattern_covers, pattern_matcher, patterns_overlap

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence

    from sidecar.config import Route

MAX_REMEMBERED = 4096


class Routes:
    """Decides once per (topic, type) and remembers it, bounded: names come from outside."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._matchers = [(_matcher(r.topic), _matcher(r.event_type), r) for r in routes]
        self._remembered: dict[tuple[str, str], Route] = {}
        self.by_topic_only = all(route.event_type is None for route in routes)
        """The type never matters: one look-up serves a whole batch."""

    def route(self, topic: str, event_type: str) -> Route:
        """Raises NoRoute."""
        key = (topic, "" if self.by_topic_only else event_type)
        route = self._remembered.get(key)
        if route is None:
            route = self._match(topic, event_type)
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = route
        return route

    def _match(self, topic: str, event_type: str) -> Route:
        for topic_matcher, type_matcher, route in self._matchers:
            if (topic_matcher is None or topic_matcher.fullmatch(topic)) and (
                type_matcher is None or type_matcher.fullmatch(event_type)
            ):
                return route
        raise NoRoute(
            f"no route for topic {topic!r} and event type {event_type!r}: add one to [[routes]], as "
            'topic = ">" at the end',
            topic=topic,
            event_type=event_type,
        )

    def of_pattern(self, pattern: str) -> Route:
        """
        The route of a subscription's topic, which may be a pattern. Raises NoRoute.

        A route that asks for an event type says nothing of topics, so it is passed over. The first
        route that has a part of the pattern must have all of it.
        """
        for route in self.routes:
            if route.event_type is not None or route.topic is None:
                continue
            if pattern_covers(route.topic, pattern):
                return route
            if patterns_overlap(route.topic, pattern):
                raise NoRoute(
                    f"the topic {pattern!r} goes several ways, by the route {route.topic!r} and others: "
                    "name the subscription's broker",
                    topic=pattern,
                )
        raise NoRoute(
            f"no route for the topic {pattern!r}: add one to [[routes]], or name the subscription's "
            "broker",
            topic=pattern,
        )


def _matcher(pattern: str | None) -> re.Pattern[str] | None:
    return None if pattern is None else pattern_matcher(pattern)
