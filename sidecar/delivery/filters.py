"""
Which events a subscription wants: conditions on their attributes.

The dialects exact, prefix, suffix, all, any and not of the CloudEvents Subscriptions API (1.0-wip,
section 3.2.4): names of attributes are case-sensitive, an attribute that is absent matches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from sidecar.event import pattern_matcher
from sidecar.wire.timestamps import format_rfc3339

if TYPE_CHECKING:
    from sidecar.config import Filter
    from sidecar.event import Event

Wants: TypeAlias = Callable[["Event"], bool]


def wanted(event_types: Sequence[str], filters: Sequence[Filter]) -> Wants | None:
    """Whether an event is of one of the types and passes every filter; None: all of them do."""
    conditions: list[Wants] = []
    if event_types:
        conditions.append(_of_types(event_types))
    conditions += [_condition(one) for one in filters]
    if len(conditions) < 2:  # noqa: PLR2004
        return conditions[0] if conditions else None
    return _all(conditions)


def _of_types(patterns: Sequence[str]) -> Wants:
    matchers = [pattern_matcher(pattern) for pattern in patterns]
    return lambda event: any(matcher.fullmatch(event.type) for matcher in matchers)


def _condition(one: Filter) -> Wants:
    if one.exact is not None:
        return _each(one.exact, str.__eq__)
    if one.prefix is not None:
        return _each(one.prefix, str.startswith)
    if one.suffix is not None:
        return _each(one.suffix, str.endswith)
    if one.all is not None:
        return _all([_condition(inner) for inner in one.all])
    if one.any is not None:
        conditions = [_condition(inner) for inner in one.any]
        return lambda event: any(holds(event) for holds in conditions)
    assert one.not_ is not None  # the configuration has checked that one of them is set
    inner = _condition(one.not_)
    return lambda event: not inner(event)


def _all(conditions: Sequence[Wants]) -> Wants:
    return lambda event: all(holds(event) for holds in conditions)


def _each(values: Mapping[str, str], compare: Callable[[str, str], bool]) -> Wants:
    pairs = [(_reader(name), value) for name, value in values.items()]

    def holds(event: Event) -> bool:
        for read, value in pairs:
            there = read(event)
            if not there or not compare(there, value):
                return False
        return True

    return holds


def _reader(name: str) -> Callable[[Event], str]:
    """The attribute of a name as text; empty when it is absent."""
    return _READERS.get(name) or (lambda event: event.extensions.get(name, ""))


_READERS: Mapping[str, Callable[[Event], str]] = {
    "id": lambda event: event.id,
    "source": lambda event: event.source,
    "specversion": lambda _event: "1.0",
    "type": lambda event: event.type,
    "subject": lambda event: event.subject,
    "time": lambda event: format_rfc3339(event.time_ns),
    "datacontenttype": lambda event: event.content_type,
    "dataschema": lambda event: event.schema,
    "partitionkey": lambda event: event.key,
}
