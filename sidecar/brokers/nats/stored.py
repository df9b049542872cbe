"""What a stream has stored, read and deleted without a consumer."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

from sidecar.broker import Log, StoredEvent
from sidecar.brokers.nats.connection import NO_RESPONDERS, NobodyListens
from sidecar.errors import BrokerRefused, BrokerUnavailable, InvalidEvent
from sidecar.wire import nats as binding
from sidecar.wire.cloudevents import Defaults
from sidecar.wire.timestamps import parse_rfc3339

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.brokers.nats.connection import Connection
    from sidecar.event import Event

PAGE_BYTES = 8 * 1024 * 1024
ANSWER_SECONDS = 5
DELETES_UNDER_WAY = 100
_NO_MESSAGE, _NO_SEQUENCE, _STREAM_MISSING = 10037, 10043, 10059
_ADDED = b"\r\nNats-Stream: "
"""How the lines begin that the server adds behind the message's own."""


def event_of(
    place: tuple[str, int], topic: str, time_ns: int, headers: bytes | None, data: bytes
) -> tuple[Event | None, str]:
    """The event at this stream and sequence, stored at *time_ns*; or None, and why it is none."""
    stream, sequence = place
    defaults = Defaults(source=f"/{stream}", type=topic, id=f"{stream}-{sequence}", time_ns=time_ns)
    try:
        return binding.decode(headers, data, defaults), ""
    except InvalidEvent as error:
        return None, error.message


_SECOND = 1_000_000_000


class StoredEvents:
    """`Broker.read` and `Broker.delete` on streams."""

    def __init__(self, name: str, connection: Connection) -> None:
        self._name = name
        self._connection = connection

    async def log(self, stream: str, pattern: str) -> Log | None:
        """None: there is no such stream. Raises BrokerUnavailable, BrokerRefused."""
        info = await self._call(f"STREAM.INFO.{stream}")
        if _error_code(info) == _STREAM_MISSING:
            return None
        if "error" in info:
            raise self._refused(f"stream {stream!r} cannot be looked up", info)
        state, config = info["state"], info["config"]
        end = state["last_seq"] + 1
        return Log(
            pattern,
            None,
            stream,
            state["first_seq"] or end,
            end,
            info["created"],
            may_have_gaps=config["retention"] != "limits",
            duplicate_seconds=config.get("duplicate_window", 0) / _SECOND,
        )

    async def read(self, log: Log, start: int, limit: int) -> list[StoredEvent]:
        start = max(start, log.first, 1)
        if start >= log.end or limit < 1:
            return []
        try:
            found = await _Batch(self._connection, log, start, limit).read()
        except NobodyListens:  # the stream does not allow it
            found = await self._read_one_by_one(log, start, limit)
        return [stored for stored in found if stored.number < log.end]

    async def _read_one_by_one(self, log: Log, start: int, limit: int) -> list[StoredEvent]:
        found: list[StoredEvent] = []
        size = 0
        while len(found) < limit and size < PAGE_BYTES and start < log.end:
            wanted = {"seq": start, "next_by_subj": log.topic}
            answer = await self._call(f"STREAM.MSG.GET.{log.stream}", wanted)
            if _error_code(answer) == _NO_MESSAGE:
                break
            if "error" in answer:
                raise self._refused(f"stream {log.stream!r} cannot be read", answer)
            message = answer["message"]
            headers = base64.b64decode(message["hdrs"]) if "hdrs" in message else None
            data = base64.b64decode(message.get("data") or "")
            number, topic = message["seq"], message["subject"]
            time_ns = parse_rfc3339(message["time"])
            event, _ = event_of((log.stream, number), topic, time_ns, headers, data)
            found.append(StoredEvent(topic, number, time_ns, event))
            size += len(data) + len(headers or b"")
            start = number + 1
        return found

    async def delete(self, log: Log, numbers: Sequence[int]) -> None:
        numbers = [number for number in numbers if number < log.end]
        for first in range(0, len(numbers), DELETES_UNDER_WAY):
            part = numbers[first : first + DELETES_UNDER_WAY]
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(self._delete(log, number)) for number in part]
            for answer in asked:
                error = answer.result()
                if error is not None:
                    raise error

    async def _delete(self, log: Log, number: int) -> BrokerRefused | BrokerUnavailable | None:
        try:
            answer = await self._call(f"STREAM.MSG.DELETE.{log.stream}", {"seq": number})
            if "error" not in answer or _error_code(answer) == _NO_SEQUENCE:
                return None
            # A server that was killed may know of the number and have no message: what it says
            # then is the same as for other faults, so it is looked for.
            there = await self._call(f"STREAM.MSG.GET.{log.stream}", {"seq": number})
        except BrokerUnavailable as error:
            return error
        if _error_code(there) == _NO_MESSAGE:
            return None
        return self._refused(f"events of stream {log.stream!r} cannot be deleted", answer)

    async def _call(self, path: str, payload: object = None) -> dict[str, Any]:
        return await self._connection.call(f"$JS.API.{path}", payload)

    def _refused(self, what: str, answer: dict[str, Any]) -> BrokerRefused:
        error = answer.get("error", {})
        why = f"{error.get('description', 'no reason given')} ({error.get('err_code', 0)})"
        return BrokerRefused(f"broker {self._name!r}: {what}: {why}", broker=self._name)


