"""How many requests may be under way to one app. Decides; does no I/O."""

from __future__ import annotations

START = 4
"""At first, and after the app was down: it may still be warming up."""
TOLERANCE = 2.0
"""Times the usual latency: from there on the app is taken for slow, and nothing is added."""
SLACK_SECONDS = 0.005
"""Differences in latency below this are noise."""
_SHORT, _LONG = 0.2, 0.01
"""How much a new latency weighs in the latest one, and in the usual one."""


class Concurrency:
    """
    Additive increase, multiplicative decrease, as TCP has it (RFC 5681), between 1 and *most*.

    Each success that found the limit used adds its share of one; until the first decrease it adds
    one, so that the limit doubles with every round (slow start). An app that pushes back (429, 503)
    or does not answer in time halves it, once for all that was under way then. While answers take
    clearly longer than they usually do, nothing is added: more requests would only queue there.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(min(START, most))
        self._slow_start = True
        self._latest = 0.0
        self._usual = 0.0
        self._cut_at = float("-inf")

    @property
    def limit(self) -> int:
        return int(self._limit)

    def restart(self) -> None:
        """The app was away: what it takes now is to be found out anew, from one on."""
        self._limit = 1.0
        self._slow_start = True
        self._latest = self._usual = 0.0

    def succeeded(self, seconds: float, *, under_way: int) -> None:
        """A request was answered in *seconds*; so many were *under_way*, with it."""
        if not self._usual:
            self._latest = self._usual = seconds
        self._latest += _SHORT * (seconds - self._latest)
        # What is usual falls at once and rises slowly: a slow app is not to become the measure.
        weight = _SHORT if seconds < self._usual else _LONG
        self._usual += weight * (seconds - self._usual)
        if self._latest > TOLERANCE * self._usual + SLACK_SECONDS:
            self._slow_start = False
            return
        if under_way >= self.limit:
            more = 1.0 if self._slow_start else 1.0 / self._limit
            self._limit = min(float(self._most), self._limit + more)

    def pushed_back(self, begun: float, now: float) -> None:
        """A request that had *begun* then was refused for load, or not answered in time."""
        if begun < self._cut_at:
            return  # it was under way at the last cut, which was for all of those
        self._cut_at = now
        self._limit = max(1.0, self._limit / 2)
        self._slow_start = False
