"""What can be done about dead letters, over all brokers and subscriptions of this sidecar."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
import zlib
from typing import TYPE_CHECKING

import msgspec

from sidecar import config
from sidecar.delivery.redrive.batch import Progress, Worker
from sidecar.delivery.redrive.filters import Filter, merged, place_of_subscription, place_of_topic
from sidecar.delivery.redrive.job import Job, forget, logs_of, pick
from sidecar.delivery.redrive.ledger import Ledger
from sidecar.delivery.redrive.letter import LetterId, letter_of, life, log_key
from sidecar.delivery.redrive.marks import DONE
from sidecar.delivery.redrive.pacing import Pacer
from sidecar.delivery.redrive.patience import Patience
from sidecar.delivery.redrive.reading import Backward, Budget, Forward, Merge, whole
from sidecar.errors import DeadLetterMissing, Draining, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from sidecar.broker import Broker, Log, StoredEvent
    from sidecar.delivery.hub import Hub
    from sidecar.delivery.redrive.batch import Order
    from sidecar.delivery.redrive.filters import Place
    from sidecar.delivery.redrive.letter import DeadLetter, Key
    from sidecar.delivery.redrive.marks import State
    from sidecar.delivery.redrive.reading import Reader
    from sidecar.publishing.publisher import Publisher

PAGE_RECORDS = 10_000
PAGE_SECONDS = 2.0
"""What is read for one page at most, about: then it has what there is, and a token."""
PAGE_BYTES = 2 * 1024 * 1024
"""Of data in a page, where it was asked for, but for one dead letter: gRPC's clients take 4 MiB."""
PROGRESS_SECONDS = 1.0
STOP_SECONDS = 15.0
"""What is under way when a job is stopped ends within this: a publish and two marks."""


class Found(msgspec.Struct, frozen=True):
    """A dead letter, and what was done to it."""

    letter: DeadLetter
    state: State


class Page(msgspec.Struct, frozen=True):
    letters: Sequence[Found]
    token: str
    """For the next one; empty: that was all."""


class _Token(msgspec.Struct, frozen=True, array_like=True):
    """Where a list goes on: by broker, pattern and log, the next number and the end."""

    query: int
    places: dict[str, tuple[int, int]]