class _Batch:
    """One direct get of many events, which come as messages of their own."""

    def __init__(self, connection: Connection, log: Log, start: int, limit: int) -> None:
        self._connection = connection
        self._log = log
        self._request = {
            "seq": start,
            "next_by_subj": log.topic,
            "batch": limit,
            "max_bytes": PAGE_BYTES,
        }
        self._found: list[StoredEvent] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def read(self) -> list[StoredEvent]:
        """Raises NobodyListens, BrokerUnavailable."""
        connection = self._connection
        inbox = connection.new_inbox()
        connection.on_lost.append(self._on_lost)
        key = await connection.subscribe(inbox, self._on_message)
        try:
            body = json.dumps(self._request)
            frame = f"PUB $JS.API.DIRECT.GET.{self._log.stream} {inbox} {len(body)}\r\n{body}\r\n"
            if not connection.write(frame.encode()):
                self._on_lost()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._ended
            except TimeoutError:
                raise BrokerUnavailable(
                    f"stream {self._log.stream!r} was not read within {ANSWER_SECONDS} s"
                ) from None
        finally:
            connection.on_lost.remove(self._on_lost)
            await connection.unsubscribe(key, seconds=0)
        return self._found

    def _on_message(
        self, _subject: bytes, _reply: bytes, headers: bytes | None, data: bytes
    ) -> None:
        if headers is None or self._ended.done():
            return
        if headers.startswith(b"NATS/1.0 "):
            self._on_status(headers)
            return
        own, _, added = headers.rpartition(_ADDED)
        stream_line, *lines = added.decode(errors="replace").split("\r\n")
        named = dict(line.split(": ", 1) for line in lines if ": " in line)
        number, topic = int(named["Nats-Sequence"]), named["Nats-Subject"]
        time_ns = parse_rfc3339(named["Nats-Time-Stamp"])
        block = own + b"\r\n\r\n" if b"\r\n" in own else None
        event, _ = event_of((stream_line, number), topic, time_ns, block, data)
        self._found.append(StoredEvent(topic, number, time_ns, event))

    def _on_status(self, headers: bytes) -> None:
        if headers.startswith(NO_RESPONDERS):
            self._ended.set_exception(NobodyListens("no direct access"))
        elif headers[9:12] in {b"204", b"404"}:
            self._ended.set_result(None)
        else:
            why = headers[9 : headers.find(b"\r")].decode(errors="replace")
            self._ended.set_exception(BrokerRefused(f"stream {self._log.stream!r}: {why}"))

    def _on_lost(self) -> None:
        if not self._ended.done():
            self._ended.set_exception(BrokerUnavailable("the connection to NATS broke"))


def _error_code(answer: dict[str, Any]) -> int:
    code: int = answer.get("error", {}).get("err_code", 0)
    return code
