"""What is due when: leases that end, retries whose time comes. Decides; does no I/O."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar.delivery.held import Held


class Timers:
    """
    At most one timer for each event that is held.

    Non-obvious: a heap with stale entries; one counts only while `_timed` has its number, so
    stopping and moving one cost no search. It holds no events: those would live as long as their
    lease might have run.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._timed: dict[int, Held] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._timed)

    def start(self, held: Held, at: float) -> None:
        """Its timer ends at loop time *at*; the one it had does not count any more."""
        if held.timer:
            del self._timed[held.timer]
        self._numbers = held.timer = self._numbers + 1
        self._timed[held.timer] = held
        held.due = at
        heapq.heappush(self._heap, (at, held.timer))
        # Settled deliveries leave their leases behind: sweep before they are most of the heap.
        if len(self._heap) > 64 + 4 * len(self._timed):
            self._heap = [entry for entry in self._heap if entry[1] in self._timed]
            heapq.heapify(self._heap)

    def stop(self, held: Held) -> None:
        if held.timer:
            del self._timed[held.timer]
            held.timer = 0

    def next_time(self) -> float | None:
        """When the first one ends, in loop time."""
        heap = self._heap
        if not self._timed:
            heap.clear()
        while heap and heap[0][1] not in self._timed:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> list[Held]:
        """Those that have ended, the first first; they are stopped."""
        ended = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            held = self._timed.pop(heapq.heappop(heap)[1], None)
            if held is not None:
                held.timer = 0
                ended.append(held)
        return ended

    def clear(self) -> None:
        for held in self._timed.values():
            held.timer = 0
        self._heap.clear()
        self._timed.clear()
