"""The client's connection to a sidecar, and the calls on it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Self

import grpc.aio

from sidecar.client import messages
from sidecar.client.consumer import Consumer
from sidecar.client.dead_letters import DeadLetters
from sidecar.client.publish_stream import Pump
from sidecar.v1 import admin_pb2, admin_pb2_grpc, dead_letters_pb2_grpc, pubsub_pb2, pubsub_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable

    from sidecar.client.publish_stream import Batches
    from sidecar.client.values import (
        Delivery,
        PublishFailed,
        SettleFailed,
        StartAt,
        Status,
        SubscriptionSpec,
    )
    from sidecar.event import Durability, Event, Receipt, Settlement

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


def default_target() -> str:
    """Where a sidecar listens that was not told where."""
    from sidecar.config import default_socket_dir  # noqa: PLC0415 - pydantic, only when needed

    return f"unix:{default_socket_dir(os.environ) / 'grpc.sock'}"  # noqa: TID251 - the app's own


# -- the client


class Sidecar:
    """
    A connection to a sidecar. Enter it before use; leaving it closes its consumers.

    *target* is "unix:/path/to/grpc.sock" or "host:port"; None is the default Unix socket. It
    connects when first used, and again by itself. One serves many tasks of one event loop.
    """

    def __init__(self, target: str | None = None) -> None:
        self.target = default_target() if target is None else target
        self._channel: Any = None
        self._stubs: tuple[Any, Any, Any] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._consumers: set[Consumer] = set()

    def __repr__(self) -> str:
        state = "closed" if self._tasks is None else f"{len(self._consumers)} consumers"
        return f"<Sidecar {self.target} {state}>"

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self.target, options=_options(self.target))
        self._stubs = (
            pubsub_pb2_grpc.PubSubStub(self._channel),  # type: ignore[no-untyped-call]
            admin_pb2_grpc.AdminStub(self._channel),  # type: ignore[no-untyped-call]
            dead_letters_pb2_grpc.DeadLettersStub(self._channel),  # type: ignore[no-untyped-call]
        )
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks, self._tasks = self._tasks, None
        try:
            for consumer in self._consumers:
                consumer.end()
            for consumer in [*self._consumers]:
                await consumer.aclose()
        finally:
            for task in self._running:
                task.cancel()
            if tasks is not None:
                # Non-obvious: told of the body's error, a TaskGroup would wrap it in a group.
                await tasks.__aexit__(None, None, None)
            await self._channel.close()

    async def wait_connected(self) -> None:
        """Wait until the sidecar takes connections. Put asyncio.timeout() around it."""
        await self._channel.channel_ready()

    async def publish(
        self,
        topic: str,
        events: Iterable[Event],
        *,
        min_durability: Durability | None = None,
        timeout_seconds: float | None = None,
    ) -> list[Receipt | PublishFailed]:
        """
        Publish *events*; one answer per event, in order. Raises CallFailed for the call as a whole.

        *min_durability*: fail rather than give less. *timeout_seconds*: how long the sidecar waits
        for the broker; an event without an answer by then is OUTCOME_UNKNOWN.
        """
        request = pubsub_pb2.PublishRequest(
            topic=topic,
            events=[messages.event_to(event) for event in events],
            options=messages.publish_options(min_durability, timeout_seconds),
        )
        response = await _answer(self._pubsub.Publish(request))
        return [messages.outcome_from(result) for result in response.results]

    async def publish_stream(
        self,
        batches: Batches,
        *,
        window: int = 32,
        min_durability: Durability | None = None,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[list[Receipt | PublishFailed], None]:
        """
        Publish (topic, events) batches, *window* of them under way; yield their answers in order.

        A batch that failed as a whole answers PublishFailed for each of its events. Raises CallFailed
        when the stream breaks: batches that were not answered may have arrived, so publish them again
        with the same ids. An error of *batches* is raised after the answers to what came before it.
        """
        call = self._pubsub.PublishStream()
        options = messages.publish_options(min_durability, timeout_seconds)
        pump = Pump(call, batches, window, options)
        task = self._start(pump.run())
        try:
            async for response in call:
                for results in pump.answered(response):
                    yield results
        except grpc.aio.AioRpcError as error:
            raise messages.call_failed(error) from error
        finally:
            task.cancel()
            call.cancel()
        pump.check_complete()

    def subscribe(
        self,
        subscription: str | SubscriptionSpec,
        *,
        credit: int = 256,
        limit: int | None = None,
        reconnect: bool = True,
        consumer_name: str = "",
        on_rejected: Callable[[SettleFailed], None] | None = None,
    ) -> Consumer:
        """
        Consume a subscription: by its name, or as described.

        *credit*: so many deliveries may be unsettled. *limit*: end after so many deliveries. With
        *reconnect* the stream, once open, is opened again whenever it breaks; what was unsettled is
        then delivered again. *on_rejected* is told of settlements that did not count; without it
        they are logged.
        """
        first = pubsub_pb2.SubscribeOpen(consumer=consumer_name)
        messages.set_target(first, subscription)
        consumer = Consumer(
            self._pubsub.Subscribe,
            first,
            credit=credit,
            limit=limit,
            reconnect=reconnect,
            on_rejected=on_rejected,
        )
        self._consumers.add(consumer)
        task = self._start(consumer.run())
        task.add_done_callback(lambda _: self._consumers.discard(consumer))
        return consumer

    async def pull(
        self, subscription: str | SubscriptionSpec, *, max_events: int = 1, wait_seconds: float = 0
    ) -> list[Delivery]:
        """Up to *max_events* deliveries, waiting for the first; settle them with `settle`."""
        request = pubsub_pb2.PullRequest(
            max_events=max_events, wait=messages.duration_to(wait_seconds)
        )
        messages.set_target(request, subscription)
        response = await _answer(self._pubsub.Pull(request))
        return [messages.delivery_from(delivery) for delivery in response.deliveries]

    async def settle(self, settlements: Iterable[Settlement]) -> list[SettleFailed | None]:
        """Settle by token; one answer per settlement, in order: None when it counted."""
        request = pubsub_pb2.SettleRequest(
            settlements=[messages.settlement_to(s) for s in settlements]
        )
        response = await _answer(self._pubsub.Settle(request))
        return [
            messages.settle_failed(result) if result.HasField("failure") else None
            for result in response.results
        ]

    async def status(self) -> Status:
        return messages.status_from(
            await _answer(self._admin.GetStatus(admin_pb2.GetStatusRequest()))
        )

    async def pause(self, subscription: str) -> None:
        """Stop handing over; what is handed over can still be settled."""
        request = admin_pb2.PauseSubscriptionRequest(subscription=subscription)
        await _answer(self._admin.PauseSubscription(request))

    async def resume(self, subscription: str) -> None:
        request = admin_pb2.ResumeSubscriptionRequest(subscription=subscription)
        await _answer(self._admin.ResumeSubscription(request))

    async def seek(self, subscription: str, to: StartAt) -> None:
        """Move a subscription, for all its replicas. Deliveries under way are void."""
        request = admin_pb2.SeekSubscriptionRequest(
            subscription=subscription, to=messages.start_to(to)
        )
        await _answer(self._admin.SeekSubscription(request))

    @property
    def dead_letters(self) -> DeadLetters:
        """Looking at dead letters, redriving and discarding them."""
        return DeadLetters(self._entered()[2])

    @property
    def _pubsub(self) -> Any:
        return self._entered()[0]

    @property
    def _admin(self) -> Any:
        return self._entered()[1]

    def _entered(self) -> tuple[Any, Any, Any]:
        if self._stubs is None:
            raise RuntimeError("enter the client before use: async with Sidecar() as sidecar")
        return self._stubs

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._tasks is None:
            work.close()
            raise RuntimeError("the client is closed")
        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task


def _options(target: str) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        # It is on this machine: no proxy, and no waiting for minutes until it is tried again.
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if target.startswith("unix:"):
        options.append(("grpc.default_authority", "localhost"))
    return options


async def _answer(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise messages.call_failed(error) from error
