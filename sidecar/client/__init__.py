"""
The asyncio client of a sidecar, for Python apps and for our own command line.

    async with Sidecar() as sidecar:
        [receipt] = await sidecar.publish("orders.created", [new_event("orders.created", {"id": 1})])

        async with sidecar.subscribe("billing") as deliveries:
            async for delivery in deliveries:
                delivery.ack()

A call that fails as a whole raises CallFailed. One event or one settlement of a batch that fails is
a value in the answer (PublishFailed, SettleFailed), and its neighbours are not affected.
"""

from sidecar.client.connection import Sidecar, default_target
from sidecar.client.consumer import Consumer, StreamDelivery
from sidecar.client.dead_letters import DeadLetters
from sidecar.client.values import (
    BrokerStatus,
    CallFailed,
    DeadLetter,
    DeadLetterFilter,
    Delivery,
    Failure,
    Filter,
    Opened,
    PublishFailed,
    RedriveProgress,
    RetryPolicy,
    RetryRule,
    RouteStatus,
    SettleFailed,
    StartAt,
    Status,
    SubscriptionSpec,
    SubscriptionStatus,
    new_event,
)
from sidecar.event import Durability, Event, Position, Receipt, Settlement, Verdict

__all__ = [
    "BrokerStatus",
    "CallFailed",
    "Consumer",
    "DeadLetter",
    "DeadLetterFilter",
    "DeadLetters",
    "Delivery",
    "Durability",
    "Event",
    "Failure",
    "Filter",
    "Opened",
    "Position",
    "PublishFailed",
    "Receipt",
    "RedriveProgress",
    "RetryPolicy",
    "RetryRule",
    "RouteStatus",
    "SettleFailed",
    "Settlement",
    "Sidecar",
    "StartAt",
    "Status",
    "StreamDelivery",
    "SubscriptionSpec",
    "SubscriptionStatus",
    "Verdict",
    "default_target",
    "new_event",
]
