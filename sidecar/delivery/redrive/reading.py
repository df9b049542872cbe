"""Reading dead letters out of several logs at once, oldest or newest first, in bounded steps."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec

from sidecar.delivery.redrive.letter import letter_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sidecar.broker import Broker, Log, StoredEvent
    from sidecar.delivery.redrive.letter import DeadLetter, Key

    Pick = Callable[[Log, StoredEvent], DeadLetter | None]

PAGE = 500
FIRST_SPAN = 256
MAX_CHUNK = 20_000
"""Records of one step backwards; more of them, and it was too wide."""


class Budget:
    """How much may be read before a pause: records and seconds."""

    def __init__(self, records: float = float("inf"), seconds: float = float("inf")) -> None:
        self.records = 0
        self._max = records
        self._until = time.monotonic() + seconds

    @property
    def is_spent(self) -> bool:
        return self.records >= self._max or time.monotonic() >= self._until


class Reader(Protocol):
    """One log. What it found and nobody took waits in *found*, next first."""

    broker: Broker
    log: Log
    found: deque[DeadLetter]

    @property
    def is_over(self) -> bool:
        """There is nothing more to read."""

    @property
    def resume(self) -> int:
        """Where to go on, so that what was taken does not come again, and the rest does."""

    async def step(self, budget: Budget) -> None:
        """Read on, a bounded bit. Raises BrokerUnavailable, BrokerRefused."""


class Forward:
    """From number *at* up to the log's end."""

    def __init__(self, broker: Broker, log: Log, pick: Pick, at: int | None = None) -> None:
        self.broker = broker
        self.log = log
        self.found: deque[DeadLetter] = deque()
        self._pick = pick
        self._at = max(log.first, at or 0)

    @property
    def is_over(self) -> bool:
        return self._at >= self.log.end

    @property
    def resume(self) -> int:
        return self.found[0].number if self.found else self._at

    async def step(self, budget: Budget) -> None:
        page = await self.broker.read(self.log, self._at, PAGE)
        budget.records += len(page)
        self._at = page[-1].number + 1 if page else self.log.end
        self.found.extend(letter for one in page if (letter := self._pick(self.log, one)))


class Backward:
    """From below number *at* down to the log's first."""

    def __init__(self, broker: Broker, log: Log, pick: Pick, at: int | None = None) -> None:
        self.broker = broker
        self.log = log
        self.found: deque[DeadLetter] = deque()
        self._pick = pick
        self._at = log.end if at is None else min(log.end, at)
        self._span = FIRST_SPAN

    @property
    def is_over(self) -> bool:
        return self._at <= self.log.first

    @property
    def resume(self) -> int:
        return self.found[0].number + 1 if self.found else self._at

    async def step(self, budget: Budget) -> None:
        """A stream of many topics is sparse: the fewer there are, the wider the next step."""
        floor = max(self.log.first, self._at - self._span)
        chunk = msgspec.structs.replace(self.log, end=self._at)
        found: list[DeadLetter] = []
        at, records = floor, 0
        while at < self._at and (page := await self.broker.read(chunk, at, PAGE)):
            records += len(page)
            at = page[-1].number + 1
            found += (letter for one in page if (letter := self._pick(self.log, one)))
            if records > MAX_CHUNK and self._span > FIRST_SPAN:
                budget.records += records
                self._span = max(FIRST_SPAN, self._span // 16)
                return
        budget.records += records
        self.found.extend(reversed(found))
        self._at = floor
        if records < self._span // 8:
            self._span *= 4


class Merge:
    """Dead letters of several logs by the time at which they were stored."""

    def __init__(self, readers: Sequence[Reader], *, newest_first: bool = False) -> None:
        self.readers = readers
        self._newest_first = newest_first

    async def take(self, budget: Budget) -> DeadLetter | None:
        """
        The next one. None: that was all, or the budget is spent.

        Raises BrokerUnavailable, BrokerRefused; the next call goes on.
        """
        for reader in self.readers:
            while not reader.found and not reader.is_over:
                if budget.is_spent:
                    return None
                await reader.step(budget)
        ready = [reader for reader in self.readers if reader.found]
        if not ready:
            return None
        pick = max if self._newest_first else min
        return pick(ready, key=lambda reader: reader.found[0].stored_ns).found.popleft()

    @property
    def is_over(self) -> bool:
        return all(reader.is_over and not reader.found for reader in self.readers)


async def whole(broker: Broker, letters: Iterable[DeadLetter]) -> Mapping[Key, DeadLetter]:
    """
    Read them again, with their data, which is not kept while they are looked for.

    What is gone is left out. Raises BrokerUnavailable, BrokerRefused.
    """
    found: dict[Key, DeadLetter] = {}
    for of, numbers in by_log(letters):
        wanted = set(numbers)
        part = msgspec.structs.replace(of, end=max(wanted) + 1)
        at = min(wanted)
        while at < part.end and (page := await broker.read(part, at, PAGE)):
            at = page[-1].number + 1
            for stored in page:
                letter = letter_of(broker.name, of, stored, with_data=True)
                if letter is not None and stored.number in wanted:
                    found[letter.key] = letter
    return found


def by_log(letters: Iterable[DeadLetter]) -> Sequence[tuple[Log, list[int]]]:
    """Their numbers, log by log."""
    found: dict[tuple[str, str], tuple[Log, list[int]]] = {}
    for letter in letters:
        at = (letter.key.log, letter.log.topic)
        found.setdefault(at, (letter.log, []))[1].append(letter.number)
    return list(found.values())
