"""A dead letter as it lies at its broker: its name, what its headers say, and the event in it."""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING

import msgspec

from sidecar.delivery.deadletters import PREFIX
from sidecar.errors import InvalidRequest
from sidecar.event import Event, Position
from sidecar.wire.timestamps import parse_rfc3339

if TYPE_CHECKING:
    from sidecar.broker import Log, StoredEvent

REDRIVE_ID = "sidecar-redrive-id"
"""Header of a redriven event: the id of the dead letter that it was."""
REDRIVE_GENERATION = "sidecar-redrive-generation"
"""Header of a redriven event: how often it has been a dead letter."""

_ID = re.compile(r"([^/~\s]+)/([A-Za-z0-9_.-]+)(?:/(\d{1,10}))?/(\d{1,19})~([0-9a-f]{8})", re.ASCII)
MAX_ID_LENGTH = 512


class Key(msgspec.Struct, frozen=True, order=True):
    """A dead letter among those of its broker: its log, as `log_key` has it, and number."""

    log: str
    number: int


class LetterId(msgspec.Struct, frozen=True):
    """What names a dead letter to people: where it is, and in which life of its log."""

    broker: str
    topic: str
    partition: int | None
    number: int
    life: str

    def __str__(self) -> str:
        partition = "" if self.partition is None else f"/{self.partition}"
        return f"{self.broker}/{self.topic}{partition}/{self.number}~{self.life}"

    @staticmethod
    def parse(text: str) -> LetterId:
        """Raises InvalidRequest."""
        found = _ID.fullmatch(text[:MAX_ID_LENGTH])
        if found is None:
            raise InvalidRequest(
                f"{text[:80]!r} is not the id of a dead letter: use one that a list shows, as "
                '"events/dlq.orders/17~0a1b2c3d"',
                field="id",
            )
        broker, topic, partition, number, life = found.groups()
        return LetterId(
            broker, topic, None if partition is None else int(partition), int(number), life
        )


class DeadLetter(msgspec.Struct, frozen=True):
    """One dead letter, as it was read. Numbers are 0 and texts empty where its headers say none."""

    broker: str
    log: Log
    topic: str
    number: int
    stored_ns: int
    event: Event
    """With the headers of dead letters; without its data, unless that was asked for."""
    data_bytes: int

    @property
    def key(self) -> Key:
        return Key(log_key(self.log), self.number)

    @property
    def id(self) -> LetterId:
        return LetterId(self.broker, self.topic, self.log.partition, self.number, life(self.log))

    def says(self, name: str) -> str:
        return self.event.headers.get(PREFIX + name, "")

    @property
    def generation(self) -> int:
        return _number(self.says("generation")) or 1

    @property
    def attempts(self) -> int:
        return _number(self.says("attempts"))

    @property
    def first_failed_ns(self) -> int:
        return _time(self.says("first-failed"))

    @property
    def last_failed_ns(self) -> int:
        return _time(self.says("time"))

    @property
    def came_from(self) -> Position | None:
        """Where the event was when it failed."""
        stream, offset = self.says("stream"), self.says("offset")
        if stream:
            return Position(stream=stream, sequence=_number(self.says("sequence")))
        if offset:
            partition = _number(self.says("partition"))
            return Position(partition=partition, offset=_number(offset))
        return None

    @property
    def position(self) -> Position:
        """Where the dead letter is."""
        if self.log.partition is not None:
            return Position(partition=self.log.partition, offset=self.number)
        return Position(stream=self.log.stream, sequence=self.number)

    def original(self) -> Event:
        """The event as it was published, without what became of it."""
        ours = (PREFIX, REDRIVE_ID, REDRIVE_GENERATION)
        headers = {
            name: value for name, value in self.event.headers.items() if not name.startswith(ours)
        }
        return msgspec.structs.replace(self.event, headers=headers)

    def redriven(self) -> Event:
        """The event to publish again: it says of which dead letter it is, and how often it was one."""
        event = self.original()
        headers = {
            **event.headers,
            REDRIVE_ID: str(self.id),
            REDRIVE_GENERATION: str(self.generation),
        }
        return msgspec.structs.replace(event, headers=headers)


def letter_of(
    broker: str, log: Log, stored: StoredEvent, *, with_data: bool = False
) -> DeadLetter | None:
    """None: it is no dead letter of ours."""
    event = stored.event
    if event is None or f"{PREFIX}subscription" not in event.headers:
        return None
    size = len(event.data or b"")
    if not with_data and event.data:
        event = msgspec.structs.replace(event, data=None)
    return DeadLetter(broker, log, stored.topic, stored.number, stored.stored_ns, event, size)


def log_key(log: Log) -> str:
    """A log among those of its broker; a topic that is made anew is another one."""
    place = log.stream if log.partition is None else f"{log.topic}/{log.partition}"
    return f"{place}~{life(log)}"


def life(log: Log) -> str:
    """Eight digits that differ when a stream or topic was made anew."""
    return f"{zlib.crc32(f'{log.stream}~{log.incarnation}'.encode()):08x}"


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0  # noqa: PLR2004


def _time(text: str) -> int:
    try:
        return parse_rfc3339(text) if text else 0
    except ValueError:
        return 0
