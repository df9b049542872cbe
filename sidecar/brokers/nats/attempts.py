"""How often an event failed, kept where another sidecar sees it: a key-value bucket of JetStream."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from sidecar.errors import BrokerUnavailable, SidecarError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sidecar.brokers.nats.connection import Connection

log = logging.getLogger(__name__)

STREAM = "KV_sidecar-attempts"
SUBJECT = "$KV.sidecar-attempts"
KEEP_SECONDS = 7 * 86400
_SECOND = 1_000_000_000
_EXISTS = 10058


class Attempts:
    """
    The failed deliveries of one broker's events. A key is stream, consumer, the time that consumer
    was made (one that was moved or made anew starts afresh), and sequence, joined by dots.

    Written only when something fails, read only for what the server delivers again.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._made = False
        self._making = False
        self._waiting: dict[str, int] = {}
        connection.on_live.append(self._flush)

    def record(self, key: str, attempts: int) -> None:
        """Write now, without waiting; the bucket is made when the first one comes."""
        self._waiting[key] = attempts
        if self._made:
            self._flush()
        elif not self._making and self._connection.live:
            self._making = True
            self._connection.ask(
                f"$JS.API.STREAM.CREATE.{STREAM}", _BUCKET, self._on_made, seconds=5
            )

    def _on_made(self, answer: dict[str, Any] | SidecarError) -> None:
        self._making = False
        if isinstance(answer, SidecarError):
            return  # the next record asks again
        error = answer.get("error", {})
        if error.get("err_code", 0) not in {0, _EXISTS}:
            log.warning("attempts are counted in this process only: %s", error.get("description"))
            self._waiting.clear()
            return
        self._made = True
        self._flush()

    def _flush(self) -> None:
        if not self._made or not self._waiting:
            return
        frames = []
        for key, attempts in self._waiting.items():
            body = str(attempts)
            frames.append(f"PUB {SUBJECT}.{key} {len(body)}\r\n{body}\r\n")
        # Bounded: what cannot be written are the failures of one absence of the server.
        if self._connection.write("".join(frames).encode()):
            self._waiting.clear()

    async def look_up(self, keys: Sequence[str]) -> Mapping[str, int]:
        """What is recorded of these; nothing where nothing is, or nobody answers."""
        async with asyncio.TaskGroup() as tasks:
            asked = {key: tasks.create_task(self._one(key)) for key in keys}
        return {key: task.result() for key, task in asked.items()}

    async def _one(self, key: str) -> int:
        if key in self._waiting:
            return self._waiting[key]
        subject = f"$JS.API.DIRECT.GET.{STREAM}.{SUBJECT}.{key}"
        try:
            value: object = await self._connection.call(subject, seconds=2)
        except BrokerUnavailable:
            return 0
        return value if isinstance(value, int) else 0


_BUCKET: dict[str, Any] = {
    "name": STREAM,
    "subjects": [f"{SUBJECT}.>"],
    "max_msgs_per_subject": 1,
    "max_age": KEEP_SECONDS * _SECOND,
    "storage": "file",
    "discard": "new",
    "allow_direct": True,
    "allow_rollup_hdrs": True,
    "deny_delete": True,
    "num_replicas": 1,
}
