"""Order per key over all sidecars: a consumer's events go to one sidecar at a time, its pinned client."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Any

from sidecar.brokers.nats.connection import NobodyListens
from sidecar.errors import BrokerRefused, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.brokers.nats.connection import Connection

log = logging.getLogger(__name__)

GROUP = "sidecar"
POLICY = "pinned_client"
PIN_SECONDS = 86400
"""The server forgets a pin that asks for nothing for so long. We look for ourselves, far earlier."""
LOOK_SECONDS = 2.0
"""How often a sidecar that stands by looks whether the pinned one is alive."""
SILENCES = 4
"""A pinned sidecar that did not answer so often is taken for dead, though it is connected."""
TAKE_OVER_ACK_WAIT_NS = 1_234_567
"""For a moment, so that all that is out is due. As odd as this, it is known for what it is."""
_DUE_SECONDS = 0.3
"""The server looks for what is due a tenth of a second after the change."""
_V1_TOKENS = 9
"""Tokens of `$JS.ACK.<stream>.<consumer>.…`; since v2 a domain and an account hash come first."""
_EMPTY = b"NATS/1.0\r\n\r\n"
_HEADER = b"Nats-Pin-Id: "
_SECOND = 1_000_000_000

Frame = tuple[int, bytes, bytes, "bytes | None", bytes]
"""An event: all its bytes; its topic, where to answer, its header block, its payload."""


def pinned_config() -> dict[str, Any]:
    """What a consumer's configuration has beside."""
    return {
        "priority_groups": [GROUP],
        "priority_policy": POLICY,
        "priority_timeout": PIN_SECONDS * _SECOND,
    }


def unpinned_config(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in pinned_config()}


def split_header(headers: bytes | None) -> tuple[str, bytes | None]:
    """The pin that the server added behind all others, and the block without it."""
    if headers is None or (at := headers.rfind(_HEADER)) < 0:
        return "", headers
    end = headers.find(b"\r\n", at)
    rest = headers[:at] + headers[end + 2 :]
    return headers[at + len(_HEADER) : end].decode(), None if rest == _EMPTY else rest


