"""One Subscribe stream after the other, as an async iterator of deliveries that settle themselves."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import random
from typing import TYPE_CHECKING, Any, Self

import grpc.aio

from sidecar.client import messages
from sidecar.client.values import CallFailed, Delivery, Opened, SettleFailed
from sidecar.event import Settlement, Verdict
from sidecar.v1 import pubsub_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable

_LOG = logging.getLogger(__name__)
_ACK = pubsub_pb2.VERDICT_ACK
_CLOSE_SECONDS = 2.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0


class StreamDelivery(Delivery, frozen=True, eq=False):
    """
    A delivery of a Consumer, which settles it.

    The verbs note and return at once; all that is noted in one turn of the loop travels in one
    message. Closing the consumer sends what is noted. A settlement that did not count (too late,
    settled before) is told to the consumer's *on_rejected*.
    """

    _stream: _Stream

    def ack(self) -> None:
        """Done."""
        self._stream.settle(pubsub_pb2.Settlement(token=self.token, verdict=_ACK))

    def nack(
        self, *, delay: float | None = None, reason: str = "", uncounted: bool = False
    ) -> None:
        """
        Failed: again after *delay* seconds, or when the retry policy says. *uncounted*: not now.

        *reason* is for retry rules, the dead letter and the logs; rules see what is before a colon,
        as in "RATE_LIMITED: try the other region".
        """
        self._stream.settle(
            messages.settlement_to(Settlement(self.token, Verdict.NACK, delay, reason, uncounted))
        )

    def reject(self, reason: str = "") -> None:
        """Hopeless: to the dead letters now."""
        self._stream.settle(
            messages.settlement_to(Settlement(self.token, Verdict.REJECT, None, reason))
        )

    def extend(self, seconds: float | None = None) -> None:
        """Still working: the lease starts anew, for *seconds* or the subscription's."""
        self._stream.extend(messages.settlement_to(Settlement(self.token, Verdict.EXTEND, seconds)))


