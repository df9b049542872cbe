"""A rate, kept smoothly: what was missed is made up for a tenth of a second, and no more."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LAG_SECONDS = 0.1
TICK_SECONDS = 0.01


class Pacer:
    """So many a second, whoever asks."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap = 1 / rate
        self._clock = clock
        self._next = clock()
        """When the next one is due."""

    def take(self, wanted: int) -> int:
        """How many are due now, at most *wanted*; they are taken."""
        now = self._clock()
        if now < self._next:
            return 0
        self._next = max(self._next, now - LAG_SECONDS)
        due = min(wanted, 1 + int((now - self._next) / self._gap))
        self._next += due * self._gap
        return due

    async def due(self, wanted: int, stop: asyncio.Event) -> int:
        """Wait for the next ones; 0 when *stop* came first."""
        while not stop.is_set():
            count = self.take(wanted)
            if count:
                return count
            wait = max(TICK_SECONDS, self._next - self._clock())
            try:
                async with asyncio.timeout(wait):
                    await stop.wait()
            except TimeoutError:
                pass
        return 0
