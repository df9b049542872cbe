"""How much a subscription asks its consumers for: pull requests, bounded in events and in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

PULLS = 4
"""Requests under way for each consumer: while one ends, the others keep the events coming."""
PULL_EVENTS = 1000
"""More in one request are pushed at once, faster than a connection takes them."""
PULL_SECONDS = 30
LARGE_SECONDS = 5
"""For the event that fits in no request: it is there, so it comes at once, or is gone."""
_SILENT_SECONDS = PULL_SECONDS + 10
_FRAME_BYTES = 1024
"""Subjects, on top of the largest message."""


class Slot:
    """Room for one open pull. Its events come to a subject of their own, so they can be counted."""

    __slots__ = ("asked_at", "bounded", "bytes", "events", "number", "serial", "untouched")

    def __init__(self, number: int) -> None:
        self.number = number
        """Unique in its source."""
        self.serial = 0
        """Of its pull, to know what is said of an older one."""
        self.events = 0
        """That its pull still owes; 0: there is none."""
        self.bytes = 0
        """That these may have."""
        self.bounded = False
        """The server counts the bytes; else each event may be as large as any."""
        self.untouched = False
        """Nothing came of it yet."""
        self.asked_at = 0.0


class Asked:
    """What is asked of one consumer."""

    __slots__ = ("careful", "large", "most", "slots")

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self.careful = True
        """
        Events may be waiting there to be delivered again, and the server bounds no bytes.

        Non-obvious: it puts such an event behind all others when it does not fit in any request.
        """
        self.large = False
        """The next event does not fit in a request: it is asked for alone."""

        self.most: int | None = None
        """Be owed no more events than this; None: as many as there is room for."""

    @property
    def events(self) -> int:
        return sum(slot.events for slot in self.slots)


class Pull(NamedTuple):
    """A request to write."""

    asked: Asked
    slot: Slot
    events: int
    max_bytes: int
    """0: as many as they have."""
    seconds: int


class Pulls:
    """
    Decides what to ask for, and knows what is owed.

    What is owed and what is held is no more than *max_bytes*, but for one event.
    """

    def __init__(
        self, max_in_flight: int, max_bytes: int, largest_message: Callable[[], int]
    ) -> None:
        """*largest_message*: bytes that the server takes in one message."""
        self._few = min(PULL_EVENTS, max(1, max_in_flight // 4))
        """Room for fewer is not worth a request."""
        self._max_bytes = max_bytes
        self._largest_message = largest_message
        self._all: list[Asked] = []
        self._numbered = 0
        self._alone: Slot | None = None
        """The pull for an event that is larger than what there is room for."""

    def new(self) -> Asked:
        """For one more consumer, once it is added."""
        self._numbered += PULLS
        return Asked([Slot(self._numbered - number) for number in range(PULLS)])

    def add(self, asked: Asked) -> None:
        self._all.append(asked)

    @property
    def owed(self) -> int:
        """Events."""
        return sum(asked.events for asked in self._all)

    def wanted(self, room: int, held_bytes: int, now: float) -> list[Pull]:
        """
        What to ask for now, with room for so many events beside those that are owed.

        Every consumer is owed one at least, so that none starves behind a busy neighbour: of n
        consumers, n - 1 events may come above the room.
        """
        if not self._all:
            return []
        self._end_silent(now)
        share, rest = divmod(max(0, room), len(self._all))
        least = 1 if room > 0 or len(self._all) > 1 else 0
        pulls: list[Pull] = []
        free = self._max_bytes - held_bytes
        free -= sum(slot.bytes for asked in self._all for slot in asked.slots)
        for index, asked in enumerate(self._all):
            left = max(share + (index < rest), 0 if asked.events else least)
            if asked.most is not None:
                left = min(left, asked.most - asked.events)
            for slot in asked.slots:
                if slot.events:
                    if slot is self._alone:
                        break
                    continue
                if left < (self._few if asked.events else 1):
                    break
                pull = self._pull(asked, slot, min(left, PULL_EVENTS), free)
                if pull is None:
                    break
                slot.asked_at = now
                pulls.append(pull)
                left -= pull.events
                free -= slot.bytes
                if slot is self._alone:
                    break
        return pulls

    def _pull(self, asked: Asked, slot: Slot, events: int, free: int) -> Pull | None:
        """Of at most so many events, and not more bytes than are free. None: not now."""
        largest = self._largest_message() + _FRAME_BYTES
        if asked.large:
            if self._alone is not None or free < 0:
                return None
            asked.large = False
            self._alone = slot
            self._open(slot, 1, largest, bounded=False)
            return Pull(asked, slot, 1, 0, LARGE_SECONDS)
        # All slots together are the bound, so that each consumer has its part of it.
        part = max(1, self._max_bytes // (PULLS * len(self._all)))
        size = min(part, free)
        if size < (part + 1) // 2:
            return None
        if asked.careful and size >= largest:
            events = min(events, size // largest)
            self._open(slot, events, events * largest, bounded=False)
            return Pull(asked, slot, events, 0, PULL_SECONDS)
        self._open(slot, events, size, bounded=True)
        return Pull(asked, slot, events, size, PULL_SECONDS)

    def _open(self, slot: Slot, events: int, size: int, *, bounded: bool) -> None:
        slot.serial += 1
        slot.events, slot.bytes, slot.bounded = events, size, bounded
        slot.untouched = True

    def arrived(self, slot: Slot, size: int) -> None:
        """An event came, of so many bytes as the server counts them."""
        if not slot.events:  # of a pull that we gave up
            return
        slot.untouched = False
        slot.bytes -= size if slot.bounded else slot.bytes // slot.events
        slot.events -= 1
        # Non-obvious: a pull ends without a word when an event takes its last byte.
        if not slot.events or (slot.bounded and slot.bytes <= 0):
            self._end(slot)

    def ended(self, asked: Asked, slot: Slot, *, too_large: bool) -> None:
        """The server ended the slot's pull; *too_large*: because the next event does not fit."""
        if too_large and slot.untouched:
            asked.large = True
        self._end(slot)

    def end_all(self, asked: Asked) -> None:
        """This consumer ended them, or never took them."""
        asked.careful = True
        for slot in asked.slots:
            self._end(slot)

    def forget(self) -> None:
        """Whatever is owed is not known any more: it will be asked for anew."""
        for asked in self._all:
            self.end_all(asked)
            for slot in asked.slots:
                slot.serial += 1

    def _end_silent(self, now: float) -> None:
        for asked in self._all:
            for slot in asked.slots:
                if slot.events and now - slot.asked_at > _SILENT_SECONDS:
                    self._end(slot)

    def _end(self, slot: Slot) -> None:
        slot.events = slot.bytes = 0
        if slot is self._alone:
            self._alone = None
