"""How often an event failed, kept where another sidecar sees it: a key-value bucket of JetStream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

from sidecar.broker import NO_FAILURES, Failures
from sidecar.brokers.nats.connection import NobodyListens
from sidecar.errors import BrokerUnavailable, SidecarError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sidecar.brokers.nats.connection import Connection, OnAnswer

log = logging.getLogger(__name__)

STREAM = "KV_sidecar-attempts"
SUBJECT = "$KV.sidecar-attempts"
KEEP_SECONDS = 7 * 86400
PAUSE_SECONDS = 0.5
"""Before what could not be written is written again."""
UNDER_WAY = 1000
"""Records that are written at once: an app that crashes with 100,000 events fails them all."""
_SECOND = 1_000_000_000
_MILLISECOND = 1_000_000
_EXISTS = 10058


class Attempts:
    """
    The failed deliveries of one broker's events. A key is stream, consumer, the time that consumer
    was made (one that was moved or made anew starts afresh), and sequence, joined by dots. A value
    is `[attempts, crashes, ms since 1970 of the first]`, or was once the attempts alone.

    Written only when something fails, read only for what the server delivers again.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._made = False
        self._making = False
        self.waiting: dict[str, Failures] = {}
        """Recorded, and not known to be stored yet. Bounded by what subscriptions hold."""
        # Ordered: a plain dict searches for its first key past all that were removed before it.
        self._unwritten: OrderedDict[str, None] = OrderedDict()
        """Keys of those that are to be written, in this order."""
        self._under_way = 0
        self._pausing = False
        self._then: dict[str, list[Callable[[], None]]] = {}
        connection.on_live.append(self._write_waiting)

    async def make(self) -> None:
        """Make the bucket, so that the first failure is written at once. Raises BrokerUnavailable."""
        if not self._made:
            answer = await self._connection.call(f"$JS.API.STREAM.CREATE.{STREAM}", _BUCKET)
            self._made = answer.get("error", {}).get("err_code", 0) in {0, _EXISTS}

    def record(self, key: str, failures: Failures) -> None:
        """Write without waiting; the bucket is made anew if somebody deleted it."""
        self.waiting[key] = failures
        self._unwritten[key] = None
        self._write()

    def when_stored(self, key: str, then: Callable[[], None]) -> None:
        """Call *then* once what was recorded of *key* is there for others; now if nothing waits."""
        if key in self.waiting:
            self._then.setdefault(key, []).append(then)
        else:
            then()

    async def stored(self, seconds: float) -> None:
        """Wait until everything is stored, for so long at most."""
        all_of_it = asyncio.Event()
        missing = set(self.waiting)

        def one_more(key: str) -> None:
            missing.discard(key)
            if not missing:
                all_of_it.set()

        for key in list(missing):
            self.when_stored(key, partial(one_more, key))
        if missing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await all_of_it.wait()

    def _write_waiting(self) -> None:
        """All of them, after what was under way may be lost."""
        self._unwritten = OrderedDict.fromkeys(self.waiting)
        self._write()

    def _write(self) -> None:
        if self._made:
            while self._unwritten and self._under_way < UNDER_WAY and not self._pausing:
                key, _ = self._unwritten.popitem(last=False)
                failures = self.waiting[key]
                self._under_way += 1
                answered = partial(self._on_stored, key, failures)
                self._ask(f"{SUBJECT}.{key}", _written(failures), answered)
        elif self._unwritten and not self._making and not self._pausing:
            self._making = True
            self._ask(f"$JS.API.STREAM.CREATE.{STREAM}", _BUCKET, self._on_made)

    def _ask(self, subject: str, payload: object, then: OnAnswer) -> None:
        self._connection.ask(subject, payload, then, seconds=5)

    def _on_made(self, answer: dict[str, Any] | SidecarError) -> None:
        self._making = False
        if isinstance(answer, SidecarError):
            self._try_later()
            return
        error = answer.get("error", {})
        if error.get("err_code", 0) in {0, _EXISTS}:
            self._made = True
            self._write()
            return
        log.warning("attempts are counted in this process only: %s", error.get("description"))
        for key in list(self.waiting):
            self._done(key)

    def _on_stored(
        self, key: str, failures: Failures, answer: dict[str, Any] | SidecarError
    ) -> None:
        self._under_way -= 1
        if self.waiting.get(key) is not failures:  # a later one is to be written
            self._write()
        elif isinstance(answer, SidecarError):
            self._made = False  # or somebody deleted it
            self._unwritten[key] = None
            self._try_later()
        else:
            if "error" in answer:
                log.warning("failures of %s are not recorded: %s", key, answer["error"])
            self._done(key)
            self._write()

    def _try_later(self) -> None:
        """While it is not connected, on_live does it."""
        if self._connection.live and not self._pausing:
            self._pausing = True
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._go_on)

    def _go_on(self) -> None:
        self._pausing = False
        self._write()

    def _done(self, key: str) -> None:
        del self.waiting[key]
        self._unwritten.pop(key, None)
        for then in self._then.pop(key, ()):
            then()

    async def look_up(self, keys: Sequence[str]) -> Mapping[str, Failures]:
        """What is recorded of these; NO_FAILURES where nothing is. Raises BrokerUnavailable."""
        async with asyncio.TaskGroup() as tasks:
            asked = {key: tasks.create_task(self._one(key)) for key in keys}
        found = {key: task.result() for key, task in asked.items()}
        for answer in found.values():
            if isinstance(answer, BrokerUnavailable):
                raise answer
        return {key: answer for key, answer in found.items() if isinstance(answer, Failures)}

    async def _one(self, key: str) -> Failures | BrokerUnavailable:
        if key in self.waiting:
            return self.waiting[key]
        subject = f"$JS.API.DIRECT.GET.{STREAM}.{SUBJECT}.{key}"
        try:
            value: object = await self._connection.call(subject, seconds=2)
        except NobodyListens:  # there is no bucket: nothing has failed so far
            return NO_FAILURES
        except BrokerUnavailable as error:
            return error
        return _read(value)


def _written(failures: Failures) -> list[int]:
    return [failures.attempts, failures.crashes, failures.first_ns // _MILLISECOND]


def _read(value: object) -> Failures:
    """What it is not, as the 404 of an event that never failed, is no failures."""
    match value:
        case int(attempts):
            return Failures(attempts)
        case [int(attempts), int(crashes), int(first_ms)]:
            return Failures(attempts, crashes, first_ms * _MILLISECOND)
    return NO_FAILURES


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
