"""Storing dead letters: the event unchanged, and in headers why, from where and after how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sidecar.errors import EventTooLarge
from sidecar.event import NOTHING, Event, Receipt
from sidecar.wire.timestamps import format_rfc3339, now_ns

if TYPE_CHECKING:
    from sidecar.broker import Incoming
    from sidecar.config import Subscription as Settings
    from sidecar.delivery.held import Held
    from sidecar.event import Outcome
    from sidecar.publishing.publisher import Publisher

PREFIX = "sidecar-dead-letter-"
REDRIVE_PREFIX = "sidecar-redrive-"
OURS = (PREFIX, REDRIVE_PREFIX)
"""How the headers begin that say something of a dead letter, and nothing of the event."""
MAX_ERROR_LENGTH = 1000
MAX_RAW_BYTES = 512 * 1024
"""Of what is no event, and too large for one, so much is kept."""


class DeadLetters:
    """Where one subscription's dead letters go."""

    def __init__(
        self,
        settings: Settings,
        publisher: Publisher,
        *,
        source_broker: str,
        broker: str,
        topic: str,
    ) -> None:
        """*topic* may hold "{topic}", the event's own; *broker* stores, *source_broker* delivered."""
        self._settings = settings
        self._publisher = publisher
        self._source_broker = source_broker
        self._broker = broker
        self._topic = topic

    async def store(self, held: Held, *, reason: str, error: str) -> None:
        """
        Store one dead letter. Raises the SidecarError of the try that failed.

        Storing the same one again, after a crash before its ack, gives no second copy: its broker
        id is made of the subscription and the position.
        """
        letter = self._letter(held, reason=reason, error=error)
        outcome = await self._publish(held.incoming, letter)
        if isinstance(outcome, EventTooLarge) and held.incoming.event is None:
            # Bytes of somebody else's, larger than an event may be: their beginning is better
            # than a partition that stands still for ever.
            outcome = await self._publish(held.incoming, _cut(letter))
        if not isinstance(outcome, Receipt):
            raise outcome

    async def _publish(self, incoming: Incoming, letter: Event) -> Outcome:
        topic = self._topic.replace("{topic}", incoming.topic)
        broker_id = f"dead-letter/{self._settings.name}/{self._source_broker}/{_place(incoming)}"
        outcomes = await self._publisher.publish_to(
            self._broker, topic, [letter], broker_ids=[broker_id], label=self._topic
        )
        return outcomes[0]

    def _letter(self, held: Held, *, reason: str, error: str) -> Event:
        incoming = held.incoming
        event = incoming.event or _undecodable(incoming)
        kept = {name: v for name, v in event.headers.items() if not name.startswith(OURS)}
        headers = {
            **kept,
            f"{PREFIX}reason": reason,
            f"{PREFIX}error": printable(error),
            f"{PREFIX}topic": incoming.topic,
            f"{PREFIX}broker": self._source_broker,
            f"{PREFIX}subscription": self._settings.name,
            f"{PREFIX}attempts": str(held.attempt),
            f"{PREFIX}generation": str(generation_of(event) + 1),
            f"{PREFIX}first-failed": format_rfc3339(held.first_failed) if held.first_failed else "",
            f"{PREFIX}time": format_rfc3339(now_ns()),
        }
        position = incoming.position
        if position is not None:
            place = {
                "stream": position.stream,
                "sequence": str(position.sequence or ""),
                "partition": "" if position.partition is None else str(position.partition),
                "offset": "" if position.offset is None else str(position.offset),
            }
            headers |= {f"{PREFIX}{name}": value for name, value in place.items() if value}
        return Event(
            id=event.id,
            source=event.source,
            type=event.type,
            time_ns=event.time_ns,
            data=event.data,
            key=event.key,
            content_type=event.content_type,
            subject=event.subject,
            schema=event.schema,
            extensions=event.extensions,
            headers={name: value for name, value in headers.items() if value},
        )


def _cut(letter: Event) -> Event:
    """With the beginning of its data, and a header that says how many bytes there were."""
    data = letter.data or b""
    headers = {**letter.headers, f"{PREFIX}cut-from-bytes": str(len(data))}
    return msgspec.structs.replace(letter, data=data[:MAX_RAW_BYTES], headers=headers)


def generation_of(event: Event) -> int:
    """How often an event was a dead letter before it was redriven to here."""
    text = event.headers.get(f"{REDRIVE_PREFIX}generation", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0  # noqa: PLR2004


def printable(text: str) -> str:
    """Text of an app as a header's value: one line, bounded."""
    line = "".join(c if c.isprintable() else " " for c in text[:MAX_ERROR_LENGTH])
    return line.encode("ascii", "backslashreplace").decode().strip()


def _place(incoming: Incoming) -> str:
    position = incoming.position
    if position is None:
        event = incoming.event
        return f"{event.source}/{event.id}" if event is not None else str(now_ns())
    if position.partition is not None:
        return f"{incoming.topic}/{position.partition}/{position.offset}"
    return f"{position.stream}/{position.sequence}"


def _undecodable(incoming: Incoming) -> Event:
    """The bytes of what is no event, as one: nothing is lost, and the lane goes on."""
    return Event(
        id=_place(incoming),
        source=f"/{incoming.topic}",
        type="sidecar.undecodable",
        time_ns=now_ns(),
        data=incoming.raw,
        content_type="application/octet-stream",
        extensions=NOTHING,
    )
