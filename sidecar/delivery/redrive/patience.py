"""Waiting for a broker that is away, for a while, and not when one is told to stop."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

from sidecar.errors import BrokerUnavailable, Draining, Internal, OutcomeUnknown, QueueFull

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sidecar.errors import SidecarError

T = TypeVar("T")

AWAY_SECONDS = 30.0
"""A broker that is away is waited for so long."""
PAUSE_SECONDS = 0.25
MAYBE_DONE = (OutcomeUnknown, Internal)
"""A publish that failed so may have arrived."""
NOT_NOW = (BrokerUnavailable, QueueFull, Draining)
"""A publish that failed so did not, and the next one may."""


class Patience:
    """How long one job has been in trouble. *stop* ends every wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stop = asyncio.Event()
        self._clock = clock
        self._since: float | None = None

    def all_is_well(self) -> None:
        self._since = None

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do *work*, again while its broker is away. Raises what it raised last, or at once."""
        while True:
            try:
                return await work()
            except (*NOT_NOW, OutcomeUnknown) as error:
                await self.bear(error)

    async def bear(self, error: SidecarError) -> None:
        """Wait a little. Raises *error* when it has been so for AWAY_SECONDS, or to stop."""
        now = self._clock()
        if self._since is None:
            self._since = now
        if now - self._since > AWAY_SECONDS or self.stop.is_set():
            raise error
        await self.pause()

    async def pause(self, seconds: float = PAUSE_SECONDS) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            pass