class Pin:
    """
    One consumer, and whether its events are ours.

    It is ours with the first event that comes. Then all that another sidecar had and did not settle
    is made due at once, and comes, in order, before anything newer: see `take_over`.
    """

    def __init__(self, connection: Connection, stream: str, consumer: str, ack_wait: float) -> None:
        """*ack_wait* is in seconds."""
        self._connection = connection
        self._of = f"{stream}.{consumer}"
        self._names = stream, consumer
        self._ack_wait = int(ack_wait * _SECOND)
        self._answering: str | None = None
        self._answers_as = ""
        self._silences = 0
        self._look_at = 0.0
        self.id = ""
        """Empty: it is not ours."""
        self.taking_over = False
        """Ours, but not ready: ask for nothing."""
        self.early: dict[int, Frame] = {}
        """By sequence: what came before all that was out elsewhere has come."""
        self._expected = 0
        """So many are out, with those that are early; 0: all of them came."""
        self._progress = False
        """Some of them came since we last looked."""
        self._twice: set[int] = set()
        """Those that were handed out and come again, as the server made them due too."""
        self.free = False
        """Nobody has it, as far as we know."""
        self.standby = False
        """Another sidecar has it."""
        self.unsure = False
        """The server says that it is not ours."""

    @property
    def settled(self) -> bool:
        """There is nothing to do about it."""
        return bool(self.id) and not (self.taking_over or self.unsure or self._expected)

    @property
    def most(self) -> int | None:
        """
        How many events to ask for at most.

        Non-obvious: with a request of somebody else open, the server puts what is due behind the
        others again and again. So who stands by has none.
        """
        if self.taking_over or self.unsure:
            return 0
        return None if self.id else int(self.free)

    def came(self, pin: str, frame: Frame, *, again: bool) -> Sequence[Frame]:
        """An event came, *again* or for the first time; answers what may be handed out, in order."""
        if pin and pin != self.id:
            self.id = pin
            self.taking_over = True
            self.standby = self.free = False
        if self.taking_over:
            self.early[place_of(frame[2])[1]] = frame
            return ()
        if not self._expected and not self._twice:
            return (frame,)
        number = place_of(frame[2])[1]
        if not self._expected:
            if not again:
                self._twice.clear()
            elif number in self._twice:
                self._twice.discard(number)
                return ()
            return (frame,)
        self._twice.discard(number)
        self.early[number] = frame
        self._progress = True
        if not again or len(self.early) >= self._expected:
            # What is due comes before what is new; so either all of it came, or it was not due yet.
            if len(self.early) - (not again) >= self._expected:
                return self._all_early()
            self.taking_over = True
        return ()

    def _all_early(self) -> Sequence[Frame]:
        ready = [frame for _, frame in sorted(self.early.items())]
        self.early.clear()
        self._expected = 0
        return ready

    def released(self) -> None:
        """From now on what comes again is meant."""
        self._twice.clear()

    def look(self) -> None:
        """Something happened to it: do not wait with looking."""
        self._look_at = 0.0

    def lost(self) -> None:
        """It is not ours any more, or the server has forgotten."""
        self.id = ""
        self.taking_over = self.unsure = self.free = False
        self._expected = 0
        self.early.clear()
        self._twice.clear()
        self._look_at = 0.0

    async def contend(self, now: float) -> None:
        """
        While it is not ours: let go of whoever has it and is no more.

        While it is, and not all has come that was out: see whether it still is out.
        Raises BrokerUnavailable.
        """
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS * random.uniform(0.8, 1.2)  # spread, no secret
        if self.id:
            self.taking_over = not self._progress
            self._progress = False
            return
        owner = _owner(await self._info())
        if not owner:
            self._nobody_has_it()
            return
        self.standby, self.free = True, False
        try:
            await self._connection.call(_subject(owner), seconds=LOOK_SECONDS)
        except NobodyListens:
            await self.let_go()
        except BrokerUnavailable:
            self._silences += 1
            if self._connection.live and self._silences >= SILENCES:
                await self.let_go()
        else:
            self._silences = 0

    def _nobody_has_it(self) -> None:
        self.standby, self.free = False, True
        self._silences = 0

    async def is_anothers(self) -> bool:
        """Once the server said that it is not ours; else it forgot. Raises BrokerUnavailable."""
        owner = _owner(await self._info())
        if owner != self.id:
            self.lost()
        self.unsure = False
        return bool(owner) and owner != self.id

    async def let_go(self) -> None:
        """Another sidecar may have it from now on. Raises BrokerUnavailable."""
        await self._connection.call(f"$JS.API.CONSUMER.UNPIN.{self._of}", {"group": GROUP})
        self._nobody_has_it()

    async def take_over(self) -> Sequence[Frame]:
        """
        Have all redelivered that is out elsewhere. Answers what may be handed out already.

        Non-obvious: what a dead sidecar had comes again when its ack wait is over, and what is new
        at once. The server sends what is due first, so all of it is made due. Not always in order:
        it is put in order here. Raises BrokerUnavailable.
        """
        if self._answers_as != self.id:
            await self._answer_no_more()
            self._answering = await self._connection.subscribe(_subject(self.id), self._on_look)
            self._answers_as = self.id
        info = await self._info()
        if "error" in info:
            raise BrokerUnavailable(f"consumer {self._names[1]!r}: {info['error']}")
        if _owner(info) != self.id:  # two took over at once, and the other was later
            self.lost()
            return ()
        if info["num_ack_pending"] > len(self.early):
            config = info["config"] | {"ack_wait": self._ack_wait}
            try:
                await self._update(config | {"ack_wait": TAKE_OVER_ACK_WAIT_NS})
                await asyncio.sleep(_DUE_SECONDS)
                await self._info()
            finally:
                self._connection.ask(*self._request(config), lambda _: None, seconds=5)
            await self._update(config)
            self._expected = info["num_ack_pending"]
            self._progress = True
            self._twice = set(self.early)
            self.taking_over = False
            return ()
        self.taking_over = False
        return self._all_early()

    def _on_look(self, _subject: bytes, reply: bytes, _headers: bytes | None, _data: bytes) -> None:
        if reply:
            self._connection.write(b"PUB %b 2\r\n{}\r\n" % reply)

    def _request(self, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        stream, _ = self._names
        return f"$JS.API.CONSUMER.DURABLE.CREATE.{self._of}", {
            "stream_name": stream,
            "config": config,
            "action": "update",
        }

    async def _update(self, config: dict[str, Any]) -> None:
        answer = await self._connection.call(*self._request(config))
        if "error" in answer:
            raise BrokerRefused(
                f"consumer {self._names[1]!r} cannot be taken over: {answer['error']}"
            )

    async def _info(self) -> dict[str, Any]:
        return await self._connection.call(f"$JS.API.CONSUMER.INFO.{self._of}", seconds=2)

    async def close(self) -> None:
        """Let go of it; never raises, and does not wait."""
        if self.id:
            unpin = f"$JS.API.CONSUMER.UNPIN.{self._of}"
            self._connection.ask(unpin, {"group": GROUP}, lambda _: None, seconds=5)
            self.id = ""
        await self._answer_no_more()

    async def _answer_no_more(self) -> None:
        if self._answering is not None:
            await self._connection.unsubscribe(self._answering, seconds=0)
            self._answering = None
            self._answers_as = ""


def _subject(pin: str) -> str:
    """On which the sidecar of this pin answers."""
    return f"_INBOX.sidecar-pin.{pin}"


def _owner(info: dict[str, Any]) -> str:
    for group in info.get("priority_groups") or ():
        if group["group"] == GROUP:
            owner: str = group.get("pinned_client_id", "")
            return owner
    return ""


def place_of(handle: bytes) -> tuple[str, int]:
    """Stream and sequence, from the reply subject of an event."""
    tokens = handle.split(b".")
    first = 2 if len(tokens) == _V1_TOKENS else 4
    return tokens[first].decode(), int(tokens[first + 3])
