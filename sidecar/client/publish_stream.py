"""One PublishStream: batches out, answers back in their order, a bounded number under way."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio

from sidecar.client import messages
from sidecar.client.values import CallFailed, PublishFailed
from sidecar.v1 import pubsub_pb2

if TYPE_CHECKING:
    from sidecar.event import Event, Receipt

    Batch = tuple[str, Sequence[Event]]
    Batches = AsyncIterable[Batch] | Iterable[Batch]

T = TypeVar("T")


class Pump:
    """The requests of one PublishStream call, and the way back from its answers."""

    def __init__(
        self, call: Any, batches: Batches, window: int, options: pubsub_pb2.PublishOptions | None
    ) -> None:
        self._call = call
        self._batches = batches
        self._room = asyncio.Semaphore(window)
        self._options = options
        self._sizes: collections.deque[int] = collections.deque()
        self._answers: dict[int, list[Receipt | PublishFailed]] = {}
        self._sent = 0
        self._answered = 0
        self._error: Exception | None = None

    async def run(self) -> None:
        """Write all batches. Its own errors are kept for the reader; the call tells the others."""
        try:
            async for topic, events in _each(self._batches):
                await self._room.acquire()
                await self._call.write(self._request(topic, events))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        except Exception as error:  # noqa: BLE001 - raised by check_complete
            self._error = error
        await self._call.done_writing()

    def _request(self, topic: str, events: Sequence[Event]) -> pubsub_pb2.PublishStreamRequest:
        self._sizes.append(len(events))
        self._sent += 1
        return pubsub_pb2.PublishStreamRequest(
            sequence=self._sent,
            topic=topic,
            events=[messages.event_to(event) for event in events],
            options=self._options,
        )

    def answered(
        self, response: pubsub_pb2.PublishStreamResponse
    ) -> Iterable[list[Receipt | PublishFailed]]:
        """The answers that are now next in order."""
        if response.HasField("failure"):
            size = self._sizes[response.sequence - self._answered - 1]
            results: list[Receipt | PublishFailed] = [
                messages.publish_failed(response.failure)
            ] * size
        else:
            results = [messages.outcome_from(result) for result in response.results]
        self._answers[response.sequence] = results
        while self._answered + 1 in self._answers:
            self._answered += 1
            self._sizes.popleft()
            self._room.release()
            yield self._answers.pop(self._answered)

    def check_complete(self) -> None:
        if self._error is not None:
            raise self._error
        missing = self._sent - self._answered
        if missing:
            message = f"the stream ended with {missing} batches unanswered"
            raise CallFailed("UNAVAILABLE", "OUTCOME_UNKNOWN", message, retryable=True)


async def _each(items: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
