"""Events as the command line reads and prints them: a line of JSON each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from sidecar.client import Event, new_event
from sidecar.errors import InvalidEvent, MalformedBody
from sidecar.event import NOTHING
from sidecar.wire.attributes import new_id
from sidecar.wire.cloudevents import from_json_fields, json_fields, to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sidecar.client import Delivery, Position, Receipt

_is_json = msgspec.json.Decoder(msgspec.Raw).decode
_VERSION = msgspec.Raw(b'"1.0"')
_ABSENT = msgspec.Raw(b'"absent"')


def event_of_data(data: bytes | None, template: Event) -> Event:
    """*data* with the attributes of *template*."""
    content_type = template.content_type
    if data is not None and not content_type:
        content_type = guess_content_type(data)
    return msgspec.structs.replace(template, data=data, content_type=content_type)


def guess_content_type(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError:
        return "application/octet-stream"
    try:
        _is_json(data)
    except (msgspec.DecodeError, RecursionError):
        return "text/plain; charset=utf-8"
    return "application/json"


def event_of_line(line: bytes, template: Event) -> Event:
    """
    The event of a line of CloudEvents JSON; what it leaves out is as in *template*.

    Raises InvalidEvent.
    """
    try:
        fields = json_fields(line)
    except MalformedBody as error:
        raise InvalidEvent(error.message) from error
    said = {name: name in fields for name in ("type", "source")}
    fields.setdefault("specversion", _VERSION)
    fields.setdefault("id", msgspec.Raw(msgspec.json.encode(new_id())))
    fields.setdefault("type", _ABSENT)
    fields.setdefault("source", _ABSENT)
    event = from_json_fields(fields, headers=template.headers)
    return msgspec.structs.replace(
        event,
        # Empty ones are for the sidecar to fill in: it knows the app's name and the topic's defaults.
        type=event.type if said["type"] else template.type,
        source=event.source if said["source"] else template.source,
        key=event.key or template.key,
        subject=event.subject or template.subject,
        content_type=event.content_type or template.content_type,
        extensions={**template.extensions, **event.extensions},
    )


def template_of(
    *,
    type: str,  # noqa: A002 - the attribute's name
    id: str,  # noqa: A002
    source: str,
    key: str,
    subject: str,
    content_type: str,
    extensions: Mapping[str, str],
    headers: Mapping[str, str],
) -> Event:
    """What the options say of every event."""
    return new_event(
        type,
        id=id,
        source=source,
        key=key,
        subject=subject,
        content_type=content_type,
        extensions=extensions or NOTHING,
        headers=headers or NOTHING,
    )


def receipt_line(receipt: Receipt) -> bytes:
    line: dict[str, Any] = {
        "event_id": receipt.event_id,
        "broker": receipt.broker,
        "topic": receipt.topic,
        "durability": receipt.durability.name.lower(),
        "duplicate": receipt.duplicate,
    }
    if receipt.position is not None:
        line["position"] = _position(receipt.position)
    return msgspec.json.encode(line)


def delivery_line(delivery: Delivery) -> bytes:
    """The event under "event": its extensions may have any name, also one of ours."""
    line: dict[str, Any] = {
        "topic": delivery.topic,
        "attempt": delivery.attempt,
        "token": delivery.token,
    }
    if delivery.position is not None:
        line["position"] = _position(delivery.position)
    if delivery.event.headers:
        line["headers"] = delivery.event.headers
    line["event"] = msgspec.Raw(to_json(delivery.event))
    return msgspec.json.encode(line)


def _position(position: Position) -> dict[str, object]:
    if position.offset is not None:
        return {"partition": position.partition, "offset": position.offset}
    return {"stream": position.stream, "sequence": position.sequence}
