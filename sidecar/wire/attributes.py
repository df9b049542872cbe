"""The rules of an event's attributes and headers, held where events enter; percent-encoding."""
# ruff: noqa: A001, A002 - parameters are named as the attributes of CloudEvents

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

from sidecar.errors import InvalidEvent
from sidecar.event import NOTHING, Event
from sidecar.wire.timestamps import MAX_TIME_NS, MIN_TIME_NS, now_ns, parse_rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ATTRIBUTE_BYTES = 4096
"""Of one attribute, in UTF-8."""
MAX_HEADER_BYTES = 8192
"""Of one header's value, in UTF-8: the limit of W3C baggage."""

CORE_ATTRIBUTES = frozenset(
    ("specversion", "id", "source", "type", "time", "datacontenttype", "dataschema", "subject")
)
"""The attributes that CloudEvents 1.0 defines; every other one is an extension."""

STRUCTURED_PREFIX = "application/cloudevents"
"""Media types that start so (in any case) say that the whole event is in the body."""


class Defaults(msgspec.Struct, frozen=True, gc=False):
    """
    What a message lacks that is an event only by our leave; empty: there is none.

    *content_type* is for messages with data. An empty *id* mints one, and *time_ns* None is now.
    """

    source: str
    type: str
    content_type: str = ""
    id: str = ""
    time_ns: int | None = None


NO_DEFAULTS = Defaults(source="", type="")


def make_event(
    *,
    id: str,
    source: str,
    type: str,
    time_ns: int | None,
    data: bytes | None,
    key: str = "",
    content_type: str = "",
    subject: str = "",
    schema: str = "",
    extensions: Mapping[str, str] = NOTHING,
    headers: Mapping[str, str] = NOTHING,
    defaults: Defaults = NO_DEFAULTS,
    trust_headers: bool = False,
) -> Event:
    """
    The event that everything behind may trust: defaults filled in, every rule checked.

    Empty strings mean "absent". The extension `partitionkey` becomes the key. With *trust_headers*
    they are taken as they are: those of a message from elsewhere, which nobody can mend.

    Raises InvalidEvent; its metadata names the attribute as `field`, the way CloudEvents does
    ("datacontenttype", "partitionkey"), or "headers".
    """
    if extensions:
        key, extensions = _check_extensions(extensions, key)
    if headers and not trust_headers:
        headers = _check_headers(headers)
    id = id or defaults.id or new_id()
    source = source or defaults.source
    type = type or defaults.type
    if time_ns is None:
        time_ns = now_ns() if defaults.time_ns is None else defaults.time_ns
    if not content_type and data is not None:
        content_type = defaults.content_type
    # One pass over all strings: what is ASCII, printable and short breaks no rule but those of
    # the source and the schema (no spaces).
    text = f"{id}{source}{type}{key}{subject}{schema}"
    if (
        not (source and type and text.isascii() and text.isprintable())
        or len(text) > MAX_ATTRIBUTE_BYTES
        or " " in source
        or " " in schema
        or not MIN_TIME_NS <= time_ns <= MAX_TIME_NS
    ):
        _check_each(id, source, type, time_ns, key, subject, schema)
    return Event(
        id,
        source,
        type,
        time_ns,
        data,
        key,
        check_content_type(content_type) if content_type else "",
        subject,
        schema,
        extensions,
        headers,
    )


def new_id() -> str:
    """A fresh UUID (version 4, RFC 9562) as 32 hex digits; the uuid module takes thrice the time."""
    number = int.from_bytes(os.urandom(16), "big")
    return f"{number & _NOT_UUID_MARKS | _UUID4_MARKS:032x}"


_UUID4_MARKS = 0x4 << 76 | 0x8 << 60
_NOT_UUID_MARKS = ~(0xF << 76 | 0xC << 60)


def check_binary(attributes: Mapping[str, str], *, where: str) -> None:
    """Raise InvalidEvent unless this is CloudEvents 1.0 with all it requires. *where*: "header ce-"."""
    version = attributes.get("specversion")
    if version != "1.0":
        said = "is missing" if version is None else f"{version[:16]!a} is not supported"
        raise InvalidEvent(
            f'specversion {said}: send {where}specversion "1.0"', field="specversion"
        )
    for name in ("id", "source", "type"):
        if not attributes.get(name):
            raise InvalidEvent(
                f"{name} is missing: CloudEvents requires it, send {where}{name}", field=name
            )


def parse_time(text: str) -> int:
    """The attribute time, in ns. Raises InvalidEvent."""
    try:
        return parse_rfc3339(text)
    except ValueError as error:
        raise InvalidEvent(f"time is {error}", field="time") from error


# -- strings

# CloudEvents 1.0, "Type System": no control characters, surrogates, noncharacters.
_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
_SPACE = re.compile(r"\s")


def _check_each(  # noqa: PLR0917 - called once, and in the order of Event
    id: str, source: str, type: str, time_ns: int, key: str, subject: str, schema: str
) -> None:
    """Find what the fast check stumbled over; there may be nothing wrong."""
    for name, value in (("source", source), ("type", type)):
        if not value:
            raise InvalidEvent(
                f"{name} is missing: set it in the event, or a default for the topic", field=name
            )
    for name, value in (("source", source), ("dataschema", schema)):
        if _SPACE.search(value):
            raise InvalidEvent(f"{name} must be a URI, without spaces", field=name)
    for name, value in (
        ("id", id),
        ("source", source),
        ("type", type),
        ("partitionkey", key),
        ("subject", subject),
        ("dataschema", schema),
    ):
        _check_string(name, value)
    if not MIN_TIME_NS <= time_ns <= MAX_TIME_NS:
        raise InvalidEvent("time is outside of the years 1 to 9999", field="time")


