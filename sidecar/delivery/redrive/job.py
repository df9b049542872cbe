"""One redrive or discard: goes through what is there when it begins, oldest first, in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sidecar.delivery.redrive.letter import letter_of, log_key
from sidecar.delivery.redrive.marks import DONE, Kind, State
from sidecar.delivery.redrive.reading import Budget, Forward, Merge

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sidecar.broker import Broker, Log, StoredEvent
    from sidecar.delivery.redrive.batch import Order, Progress, Worker
    from sidecar.delivery.redrive.filters import Place
    from sidecar.delivery.redrive.ledger import Ledger
    from sidecar.delivery.redrive.letter import DeadLetter, Key
    from sidecar.delivery.redrive.patience import Patience

MAX_BATCH = 100
BATCH_SECONDS = 2.0
"""What a batch's publishing takes, at the rate."""
BATCH_BYTES = 8 * 1024 * 1024
"""Of data, which a batch has in memory at once; one dead letter may have more."""
MANY_WAITING = 1000


class Job:
    """One run, over the dead letters of one broker."""

    def __init__(
        self,
        order: Order,
        places: Sequence[Place],
        *,
        broker: Broker,
        ledger: Ledger,
        worker: Worker,
        patience: Patience,
        progress: Progress,
    ) -> None:
        self._order = order
        self._places = places
        self._broker = broker
        self._ledger = ledger
        self._worker = worker
        self._patience = patience
        self._progress = progress
        self._batch: list[DeadLetter] = []
        self._done_before: list[DeadLetter] = []
        """To delete: whoever redrove them did not come to it."""
        self._waiting: dict[Key, DeadLetter] = {}
        """Held by another claim, or by one of ours of which it is not known what it did."""

    async def run(self) -> None:
        """
        Do all that is there now. Raises the SidecarError that ended it.

        What was done is done, and shown in the progress, also when it raises.
        """
        await self._patience.until_done(self._ledger.catch_up)
        logs = await self._patience.until_done(lambda: logs_of(self._broker, self._places))
        forget(self._ledger, logs)
        self._progress.total += sum(each.end - each.first for each in logs)
        merge = Merge([self._reader(each) for each in logs])
        while not self._is_over:
            letter = await self._patience.until_done(lambda: merge.take(Budget()))
            if letter is None:
                break
            await self._found(letter)
        await self._work_on_batch()
        await self._worker.delete(self._done_before)
        await self._work_on_what_waits()

    @property
    def _is_over(self) -> bool:
        limit = self._order.limit
        return self._patience.stop.is_set() or (limit is not None and self._progress.done >= limit)

    @property
    def _room(self) -> int:
        """How many the next batch may have."""
        room = MAX_BATCH
        if self._order.kind is Kind.REDRIVE:
            room = max(1, min(room, int(self._order.rate * BATCH_SECONDS)))
        if self._order.limit is not None:
            room = min(room, self._order.limit - self._progress.done)
        return room

    def _reader(self, each: Log) -> Forward:
        """Of those that are named, only what is between them is read."""
        named = self._order.filter.numbers_in(each)
        if named is None:
            return Forward(self._broker, each, self._pick)
        part = msgspec.structs.replace(each, end=min(each.end, max(named, default=-1) + 1))
        return Forward(self._broker, part, self._pick, min(named, default=each.end))

    def _pick(self, each: Log, stored: StoredEvent) -> DeadLetter | None:
        self._progress.scanned += 1
        letter = pick(self._broker, self._places, each, stored)
        return letter if letter is not None and self._order.filter.wants(letter) else None

    async def _found(self, letter: DeadLetter) -> None:
        state = self._ledger.marks.state(letter.key)
        if state in DONE:
            self._done_before.append(letter)
            if len(self._done_before) >= MAX_BATCH:
                await self._worker.delete(self._done_before)
                self._done_before.clear()
            return
        self._progress.matched += 1
        if self._order.dry_run:
            self._progress.done += 1
        elif state is State.CLAIMED:
            self._wait_for([letter])
        else:
            self._batch.append(letter)
            if _is_full(self._batch, self._room):
                await self._work_on_batch()

    async def _work_on_batch(self) -> None:
        batch, self._batch = self._batch, []
        if not batch or self._is_over:
            return
        ends = await self._worker.work(batch)
        self._wait_for(ends.again)
        if ends.trouble is not None:
            await self._patience.bear(ends.trouble)
        elif ends.redriven or ends.discarded:
            self._patience.all_is_well()

    # -- what others have, and what we do not know of

    def _wait_for(self, letters: Iterable[DeadLetter]) -> None:
        self._waiting.update((letter.key, letter) for letter in letters)
        if len(self._waiting) > MANY_WAITING:
            self._forget_done()
        self._count()

    def _forget_done(self) -> None:
        """Somebody else has done these."""
        state = self._ledger.marks.state
        self._waiting = {k: letter for k, letter in self._waiting.items() if state(k) not in DONE}

    def _count(self) -> None:
        self._progress.waiting = len(self._waiting)

    async def _work_on_what_waits(self) -> None:
        while self._waiting and not self._is_over:
            await self._patience.until_done(self._ledger.catch_up)
            self._forget_done()
            free = [letter for key, letter in self._waiting.items() if self._ledger.is_free(key)]
            for letter in free:
                if _is_full(self._batch, self._room):
                    break
                self._batch.append(letter)
                del self._waiting[letter.key]
            self._count()
            if self._batch:
                await self._work_on_batch()
            elif self._waiting:
                await self._patience.pause()


def _is_full(batch: Sequence[DeadLetter], room: int) -> bool:
    return len(batch) >= room or sum(letter.data_bytes for letter in batch) >= BATCH_BYTES


async def logs_of(broker: Broker, places: Sequence[Place]) -> Sequence[Log]:
    """Where a broker's dead letters may be. Raises BrokerUnavailable, NotSupported, BrokerRefused."""
    found: dict[tuple[str, str], Log] = {}
    for place in places:
        for each in await broker.logs(place.pattern):
            if place.has_log(each):
                # Of one stream, several patterns may be asked for: each is read by itself.
                found[log_key(each), each.topic] = each
    return list(found.values())


def forget(ledger: Ledger, logs: Iterable[Log]) -> None:
    """What is known of dead letters that are gone."""
    for each in logs:
        ledger.marks.forget_below(log_key(each), each.first)


def pick(
    broker: Broker, places: Sequence[Place], each: Log, stored: StoredEvent
) -> DeadLetter | None:
    """The dead letter that was read, if it is one of *places*."""
    letter = letter_of(broker.name, each, stored)
    if letter is None:
        return None
    here = (p for p in places if each.partition is not None or p.pattern == each.topic)
    return letter if any(place.has(letter) for place in here) else None