class Consumer:
    """
    The deliveries of one subscription: an async iterator, and a context manager that closes it.

    Settle each delivery: one that is forgotten holds its place in the window of *credit* until the
    consumer is closed. Waiting for a delivery may be cancelled without losing one.
    """

    def __init__(
        self,
        call: Callable[[AsyncIterable[pubsub_pb2.SubscribeRequest]], Any],
        first: pubsub_pb2.SubscribeOpen,
        *,
        credit: int,
        limit: int | None,
        reconnect: bool,
        on_rejected: Callable[[SettleFailed], None] | None,
    ) -> None:
        self._call = call
        self._first = first
        self._credit = credit
        self._left = limit
        self._reconnect = reconnect
        self._on_rejected = on_rejected or _log_rejected
        self._stream = _Stream(self, 0)
        self._ready: collections.deque[StreamDelivery] = collections.deque()
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()
        self._over = asyncio.Event()
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._streams = 0
        self._unsent: list[pubsub_pb2.Settlement] = []
        self.opened: Opened | None = None
        """What the sidecar said when it opened the stream; None before."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamDelivery:
        while not self._ready:
            if self._over.is_set() or self._ending.is_set():
                self._raise_error()
                raise StopAsyncIteration
            if self._left == 0:
                raise StopAsyncIteration
            await self._wait_changed()
        if self._left is not None:
            self._left -= 1
        return self._ready.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def wait_opened(self) -> Opened:
        """Wait until the subscription is open. Raises CallFailed when it cannot be opened."""
        while self.opened is None:
            self._raise_error()
            if self._over.is_set():
                raise CallFailed("CANCELLED", "", "closed before it was open", retryable=False)
            await self._wait_changed()
        return self.opened

    async def aclose(self) -> None:
        """Send what is noted and end the stream; what is unsettled is released. At most seconds."""
        self.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._over.wait()
        if self._task is not None and not self._over.is_set():
            self._task.cancel()

    def end(self) -> None:
        """As aclose, without waiting for it."""
        self._ending.set()
        self._ready.clear()
        self._changed.set()
        self._stream.wake.set()

    @property
    def ending(self) -> bool:
        return self._ending.is_set()

    async def _wait_changed(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def run(self) -> None:
        """Keep a stream open until the end; started by the client."""
        self._task = asyncio.current_task()
        try:
            await self._keep_open()
        except Exception as error:  # noqa: BLE001 - raised where the app waits
            self._error = error
        finally:
            self._over.set()
            self._changed.set()

    async def _keep_open(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            streams = self._streams
            lost = await self._one_stream()
            if self.ending or self._left == 0:
                return
            if self._streams > streams:
                pause = _FIRST_PAUSE_SECONDS
            elif streams == 0 and lost is not None:
                # Never open so far: a wrong name or socket is told, not tried for ever.
                raise lost
            if not self._reconnect or (lost is not None and not lost.retryable):
                if lost is not None:
                    raise lost
                return
            at_least = (lost and lost.retry_after) or 0.0
            await self._pause(at_least + pause * random.uniform(0.5, 1))
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()

    async def _one_stream(self) -> CallFailed | None:
        """Read one stream to its end. What it had brought and nobody took comes again."""
        credit = self._credit if self._left is None else min(self._credit, self._left)
        stream = self._stream = _Stream(self, credit, self._first)
        call = self._call(stream)
        try:
            async for response in call:
                self._received(stream, response)
        except grpc.aio.AioRpcError as error:
            return messages.call_failed(error)
        finally:
            stream.end()
            call.cancel()
            self._ready.clear()
        return None

    def _received(self, stream: _Stream, response: pubsub_pb2.SubscribeResponse) -> None:
        if response.HasField("opened"):
            self.opened = messages.opened_from(response.opened)
            self._streams += 1
        deliveries = response.deliveries
        if deliveries and not self.ending:
            self._ready.extend([stream.delivery_from(message) for message in deliveries])
        for result in response.rejected_settlements:
            self._on_rejected(messages.settle_failed(result))
        self._changed.set()

    def note(self, settlement: pubsub_pb2.Settlement) -> None:
        """Send it with whatever the stream that is open takes next."""
        self._unsent.append(settlement)
        self._stream.wake.set()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def hand_unsent_to(self, request: pubsub_pb2.SubscribeRequest) -> None:
        request.settlements.extend(self._unsent)
        self._unsent.clear()

    def may_grant(self, granted: int) -> bool:
        """Whether one more delivery is wanted, beyond *granted* that are still to come."""
        return self._left is None or granted + len(self._ready) < self._left


class _Stream:
    """
    The requests of one Subscribe call: settlements and credit, gathered until the call takes them.

    An iterator rather than a task of ours: the call takes the next request when it has room.
    """

    def __init__(
        self, consumer: Consumer, credit: int, first: pubsub_pb2.SubscribeOpen | None = None
    ) -> None:
        self.wake = asyncio.Event()
        self._consumer = consumer
        self._first = first
        self._credit = credit
        self._granted = credit
        self._unsettled: set[str] = set()
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pubsub_pb2.SubscribeRequest:
        if self._first is not None:
            request = pubsub_pb2.SubscribeRequest(open=self._first)
            self._first = None
            return self._fill(request)
        while not self._over:
            if self._credit or self._consumer.has_unsent:
                return self._fill(pubsub_pb2.SubscribeRequest())
            if self._consumer.ending:
                break
            self.wake.clear()
            await self.wake.wait()
        raise StopAsyncIteration

    def _fill(self, request: pubsub_pb2.SubscribeRequest) -> pubsub_pb2.SubscribeRequest:
        request.credit, self._credit = self._credit, 0
        self._consumer.hand_unsent_to(request)
        return request

    def delivery_from(self, message: pubsub_pb2.Delivery) -> StreamDelivery:
        token = message.token
        self._unsettled.add(token)
        self._granted -= 1
        return StreamDelivery(
            token,
            messages.event_from(message.event),
            message.topic,
            message.attempt,
            messages.position_from(message.position) if message.HasField("position") else None,
            self,
        )

    def settle(self, settlement: pubsub_pb2.Settlement) -> None:
        """Note it, and make room for one more. Of a stream that broke, the next one sends it."""
        if settlement.token in self._unsettled:
            self._unsettled.discard(settlement.token)
            if not self._over and self._consumer.may_grant(self._granted):
                self._credit += 1
                self._granted += 1
        self.extend(settlement)

    def extend(self, settlement: pubsub_pb2.Settlement) -> None:
        self._consumer.note(settlement)

    def end(self) -> None:
        self._over = True
        self.wake.set()


def _log_rejected(failed: SettleFailed) -> None:
    _LOG.warning("a settlement did not count: %s: %s", failed.reason, failed.message)