def _check_string(name: str, value: str) -> None:
    if not value.isprintable() and _FORBIDDEN.search(value):
        raise InvalidEvent(
            f"{name} has characters that CloudEvents forbids: use Unicode text without control "
            "characters, surrogates and noncharacters",
            field=name,
        )
    if len(value) * 4 > MAX_ATTRIBUTE_BYTES and len(value.encode()) > MAX_ATTRIBUTE_BYTES:
        raise InvalidEvent(
            f"{name} is too long: an attribute has at most {MAX_ATTRIBUTE_BYTES} bytes", field=name
        )


@lru_cache(maxsize=256)
def check_content_type(text: str) -> str:
    """
    The content type without the spaces around it. Raises InvalidEvent.

    It travels as it is in HTTP and Kafka headers, so it is ASCII, and none of CloudEvents' own:
    those would say that the data is the event.
    """
    stripped = text.strip(" ")
    problem = ""
    if not (stripped.isascii() and stripped.isprintable()):
        problem = 'must be a media type in printable ASCII, as "application/json"'
    elif len(stripped) > MAX_ATTRIBUTE_BYTES:
        problem = f"is too long: an attribute has at most {MAX_ATTRIBUTE_BYTES} bytes"
    elif stripped.lower().startswith(STRUCTURED_PREFIX):
        problem = (
            f"must not be {STRUCTURED_PREFIX}…, which stands for a whole event: name the media "
            "type of the data"
        )
    if problem:
        raise InvalidEvent(f"datacontenttype {problem}", field="datacontenttype")
    return stripped


# -- extensions and headers

_NOT_EXTENSIONS = CORE_ATTRIBUTES | {"data", "data_base64"}
_EXTENSION_NAME = re.compile(r"[a-z0-9]{1,64}")
_HEADER_NAME = re.compile(r"(?!ce-|nats-|content-type$)[a-z0-9-]{1,256}")


def _check_extensions(extensions: Mapping[str, str], key: str) -> tuple[str, Mapping[str, str]]:
    for name, value in extensions.items():
        if not _EXTENSION_NAME.fullmatch(name):
            raise InvalidEvent(
                f"{name[:64]!a} is not an extension's name: use 1 to 64 lower-case letters "
                "and digits",
                field="extensions",
            )
        if name in _NOT_EXTENSIONS:
            raise InvalidEvent(
                f"{name} is no extension: CloudEvents has a field for it", field="extensions"
            )
        _check_string(name, value)
    partition_key = extensions.get("partitionkey", "")
    if partition_key and key and partition_key != key:
        raise InvalidEvent(
            "key and the extension partitionkey differ: they are the same thing, send one",
            field="partitionkey",
        )
    rest = {name: value for name, value in extensions.items() if name != "partitionkey"}
    return key or partition_key, rest or NOTHING


def _check_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    return {name: _check_header(name, value) for name, value in headers.items()}


def _check_header(name: str, value: str) -> str:
    if not _HEADER_NAME.fullmatch(name):
        raise InvalidEvent(
            f"{name[:64]!a} is not a header's name: use lower-case letters, digits and "
            '"-"; "ce-…", "nats-…" and "content-type" belong to the sidecar',
            field="headers",
        )
    if not value.isprintable():
        raise InvalidEvent(f"header {name} has characters that are not printable", field="headers")
    if len(value.encode()) > MAX_HEADER_BYTES:
        raise InvalidEvent(
            f"header {name} is too long: it has at most {MAX_HEADER_BYTES} bytes", field="headers"
        )
    return value.strip(" ")


# -- percent-encoding: HTTP binding 1.0.2, section 3.1.3.2, and the NATS binding, which has the same

_SAFE = bytes(byte for byte in range(0x21, 0x7F) if byte not in b'"%')
_ESCAPES = [chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in range(256)]
_PERCENT_RUN = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_BACKSLASH = re.compile(r"\\(.)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")


def percent_encode(value: str) -> str:
    """Space, double quote, percent and all outside of U+0021-U+007E as UTF-8 in %XX."""
    raw = value.encode()
    if raw.translate(None, _SAFE):
        return "".join(map(_ESCAPES.__getitem__, raw))
    return value


cached_percent_encode = lru_cache(maxsize=512)(percent_encode)
"""For what repeats: sources, types."""


def percent_decode(name: str, value: str) -> str:
    """
    Undo quotes around *value*, then percent-encoding, once; a stray "%" stays.

    Raises InvalidEvent when the bytes are not UTF-8 (overlong forms are not); *name* is for that.
    """
    if value[:1] == '"' == value[-1:] and len(value) > 1:
        value = _BACKSLASH.sub(r"\1", value[1:-1])
    if "%" not in value:
        return value
    try:
        return _PERCENT_RUN.sub(_decode_run, value)
    except UnicodeDecodeError as error:
        label = name if _EXTENSION_NAME.fullmatch(name) else "extensions"
        raise InvalidEvent(
            f"{label} is not percent-encoded UTF-8: encode the bytes of the UTF-8 text, as %C3%A9",
            field=label,
        ) from error


def _decode_run(match: re.Match[str]) -> str:
    return bytes.fromhex(match[0].replace("%", "")).decode()


def header_text(value: str, *, ascii_only: bool = False) -> str:
    """
    A plain header's value made safe for one line: control characters become %XX.

    Not undone by readers: other headers have their own rules for "%" (baggage). A value that was
    checked has no control characters; this is for what the sidecar adds, as an app's reason.
    """
    if value.isprintable() and (value.isascii() or not ascii_only):
        return value
    return (_NOT_ASCII if ascii_only else _CONTROL).sub(_escape_char, value)


def _escape_char(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "replace"))
