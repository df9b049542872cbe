"""Which events the app has acked lately, by source and id. Decides; does no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar.event import Event

MOST = 100_000
"""Events that are remembered at least, if the time is long enough: some 20 MB. Older ones go."""


class Duplicates:
    """
    An event is a duplicate for *seconds* after it was acked here, or until MOST others were.

    Nothing is remembered before the ack: what fails comes again. It is this process that
    remembers, so a restart forgets, and another sidecar does not know.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Two generations: the old one is forgotten at once, without a search for what is too old.
        self._new: dict[tuple[str, str], float] = {}
        self._old: dict[tuple[str, str], float] = {}
        self._since = 0.0

    def forget(self) -> None:
        """The subscription was moved: what comes again is meant."""
        self._new.clear()
        self._old.clear()

    def acked(self, event: Event, now: float) -> None:
        """*now* in seconds of any clock that only rises, the same for all calls."""
        if now - self._since > self._seconds or len(self._new) >= MOST:
            stale = now - self._since > 2 * self._seconds
            self._new, self._old = {}, {} if stale else self._new
            self._since = now
        self._new[event.source, event.id] = now

    def has(self, event: Event, now: float) -> bool:
        key = (event.source, event.id)
        acked = self._new.get(key, self._old.get(key))
        return acked is not None and now - acked <= self._seconds
