"""
A few dead letters on their way: claimed, published at the rate, marked done, deleted.

Killed at any point, what was claimed is taken over by whoever redrives next, who looks whether it
was published. So each step stores what the next one relies on: the claim before the publish, the
end after it, and the letter is deleted last.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from sidecar.delivery.redrive.claims import ROOM_SECONDS, good_for, may_use
from sidecar.delivery.redrive.letter import log_key
from sidecar.delivery.redrive.marks import DONE, Claimed, Kind, Mark, State, Target
from sidecar.delivery.redrive.patience import MAYBE_DONE, NOT_NOW, Patience
from sidecar.delivery.redrive.reading import by_log, whole
from sidecar.delivery.redrive.traces import Traces
from sidecar.errors import BrokerUnavailable, NotSupported, OutcomeUnknown, SidecarError
from sidecar.event import Receipt, check_topic
from sidecar.wire.attributes import new_id
from sidecar.wire.timestamps import now_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sidecar.broker import Broker
    from sidecar.delivery.redrive.filters import Filter
    from sidecar.delivery.redrive.ledger import Ledger
    from sidecar.delivery.redrive.letter import DeadLetter, Key
    from sidecar.delivery.redrive.marks import Held
    from sidecar.delivery.redrive.pacing import Pacer
    from sidecar.publishing.publisher import Publisher

log = logging.getLogger(__name__)


class Order(msgspec.Struct, frozen=True):
    """What is to be done. *kind* is REDRIVE or DISCARD."""

    kind: Kind
    filter: Filter
    rate: float = 100.0
    to_topic: str = ""
    to_broker: str = ""
    dry_run: bool = False
    limit: int | None = None


class Progress(msgspec.Struct):
    """How far it is: as DeadLettersProgress."""

    scanned: int = 0
    matched: int = 0
    done: int = 0
    failed: int = 0
    waiting: int = 0
    total: int = 0
    failure: SidecarError | None = None

    def failed_at(self, letter: DeadLetter, error: SidecarError) -> None:
        self.failed += 1
        self.failure = error
        log.warning("dead letter %s: %s", letter.id, error.message)


class Ends:
    """What became of the letters of a batch."""

    def __init__(self) -> None:
        self.redriven: list[DeadLetter] = []
        self.discarded: list[DeadLetter] = []
        self.released: list[DeadLetter] = []
        self.again: list[DeadLetter] = []
        """To be looked at again: lost to another claim, released, or perhaps published."""
        self.trouble: SidecarError | None = None
        """Why it is better to wait before the next batch."""


class Worker:
    """Does what an Order says to batches of the dead letters of one broker."""

    def __init__(
        self,
        order: Order,
        *,
        broker: Broker,
        brokers: Mapping[str, Broker],
        ledger: Ledger,
        publisher: Publisher,
        pacer: Pacer,
        patience: Patience,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._order = order
        self.broker = broker
        self.brokers = brokers
        self._ledger = ledger
        self.publisher = publisher
        self.pacer = pacer
        self.patience = patience
        self.progress = progress
        self.clock = clock

    @property
    def _redrives(self) -> bool:
        return self._order.kind is Kind.REDRIVE

    async def work(self, letters: Sequence[DeadLetter]) -> Ends:
        """
        Claim them, do it, and say so. Raises what a broker that stays away raises, and others that
        end the job; what was claimed is taken over later.
        """
        ends = Ends()
        going = await self._aim(letters) if self._redrives else {}
        if self._redrives:
            letters = [letter for letter in letters if letter.key in going]
        if not letters:
            return ends
        # The first one's turn is awaited before the claim, or a slow rate would outlast it.
        due = await self.pacer.due(len(letters), self.patience.stop) if self._redrives else 0
        if self.patience.stop.is_set():
            return ends
        # Non-obvious: since these were chosen, somebody's reading of the marks may have shown that
        # they are claimed. Taken over unwatched, they would be published by two.
        ends.again += (letter for letter in letters if not self._is_free(letter))
        letters = [letter for letter in letters if self._is_free(letter)]
        if not letters:
            return ends
        held = {letter.key: self._ledger.marks.held(letter.key) for letter in letters}
        claim, made = self._claim(letters, held, going), self.clock()
        try:
            await self._ledger.add(claim)
        except (*MAYBE_DONE, *NOT_NOW) as error:
            ends.again += letters  # it may count: the marks will say
            ends.trouble = error
            return ends
        won = [letter for letter in letters if self._has(letter, claim)]
        ends.again += (letter for letter in letters if not self._has(letter, claim))
        rest = await self.patience.until_done(lambda: self._left_to_do(won, held, going, ends))
        if self._redrives:
            await _Publishing(self, going, made, ends).run(rest, due)
        else:
            ends.discarded += rest
        await self._end(claim, ends)
        return ends

    def _is_free(self, letter: DeadLetter) -> bool:
        return self._ledger.is_free(letter.key)

    def _claim(
        self,
        letters: Sequence[DeadLetter],
        held: Mapping[Key, Held | None],
        going: Mapping[Key, Target],
    ) -> Mark:
        targets = tuple({(t.broker, t.topic): t for t in going.values()}.values())
        claimed = (
            Claimed(
                letter.key.log,
                letter.number,
                targets.index(going[letter.key]) if going else 0,
                over.claim if (over := held[letter.key]) else "",
            )
            for letter in letters
        )
        good_seconds = good_for(self.publisher.timeout_seconds)
        kind, id_ = self._order.kind, new_id()
        return Mark(kind, id_, now_ns(), tuple(claimed), targets, good_seconds)

    def _has(self, letter: DeadLetter, claim: Mark) -> bool:
        held = self._ledger.marks.held(letter.key)
        return held is not None and held.claim == claim.claim

    # -- where to

    async def _aim(self, letters: Sequence[DeadLetter]) -> Mapping[Key, Target]:
        """Where each goes, and how far its logs are now. Those that can go nowhere have failed."""
        going: dict[Key, Target] = {}
        targets: dict[tuple[str, str], Target] = {}
        for letter in letters:
            try:
                at = self._target(letter)
                if at not in targets:
                    targets[at] = await self._seen_now(*at)
            except BrokerUnavailable:
                raise
            except SidecarError as error:
                self.progress.failed_at(letter, error)
            else:
                going[letter.key] = targets[at]
        return going

    def _target(self, letter: DeadLetter) -> tuple[str, str]:
        """Raises NoRoute, InvalidTopic, NotSupported."""
        order, came = self._order, letter.says("topic")
        topic = order.to_topic.replace("{topic}", came) or came
        check_topic(topic)
        broker = order.to_broker
        if not broker and order.to_topic:
            broker = self.publisher.routes.route(topic, letter.event.type).broker
        broker = broker or letter.says("broker")
        if broker not in self.brokers:
            raise NotSupported(
                f"{letter.id}: it came from broker {broker!r}, and there is none of that name here: "
                "say where to redrive it",
                broker=broker,
            )
        return broker, topic

    async def _seen_now(self, broker: str, topic: str) -> Target:
        target = self.brokers[broker]
        if not target.capabilities.browses:
            return Target(broker, topic, None)
        logs = await self.patience.until_done(lambda: target.logs(topic))
        return Target(broker, topic, {log_key(each): each.end for each in logs})

    # -- what was taken over

    async def _left_to_do(
        self,
        won: Sequence[DeadLetter],
        held: Mapping[Key, Held | None],
        going: Mapping[Key, Target],
        ends: Ends,
    ) -> list[DeadLetter]:
        """
        All but those that a claim of before has published: they are redriven.

        And but those of which that cannot be seen: they stay as they are, unless somebody names
        them, or they are to be discarded.
        """
        doubts = {key: held.doubts for key, held in held.items() if held is not None}
        traces = Traces(self.brokers)
        await traces.look(doubt for of_letter in doubts.values() for doubt in of_letter)
        rest: list[DeadLetter] = []
        for letter in won:
            of_letter = doubts.get(letter.key, ())
            if traces.has(letter, of_letter):
                ends.redriven.append(letter)
            elif (
                not self._redrives
                or self._order.filter.ids
                or traces.can_tell(of_letter, going[letter.key])
            ):
                rest.append(letter)
            else:
                self.progress.failed_at(letter, _in_doubt(letter, of_letter[0].target))
        return rest

    # -- the end

    async def _end(self, claim: Mark, ends: Ends) -> None:
        for kind, letters in (
            (Kind.REDRIVEN, ends.redriven),
            (Kind.DISCARDED, ends.discarded),
            (Kind.RELEASED, ends.released),
        ):
            if letters:
                await self._end_as(kind, letters, claim)
        state = self._ledger.marks.state
        ended = (*ends.redriven, *ends.discarded)
        # What was taken over meanwhile is for whoever has it to end.
        await self.delete(letter for letter in ended if state(letter.key) in DONE)

    async def _end_as(self, kind: Kind, letters: Sequence[DeadLetter], claim: Mark) -> None:
        ours = [letter for letter in letters if self._has(letter, claim)]
        names = tuple(Claimed(letter.key.log, letter.number) for letter in letters)
        mark = Mark(kind, claim.claim, now_ns(), names)
        await self.patience.until_done(lambda: self._ledger.add(mark))
        if kind is not Kind.RELEASED:
            done = State(kind.value)
            self.progress.done += sum(self._ledger.marks.state(one.key) is done for one in ours)

    async def delete(self, letters: Iterable[DeadLetter]) -> None:
        """Of letters that are done, where the broker can: the marks hide them all the same."""
        if not self.broker.capabilities.deletes or self._order.dry_run:
            return
        for of, numbers in by_log(letters):
            await self.patience.until_done(lambda of=of, n=numbers: self.broker.delete(of, n))  # type: ignore[misc]


class _Publishing:
    """The middle part of a batch."""

    def __init__(
        self, worker: Worker, going: Mapping[Key, Target], made: float, ends: Ends
    ) -> None:
        self._worker = worker
        self._going = going
        self._made = made
        self._ends = ends

    async def run(self, letters: Sequence[DeadLetter], due: int) -> None:
        """In order and at the rate, while the claim is good; what was not begun is released."""
        worker, ends = self._worker, self._ends
        found = await worker.patience.until_done(lambda: whole(worker.broker, letters))
        # What is gone was deleted by hand, or fell out of its topic's retention.
        ends.released += (letter for letter in letters if letter.key not in found)
        rest = [found[letter.key] for letter in letters if letter.key in found]
        stop = worker.patience.stop
        while rest:
            due = min(len(rest), due) or await worker.pacer.due(len(rest), stop)
            if stop.is_set() or ends.trouble or not may_use(self._made, worker.clock()):
                ends.released += rest
                ends.again += rest
                return
            target = self._going[rest[0].key]
            same = 1
            while same < due and self._going[rest[same].key] is target:
                same += 1
            await self._publish(rest[:same], target)
            due, rest = due - same, rest[same:]

    async def _publish(self, letters: Sequence[DeadLetter], target: Target) -> None:
        ends = self._ends
        try:
            outcomes: Sequence[Receipt | SidecarError] = await self._worker.publisher.publish_to(
                target.broker,
                target.topic,
                [letter.redriven() for letter in letters],
                # Not the event's own: inside its window, the broker would drop it as a duplicate.
                broker_ids=[f"redrive/{letter.id}" for letter in letters],
                label="redrive",
                wait=ROOM_SECONDS,
            )
        except SidecarError as error:
            outcomes = [error] * len(letters)
        for letter, outcome in zip(letters, outcomes, strict=True):
            if isinstance(outcome, Receipt):
                ends.redriven.append(letter)
                continue
            if isinstance(outcome, MAYBE_DONE):
                ends.again.append(letter)  # it stays claimed, and is looked for when that is over
                ends.trouble = outcome
                continue
            ends.released.append(letter)
            if isinstance(outcome, NOT_NOW):
                ends.again.append(letter)
                ends.trouble = outcome
            else:
                self._worker.progress.failed_at(letter, outcome)


def _in_doubt(letter: DeadLetter, target: Target) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"{letter.id}: a redrive to {target.topic!r} was interrupted, and whether this one was "
        "published cannot be seen there any more. Redrive it by its id to publish it in any case, or "
        "discard it",
        broker=target.broker,
    )
