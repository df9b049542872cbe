"""What is published and not answered yet: bounded in events and bytes, with a queue at the door."""

from __future__ import annotations

import asyncio
from collections import deque

from sidecar.errors import QueueFull


class Pending:
    """
    Room for events on their way to one broker.

    First come, first served: who waits is not overtaken by a smaller batch, so order holds.
    """

    def __init__(self, broker: str, *, max_events: int, max_bytes: int) -> None:
        self._broker = broker
        self._max_events = max_events
        self._max_bytes = max_bytes
        self.events = 0
        self.bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int, int]] = deque()

    def _fits(self, events: int, size: int) -> bool:
        # A batch larger than all the room goes when nothing else is under way.
        return not self.events or (
            self.events + events <= self._max_events and self.bytes + size <= self._max_bytes
        )

    def try_enter(self, events: int, size: int) -> bool:
        """Take the room now, if nobody waits for it and it is there."""
        if self._waiting or not self._fits(events, size):
            return False
        self.events += events
        self.bytes += size
        return True

    async def enter(self, events: int, size: int, *, wait: float | None) -> None:
        """Take the room, waiting so many seconds for it (None: for ever). Raises QueueFull."""
        turn = asyncio.get_running_loop().create_future()
        entry = (turn, events, size)
        self._waiting.append(entry)
        self._let_in()
        try:
            async with asyncio.timeout(wait):
                await turn
        except TimeoutError:
            self._withdraw(entry)
            raise QueueFull(
                f"{self.events} events ({self.bytes} bytes) wait for broker {self._broker!r} and the "
                "queue stayed full: publish slower, or raise publishing.max_pending_events",
                retry_after=1.0,
                broker=self._broker,
                limit=self._max_events,
            ) from None
        except asyncio.CancelledError:
            self._withdraw(entry)
            raise

    def _withdraw(self, entry: tuple[asyncio.Future[None], int, int]) -> None:
        turn, events, size = entry
        if turn.done() and not turn.cancelled():  # let in at the same moment: give the room back
            self.leave(events, size)
        elif entry in self._waiting:
            self._waiting.remove(entry)
            self._let_in()

    def leave(self, events: int, size: int) -> None:
        """Give room back."""
        self.events -= events
        self.bytes -= size
        if self._waiting:
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            turn, events, size = self._waiting[0]
            if not self._fits(events, size):
                return
            self._waiting.popleft()
            if not turn.done():
                self.events += events
                self.bytes += size
                turn.set_result(None)
