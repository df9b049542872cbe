"""Whether a subscription should progress and does not. Decides; does no I/O."""

from __future__ import annotations


class Watchdog:
    """
    Told now and then how a subscription does, it says when it is to be subscribed anew.

    That is when, for *seconds*, it was asking its broker for events and got none, and the broker
    had some for it all the time. A broker that is away, or does not say, is no reason: it would
    not answer a new subscription either.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._arrived = -1

    @property
    def look_seconds(self) -> float:
        """How often it wants to be told."""
        return self._seconds / 4

    def should_look(self, *, asking: bool, arrived: int) -> bool:
        """
        Whether it is worth to ask the broker what it has: first of the two things to tell it.

        *asking*: a fetch is under way, with room for what it brings; *arrived*: how many events
        ever came.
        """
        if not asking or arrived != self._arrived:
            self._arrived = arrived
            self._since = None
            return asking
        return True

    def is_stuck(self, due: int | None, *, arrived: int, now: float) -> bool:
        """
        After `should_look` said so: *due* events the broker has, that this sidecar could get.

        None: it did not say. *now* in seconds of any clock that only rises.
        """
        if not due or arrived != self._arrived:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= self._seconds
