"""Storing the dead letters of one subscription, again and again until it is done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from sidecar.errors import SidecarError
from sidecar.telemetry.facts import DeadLettered, Facts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sidecar.delivery.deadletters import DeadLetters
    from sidecar.delivery.held import Held

log = logging.getLogger(__name__)

PAUSE_SECONDS = (0.1, 5.0)
"""Before a dead letter is tried to be stored again: at first, and at most."""
LOG_SECONDS = 10.0
"""Dead letters are logged this often, with their number."""


class Burials:
    """
    Store first, then ack: while it cannot be stored the event stays with the broker, its lane held.
    """

    def __init__(
        self, name: str, dead_letters: DeadLetters, *, facts: Facts, stop: asyncio.Event
    ) -> None:
        """*name* is the subscription's; once *stop* is set, what fails is not tried again."""
        self._name = name
        self._dead_letters = dead_letters
        self._facts = facts
        self._stop = stop
        self.under_way = 0
        """Tries to store that are not answered."""
        self.problem = ""
        """Why the last try failed; empty when it did not."""
        self._unlogged = 0
        self._last_logged = -LOG_SECONDS

    async def bury(
        self, held: Held, reason: str, error: str, *, is_held: Callable[[], bool]
    ) -> bool:
        """
        Store the dead letter of *held*; returns whether it is stored.

        Given up when it *is_held* no more: it will come again, here or elsewhere.
        """
        pause = PAUSE_SECONDS[0]
        while is_held():
            self.under_way += 1
            try:
                await self._dead_letters.store(held, reason=reason, error=error)
            except SidecarError as failure:
                self._not_stored(failure)
            else:
                self._stored(reason)
                return True
            finally:
                self.under_way -= 1
            if self._stop.is_set():
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
            pause = min(pause * 2, PAUSE_SECONDS[1])
        return False

    def _not_stored(self, failure: SidecarError) -> None:
        problem = f"a dead letter cannot be stored: {failure.message}"
        if self.problem != problem:
            log.warning("subscription %s: %s", self._name, problem)
            self.problem = problem

    def _stored(self, reason: str) -> None:
        self.problem = ""
        self._facts.dead_lettered(DeadLettered(self._name, reason))
        self._unlogged += 1
        now = asyncio.get_running_loop().time()
        if now - self._last_logged >= LOG_SECONDS:
            log.warning(
                "subscription %s: %d dead letters stored, the last one: %s",
                self._name,
                self._unlogged,
                reason,
            )
            self._unlogged, self._last_logged = 0, now
