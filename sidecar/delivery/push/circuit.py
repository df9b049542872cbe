"""Whether the app is there to be pushed to. Decides; does no I/O."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

REFUSALS = 2
"""So many attempts to reach the app in a row that fail, and it is down."""
FAILURES = 20
"""So many answers in a row that it cannot work (502, 503, 504) or none in time: the same."""
PROBE_SECONDS = (0.2, 5.0)
"""Pause before the app is probed: at first, and at most."""
_JITTER = 0.2


class State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Circuit:
    """
    Closed: events are pushed. Open: nothing is, until a probe connects. Half-open: one event is,
    and its answer decides.

    Events that meet an open circuit are not attempts.
    """

    def __init__(self, spread: random.Random) -> None:
        self._spread = spread
        self.state = State.CLOSED
        self.detail = ""
        """Why it is not closed."""
        self.probe_at = 0.0
        """When the app is to be probed, while it is open; the clock is the caller's."""
        self._pause = PROBE_SECONDS[0]
        self._refusals = 0
        self._failures = 0

    def answered(self, *, works: bool, now: float, why: str = "") -> None:
        """
        The app answered; *works* is false for an answer that nothing works there, or none in time.
        """
        self._refusals = 0
        if works:
            self._failures = 0
            self._pause = PROBE_SECONDS[0]
            self.state, self.detail = State.CLOSED, ""
            return
        self._failures += 1
        if self.state is State.HALF_OPEN or self._failures >= FAILURES:
            self._open(why, now)

    def unreachable(self, why: str, now: float) -> None:
        """There was no connection to the app."""
        self._refusals += 1
        if self.state is not State.CLOSED or self._refusals >= REFUSALS:
            self._open(why, now)

    def probed(self, problem: str, now: float) -> None:
        """A connection was tried while it was open; *problem* is empty when there was one."""
        if self.state is not State.OPEN:
            return
        if problem:
            self._open(problem, now)
        else:
            self.state = State.HALF_OPEN

    def _open(self, why: str, now: float) -> None:
        self.state, self.detail = State.OPEN, why
        self._refusals = 0
        self._failures = 0
        self.probe_at = now + self._pause * (1 + _JITTER * (2 * self._spread.random() - 1))
        self._pause = min(self._pause * 2, PROBE_SECONDS[1])
