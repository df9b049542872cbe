"""The Admin service: what is going on, and moving subscriptions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp

import sidecar
from sidecar.delivery.push.circuit import State as CircuitState
from sidecar.errors import NotSupported
from sidecar.services.rpc import Call, UnaryMethod
from sidecar.v1 import admin_pb2 as pb
from sidecar.v1 import pubsub_pb2
from sidecar.wire import proto

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sidecar.broker import Broker, BrokerState
    from sidecar.delivery.hub import Hub
    from sidecar.delivery.push.pusher import Pusher
    from sidecar.delivery.subscription import Subscription
    from sidecar.publishing.publisher import Publisher

SERVICE = "sidecar.v1.Admin"
_NS = 1_000_000_000
_ORDERINGS = {
    "key": pubsub_pb2.ORDERING_KEY,
    "key_per_replica": pubsub_pb2.ORDERING_KEY_PER_REPLICA,
    "none": pubsub_pb2.ORDERING_NONE,
}


@dataclass(slots=True)
class Link:
    """A broker's connection over time, as the composition root saw it."""

    state: BrokerState
    since_ns: int
    connects: int = 0


class Admin:
    """GetStatus, PauseSubscription, ResumeSubscription, SeekSubscription."""

    def __init__(
        self,
        *,
        app: str,
        started_ns: int,
        brokers: Mapping[str, Broker],
        links: Mapping[str, Link],
        publisher: Publisher,
        hub: Hub,
        not_ready: Callable[[], Sequence[str]],
    ) -> None:
        self._app = app
        self._started_ns = started_ns
        self._brokers = brokers
        self._links = links
        self._publisher = publisher
        self._hub = hub
        self._not_ready = not_ready

    def methods(self) -> Sequence[UnaryMethod[Any, Any]]:
        return (
            UnaryMethod(
                SERVICE, "GetStatus", pb.GetStatusRequest, pb.GetStatusResponse, self.get_status
            ),
            UnaryMethod(
                SERVICE,
                "PauseSubscription",
                pb.PauseSubscriptionRequest,
                pb.PauseSubscriptionResponse,
                self.pause,
            ),
            UnaryMethod(
                SERVICE,
                "ResumeSubscription",
                pb.ResumeSubscriptionRequest,
                pb.ResumeSubscriptionResponse,
                self.resume,
            ),
            UnaryMethod(
                SERVICE,
                "SeekSubscription",
                pb.SeekSubscriptionRequest,
                pb.SeekSubscriptionResponse,
                self.seek,
            ),
        )

    async def get_status(self, request: pb.GetStatusRequest, call: Call) -> pb.GetStatusResponse:
        not_ready = self._not_ready()
        async with asyncio.TaskGroup() as tasks:
            subscriptions = [
                tasks.create_task(
                    _subscription(subscription, self._hub.pusher(subscription.settings.name))
                )
                for subscription in self._hub.all()
            ]
        return pb.GetStatusResponse(
            version=sidecar.__version__,
            app=self._app,
            started_at=_timestamp(self._started_ns),
            ready=not not_ready,
            not_ready=not_ready,
            draining=self._hub.draining,
            brokers=[self._broker(name) for name in self._brokers],
            routes=[
                pb.RouteStatus(
                    topic=route.topic or "", event_type=route.event_type or "", broker=route.broker
                )
                for route in self._publisher.routes.routes
            ],
            subscriptions=[task.result() for task in subscriptions],
        )

    def _broker(self, name: str) -> pb.BrokerStatus:
        link = self._links[name]
        return pb.BrokerStatus(
            name=name,
            type=self._brokers[name].type,
            connected=link.state.connected,
            since=_timestamp(link.since_ns),
            detail=link.state.detail,
            reconnects=max(0, link.connects - 1),
            pending_events=self._publisher.pending(name).events,
        )

    async def pause(
        self, request: pb.PauseSubscriptionRequest, call: Call
    ) -> pb.PauseSubscriptionResponse:
        self._hub.get(request.subscription).pause()
        return pb.PauseSubscriptionResponse()

    async def resume(
        self, request: pb.ResumeSubscriptionRequest, call: Call
    ) -> pb.ResumeSubscriptionResponse:
        self._hub.get(request.subscription).resume()
        return pb.ResumeSubscriptionResponse()

    async def seek(
        self, request: pb.SeekSubscriptionRequest, call: Call
    ) -> pb.SeekSubscriptionResponse:
        subscription = self._hub.get(request.subscription)
        to = proto.start_from(request.to)
        if not subscription.broker.capabilities.seeks:
            raise NotSupported(
                f"broker {subscription.broker.name!r} keeps no events to move to",
                subscription=request.subscription,
                broker=subscription.broker.name,
            )
        await subscription.seek(to)
        return pb.SeekSubscriptionResponse()


async def _subscription(subscription: Subscription, pusher: Pusher | None) -> pb.SubscriptionStatus:
    settings, window = subscription.settings, subscription.window
    out, retrying = window.out, window.retrying
    partitions = await subscription.lag_by_partition()
    lag = sum(partitions.values()) if partitions else await subscription.lag()
    if subscription.draining:
        state = pb.SUBSCRIPTION_STATE_DRAINING
    elif subscription.paused:
        state = pb.SUBSCRIPTION_STATE_PAUSED
    elif not subscription.subscribed:
        state = pb.SUBSCRIPTION_STATE_CONNECTING
    else:
        state = pb.SUBSCRIPTION_STATE_ACTIVE
    return pb.SubscriptionStatus(
        name=settings.name,
        topic=settings.topic,
        broker=subscription.broker.name,
        ordering=_ORDERINGS[settings.ordering],
        state=state,
        detail=subscription.detail,
        consumers=len(subscription.consumers),
        in_flight_events=out,
        waiting_events=len(window) - out - retrying,
        retry_waiting_events=retrying,
        lag_events=lag,
        declared=subscription.declared,
        held_bytes=window.bytes,
        reestablished=subscription.reestablished,
        standby=subscription.standby,
        push=None if pusher is None else _push(pusher),
        partitions=[
            pb.PartitionLag(topic=topic, partition=partition, lag_events=events)
            for (topic, partition), events in sorted(partitions.items())
        ],
    )


_CIRCUITS = {
    CircuitState.CLOSED: pb.CIRCUIT_STATE_CLOSED,
    CircuitState.OPEN: pb.CIRCUIT_STATE_OPEN,
    CircuitState.HALF_OPEN: pb.CIRCUIT_STATE_HALF_OPEN,
}


def _push(pusher: Pusher) -> pb.PushStatus:
    return pb.PushStatus(
        url=pusher.url,
        circuit=_CIRCUITS[pusher.circuit.state],
        detail=pusher.circuit.detail,
        concurrency=pusher.concurrency,
        requests=pusher.requests,
    )


def _timestamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // _NS, nanos=time_ns % _NS)