class Desk:
    """Lists, gets, redrives and discards. Any number of callers at a time."""

    def __init__(
        self,
        brokers: Mapping[str, Broker],
        publisher: Publisher,
        hub: Hub,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*clock* tells seconds from any start; it says how long a claim was watched."""
        self._brokers = brokers
        self._publisher = publisher
        self._hub = hub
        self._clock = clock
        self._ledgers: dict[str, Ledger] = {}
        self._jobs: dict[asyncio.Task[Exception | None], Patience] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def serve(self) -> None:
        """Run what is ordered, until cancelled; `drain` first."""
        async with asyncio.TaskGroup() as self._tasks:
            await asyncio.get_running_loop().create_future()

    # -- where they are

    def _places(self, wanted: Filter) -> Mapping[str, Sequence[Place]]:
        """By broker. Raises SubscriptionMissing, InvalidRequest."""
        if wanted.dead_letter_topic or wanted.dead_letter_broker:
            places = [self._named_place(wanted)]
        elif wanted.ids and not wanted.subscription:
            where = {(one.broker, one.topic) for one in wanted.ids}
            places = [place_of_topic(self._broker(b).name, topic) for b, topic in sorted(where)]
        elif wanted.subscription:
            places = [self._place(wanted.subscription)]
        else:
            places = [self._place(s.settings.name) for s in self._hub.all()]
        found: dict[str, list[Place]] = {}
        for place in merged(places):
            found.setdefault(place.broker, []).append(place)
        return found

    def _named_place(self, wanted: Filter) -> Place:
        if not (wanted.dead_letter_topic and wanted.dead_letter_broker):
            raise InvalidRequest(
                "filter: dead_letter_broker and dead_letter_topic go together",
                field="filter.dead_letter_topic",
            )
        broker = self._broker(wanted.dead_letter_broker)
        return place_of_topic(broker.name, wanted.dead_letter_topic)

    def _place(self, subscription: str) -> Place:
        found = self._hub.get(subscription)
        settings = found.settings
        broker = self._brokers[settings.dead_letter.broker or found.broker.name]
        template = settings.dead_letter.topic or broker.dead_letter_topic
        return place_of_subscription(broker.name, template, settings.topic, settings.name)

    def _broker(self, name: str) -> Broker:
        broker = self._brokers.get(name)
        if broker is None:
            raise DeadLetterMissing(
                f"no broker {config.shown(name)} (there are: {', '.join(self._brokers)})",
                broker=name[: config.MAX_NAME_LENGTH],
            )
        return broker

    def _ledger(self, broker: str) -> Ledger:
        ledger = self._ledgers.get(broker)
        if ledger is None:
            ledger = self._ledgers[broker] = Ledger(
                self._brokers[broker], self._publisher, self._clock
            )
        return ledger

    # -- looking

    async def page(
        self,
        wanted: Filter,
        *,
        size: int,
        token: str = "",
        oldest_first: bool = False,
        settled: bool = False,
        with_data: bool = False,
    ) -> Page:
        """
        One page. Raises InvalidRequest, SubscriptionMissing, NotSupported, BrokerUnavailable.

        It may have few, or none, and go on.
        """
        query = zlib.crc32(repr((wanted, oldest_first)).encode())
        at = _read_token(token, query) if token else None
        readers = await self._readers(wanted, at, oldest_first=oldest_first, settled=settled)
        merge = Merge(list(readers.values()), newest_first=not oldest_first)
        budget = Budget(PAGE_RECORDS, PAGE_SECONDS)
        found: list[Found] = []
        room = PAGE_BYTES
        while len(found) < size and room > 0:
            letter = await merge.take(budget)
            if letter is None:
                break
            state = self._ledger(letter.broker).marks.state(letter.key)
            found.append(Found(letter, state))
            room -= letter.data_bytes if with_data else 0
        if with_data:
            found = await self._whole(found)
        if merge.is_over:
            return Page(found, "")
        places = {key: (reader.resume, reader.log.end) for key, reader in readers.items()}
        return Page(found, _write_token(_Token(query, places)))

    async def _readers(
        self,
        wanted: Filter,
        token: _Token | None,
        *,
        oldest_first: bool,
        settled: bool,
    ) -> Mapping[str, Reader]:
        kind = Forward if oldest_first else Backward
        readers: dict[str, Reader] = {}
        for name, places in self._places(wanted).items():
            broker, ledger = self._brokers[name], self._ledger(name)
            logs = await logs_of(broker, places)
            await ledger.catch_up()
            forget(ledger, logs)

            def choose(
                each: Log,
                stored: StoredEvent,
                broker: Broker = broker,
                places: Sequence[Place] = places,
                ledger: Ledger = ledger,
            ) -> DeadLetter | None:
                letter = pick(broker, places, each, stored)
                if letter is None or not wanted.wants(letter):
                    return None
                return letter if settled or ledger.marks.state(letter.key) not in DONE else None

            for each in logs:
                key = f"{name} {each.topic} {log_key(each)}"
                if token is None:
                    readers[key] = kind(broker, each, choose)
                elif key in token.places:
                    # What came since the first page is not of this list.
                    number, end = token.places[key]
                    same = msgspec.structs.replace(each, end=min(each.end, end))
                    readers[key] = kind(broker, same, choose, number)
        return readers

    async def _whole(self, found: Sequence[Found]) -> list[Found]:
        """With their data, but for what has gone meanwhile."""
        there: dict[tuple[str, Key], DeadLetter] = {}
        for name in {one.letter.broker for one in found}:
            letters = [one.letter for one in found if one.letter.broker == name]
            read = await whole(self._brokers[name], letters)
            there.update(((name, key), letter) for key, letter in read.items())
        at = ((one, (one.letter.broker, one.letter.key)) for one in found)
        return [Found(there[key], one.state) for one, key in at if key in there]

    async def get(self, name: LetterId) -> Found:
        """Raises DeadLetterMissing, NotSupported, BrokerUnavailable, BrokerRefused."""
        broker, ledger = self._broker(name.broker), self._ledger(name.broker)
        for each in await broker.logs(name.topic):
            if each.partition != name.partition or life(each) != name.life:
                continue
            if not each.first <= name.number < each.end:
                continue
            page = await broker.read(each, name.number, 1)
            letter = letter_of(broker.name, each, page[0], with_data=True) if page else None
            if letter is not None and letter.id == name:
                await ledger.catch_up()
                return Found(letter, ledger.marks.state(letter.key))
        raise DeadLetterMissing(f"there is no dead letter {name} (any more)", id=name)

    # -- doing

    async def run(self, order: Order) -> AsyncGenerator[tuple[Progress, bool]]:
        """
        Redrive or discard: the progress about once a second, at last with True.

        Raises as `page`, and what ended it half-way, after the progress so far. Closed early, it
        stops after what is under way.
        """
        if self._publisher.draining or self._tasks is None:
            raise Draining("the sidecar is stopping: call another, or again soon")
        places, progress, patience = self._places(order.filter), Progress(), Patience(self._clock)
        # Not the caller's: when that is cancelled, what is under way is still brought to its end.
        task = self._tasks.create_task(self._ended(order, places, progress, patience))
        self._jobs[task] = patience
        task.add_done_callback(self._jobs.pop)
        try:
            while not (await asyncio.wait([task], timeout=PROGRESS_SECONDS))[0]:
                yield progress, False
        finally:
            patience.stop.set()
        error = Draining("the sidecar is stopping") if task.cancelled() else task.result()
        yield progress, error is None
        if error is not None:
            raise error

    async def _ended(
        self,
        order: Order,
        places: Mapping[str, Sequence[Place]],
        progress: Progress,
        patience: Patience,
    ) -> Exception | None:
        """Why it ended early; as a value, or it would end the other jobs too."""
        try:
            await self._run(order, places, progress, patience)
        except Exception as error:  # noqa: BLE001 - the caller gets it
            return error
        return None

    async def _run(
        self,
        order: Order,
        places: Mapping[str, Sequence[Place]],
        progress: Progress,
        patience: Patience,
    ) -> None:
        pacer = Pacer(order.rate)
        for name, of_broker in places.items():
            broker, ledger = self._brokers[name], self._ledger(name)
            worker = Worker(
                order,
                broker=broker,
                brokers=self._brokers,
                ledger=ledger,
                publisher=self._publisher,
                pacer=pacer,
                patience=patience,
                progress=progress,
                clock=self._clock,
            )
            job = Job(
                order,
                of_broker,
                broker=broker,
                ledger=ledger,
                worker=worker,
                patience=patience,
                progress=progress,
            )
            await job.run()
        if patience.stop.is_set():
            raise Draining("stopped before all was done: what is left stays, call again")

    def stop(self) -> None:
        """Let no job begin anything more."""
        for patience in self._jobs.values():
            patience.stop.set()

    async def drain(self, seconds: float = STOP_SECONDS) -> None:
        """End all jobs after what is under way, or after so long."""
        self.stop()
        if self._jobs:
            _, late = await asyncio.wait(list(self._jobs), timeout=seconds)
            for task in late:
                task.cancel()


def _write_token(token: _Token) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(token)).decode()


def _read_token(text: str, query: int) -> _Token:
    """Raises InvalidRequest."""
    try:
        token = msgspec.msgpack.decode(base64.urlsafe_b64decode(text), type=_Token)
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise InvalidRequest("page_token: it is none of ours", field="page_token") from error
    if token.query != query:
        raise InvalidRequest(
            "page_token: it is of another list: use it with the same filter and order",
            field="page_token",
        )
    return token
