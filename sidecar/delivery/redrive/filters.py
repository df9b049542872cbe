"""Which dead letters are meant, and where they are looked for."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

from sidecar.delivery.redrive.letter import life
from sidecar.event import has_wildcard, pattern_matcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.broker import Log
    from sidecar.delivery.redrive.letter import DeadLetter, LetterId


class Filter(msgspec.Struct, frozen=True):
    """All that is set must hold. Times are ns since 1970; patterns have wildcards as topics do."""

    ids: frozenset[LetterId] = frozenset()
    subscription: str = ""
    reasons: frozenset[str] = frozenset()
    after_ns: int | None = None
    """Stored at or after."""
    before_ns: int | None = None
    """Stored before."""
    event_type: str = ""
    key: str = ""
    error_contains: str = ""
    topic: str = ""
    """Where the event came from."""
    dead_letter_broker: str = ""
    dead_letter_topic: str = ""

    def __bool__(self) -> bool:
        """Something is asked for: it is not every dead letter there is."""
        return self != Filter()

    def numbers_in(self, log: Log) -> Sequence[int] | None:
        """Of *ids*, those that are in this log; None: none are named."""
        if not self.ids:
            return None
        here = life(log)
        return [i.number for i in self.ids if (i.partition, i.life) == (log.partition, here)]

    def wants(self, letter: DeadLetter) -> bool:
        event = letter.event
        return (
            (not self.ids or letter.id in self.ids)
            and (not self.subscription or letter.says("subscription") == self.subscription)
            and (not self.reasons or letter.says("reason") in self.reasons)
            and (self.after_ns is None or letter.stored_ns >= self.after_ns)
            and (self.before_ns is None or letter.stored_ns < self.before_ns)
            and (not self.event_type or _matches(self.event_type, event.type))
            and (not self.key or event.key == self.key)
            and self.error_contains.casefold() in letter.says("error").casefold()
            and (not self.topic or _matches(self.topic, letter.says("topic")))
        )


@lru_cache(maxsize=64)
def _matcher(pattern: str) -> re.Pattern[str]:
    return pattern_matcher(pattern)


def _matches(pattern: str, text: str) -> bool:
    return _matcher(pattern).fullmatch(text) is not None


class Place(msgspec.Struct, frozen=True):
    """Topics of one broker in which dead letters are, and of which subscriptions (empty: any)."""

    broker: str
    pattern: str
    """A pattern that has all of them, and perhaps others."""
    topics: str
    """A regular expression of just them."""
    subscriptions: frozenset[str] = frozenset()

    def has_log(self, log: Log) -> bool:
        """A stream may hold them; a partition is of one topic."""
        return log.partition is None or re.fullmatch(self.topics, log.topic) is not None

    def has(self, letter: DeadLetter) -> bool:
        return re.fullmatch(self.topics, letter.topic) is not None and (
            not self.subscriptions or letter.says("subscription") in self.subscriptions
        )


def place_of_topic(broker: str, topic: str) -> Place:
    """*topic* may be a pattern; whatever dead letters are there."""
    return Place(broker, topic, pattern_matcher(topic).pattern)


def place_of_subscription(broker: str, template: str, topic: str, name: str) -> Place:
    """
    Where the dead letters of a subscription on *topic* go, by the *template* of their topics.

    With "{topic}.dlq" and a subscription on "orders.>" that is no pattern: what covers it is looked
    through, and matched exactly.
    """
    before, found, after = template.partition("{topic}")
    inner = pattern_matcher(topic).pattern
    exact = re.escape(before) + (inner + re.escape(after) if found else "")
    return Place(broker, _cover(template.replace("{topic}", topic)), exact, frozenset({name}))


def _cover(template: str) -> str:
    """The narrowest pattern with every topic that *template*, with wildcards anywhere, names."""
    tokens = template.split(".")
    covered: list[str] = []
    for token in tokens:
        if ">" in token:
            covered.append(">")
            break
        covered.append("*" if has_wildcard(token) else token)
    return ".".join(covered)


def merged(places: Sequence[Place]) -> Sequence[Place]:
    """One place for all subscriptions whose dead letters go to the same topics."""
    found: dict[tuple[str, str, str], frozenset[str]] = {}
    for place in places:
        at = (place.broker, place.pattern, place.topics)
        found[at] = found.get(at, frozenset()) | place.subscriptions
    return [Place(*at, names) for at, names in found.items()]
