"""Protobuf messages to the client's values and back; the status of a failed call to CallFailed."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from sidecar.client.values import (
    BrokerStatus,
    CallFailed,
    Delivery,
    Filter,
    Opened,
    PartitionLag,
    PublishFailed,
    PushStatus,
    RetryPolicy,
    RouteStatus,
    SettleFailed,
    StartAt,
    Status,
    SubscriptionSpec,
    SubscriptionStatus,
)
from sidecar.event import NOTHING, Durability, Event, Position, Receipt, Settlement
from sidecar.v1 import admin_pb2, event_pb2, pubsub_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NS = 1_000_000_000

# -- the status of a failed call


_RETRYABLE = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED"})
_CODE_NAMES: Mapping[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def call_failed(error: Any) -> CallFailed:
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after = None
    for detail in _details(error):
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after = seconds_from(retry.retry_delay)
    code = error.code().name
    return CallFailed(
        code,
        info.reason,
        error.details() or "",
        retryable=code in _RETRYABLE,
        metadata=dict(info.metadata),
        retry_after=retry_after,
    )


def _details(error: Any) -> Sequence[Any]:
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            with contextlib.suppress(DecodeError):
                status.ParseFromString(value)
    return tuple(status.details)


# -- protobuf messages to values and back

_DURABILITIES: Mapping[int, Durability] = {int(d): d for d in Durability}
_ORDERINGS = {
    "": pubsub_pb2.ORDERING_UNSPECIFIED,
    "key": pubsub_pb2.ORDERING_KEY,
    "key_per_replica": pubsub_pb2.ORDERING_KEY_PER_REPLICA,
    "none": pubsub_pb2.ORDERING_NONE,
}
_EXPIRED = {
    "": pubsub_pb2.EXPIRED_UNSPECIFIED,
    "dead_letter": pubsub_pb2.EXPIRED_DEAD_LETTER,
    "drop": pubsub_pb2.EXPIRED_DROP,
}
_ACTIONS = {
    "retry": pubsub_pb2.RETRY_ACTION_RETRY,
    "reject": pubsub_pb2.RETRY_ACTION_REJECT,
    "retry_uncounted": pubsub_pb2.RETRY_ACTION_RETRY_UNCOUNTED,
}


def event_to(event: Event) -> event_pb2.Event:
    time = None
    if event.time_ns:
        seconds, nanos = divmod(event.time_ns, _NS)
        time = Timestamp(seconds=seconds, nanos=nanos)
    return event_pb2.Event(
        id=event.id,
        source=event.source,
        type=event.type,
        subject=event.subject,
        time=time,
        key=event.key,
        data_content_type=event.content_type,
        data_schema=event.schema,
        data=event.data,
        extensions=event.extensions or None,
        headers=event.headers or None,
    )


def event_from(message: event_pb2.Event) -> Event:
    time = message.time
    return Event(
        message.id,
        message.source,
        message.type,
        time.seconds * _NS + time.nanos,
        message.data if message.HasField("data") else None,
        message.key,
        message.data_content_type,
        message.subject,
        message.data_schema,
        dict(message.extensions) if message.extensions else NOTHING,
        dict(message.headers) if message.headers else NOTHING,
    )


def position_from(message: event_pb2.Position) -> Position:
    return Position(
        message.stream,
        message.sequence,
        message.partition if message.HasField("partition") else None,
        message.offset if message.HasField("offset") else None,
    )


def outcome_from(result: pubsub_pb2.PublishResult) -> Receipt | PublishFailed:
    if result.HasField("failure"):
        return publish_failed(result.failure)
    receipt = result.receipt
    return Receipt(
        receipt.event_id,
        receipt.broker,
        receipt.topic,
        _DURABILITIES.get(receipt.durability, Durability.SENT),
        position_from(receipt.position) if receipt.HasField("position") else None,
        receipt.duplicate,
    )


def failure_fields(failure: event_pb2.Failure) -> dict[str, Any]:
    return {
        "reason": failure.reason,
        "message": failure.message,
        "retryable": failure.retryable,
        "retry_after": seconds_from(failure.retry_after)
        if failure.HasField("retry_after")
        else None,
        "code": _CODE_NAMES.get(failure.code, "UNKNOWN"),
        "metadata": dict(failure.metadata),
    }


def publish_failed(failure: event_pb2.Failure) -> PublishFailed:
    return PublishFailed(**failure_fields(failure))


def settle_failed(result: pubsub_pb2.SettleResult) -> SettleFailed:
    return SettleFailed(**failure_fields(result.failure), token=result.token)


def delivery_from(message: pubsub_pb2.Delivery) -> Delivery:
    return Delivery(
        message.token,
        event_from(message.event),
        message.topic,
        message.attempt,
        position_from(message.position) if message.HasField("position") else None,
    )


def settlement_to(settlement: Settlement) -> pubsub_pb2.Settlement:
    return pubsub_pb2.Settlement(
        token=settlement.token,
        verdict=int(settlement.verdict),  # type: ignore[arg-type] # same numbers
        delay=duration_to(settlement.delay),
        reason=settlement.reason,
        uncounted=settlement.uncounted,
    )


def publish_options(
    min_durability: Durability | None, timeout_seconds: float | None
) -> pubsub_pb2.PublishOptions | None:
    if min_durability is None and timeout_seconds is None:
        return None
    return pubsub_pb2.PublishOptions(
        min_durability=int(min_durability or 0),  # type: ignore[arg-type] # same numbers
        timeout=duration_to(timeout_seconds),
    )


def set_target(
    message: pubsub_pb2.SubscribeOpen | pubsub_pb2.PullRequest, target: str | SubscriptionSpec
) -> None:
    if isinstance(target, str):
        message.subscription = target
    else:
        message.spec.CopyFrom(_spec_to(target))


def _spec_to(spec: SubscriptionSpec) -> pubsub_pb2.SubscriptionSpec:
    return pubsub_pb2.SubscriptionSpec(
        name=spec.name,
        topic=spec.topic,
        broker=spec.broker,
        ordering=_ORDERINGS[spec.ordering],
        max_in_flight=spec.max_in_flight,
        lease=duration_to(spec.lease_seconds),
        retry=None if spec.retry is None else _retry_to(spec.retry),
        dead_letter_topic=spec.dead_letter_topic,
        dead_letter_broker=spec.dead_letter_broker,
        start=None if spec.start is None else start_to(spec.start),
        event_types=spec.event_types,
        max_in_flight_bytes=spec.max_in_flight_bytes,
        filters=[_filter_to(one) for one in spec.filters],
        expired=_EXPIRED[spec.expired],
        duplicate_window=duration_to(spec.duplicate_window_seconds),
        watchdog=duration_to(spec.watchdog_seconds),
    )


def _filter_to(condition: Filter) -> pubsub_pb2.Filter:
    dialect = condition.dialect
    if dialect == "not":
        [part] = condition.parts
        value: Any = _filter_to(part)
    elif dialect in {"all", "any"}:
        value = pubsub_pb2.FilterList(filters=[_filter_to(part) for part in condition.parts])
    else:
        value = pubsub_pb2.AttributeValues(attributes=condition.attributes)
    return pubsub_pb2.Filter(**{dialect: value})


def _retry_to(retry: RetryPolicy) -> pubsub_pb2.RetryPolicy:
    return pubsub_pb2.RetryPolicy(
        max_attempts=retry.max_attempts,
        initial=duration_to(retry.initial_seconds),
        max=duration_to(retry.max_seconds),
        multiplier=retry.multiplier,
        jitter=retry.jitter,
        total=duration_to(retry.total_seconds),
        max_crashes=retry.max_crashes,
        rules=[
            pubsub_pb2.RetryRule(
                reason=rule.reason,
                action=_ACTIONS[rule.action],
                delay=duration_to(rule.delay_seconds),
            )
            for rule in retry.rules
        ],
    )


def start_to(start: StartAt) -> event_pb2.StartPosition:
    if isinstance(start, Position):
        position = event_pb2.Position(
            stream=start.stream,
            sequence=start.sequence,
            partition=start.partition,
            offset=start.offset,
        )
        return event_pb2.StartPosition(position=position)
    if isinstance(start, datetime):
        time = Timestamp()
        time.FromDatetime(start)
        return event_pb2.StartPosition(time=time)
    if start == "latest":
        return event_pb2.StartPosition(latest=event_pb2.StartPosition.Latest())
    return event_pb2.StartPosition(earliest=event_pb2.StartPosition.Earliest())


def opened_from(message: pubsub_pb2.SubscribeOpened) -> Opened:
    return Opened(
        message.subscription,
        message.broker,
        message.topic,
        seconds_from(message.lease),
        message.max_attempts,
    )


def status_from(message: admin_pb2.GetStatusResponse) -> Status:
    return Status(
        version=message.version,
        app=message.app,
        started_at=datetime_from(message, "started_at"),
        ready=message.ready,
        not_ready=tuple(message.not_ready),
        draining=message.draining,
        brokers=tuple(_broker_from(broker) for broker in message.brokers),
        routes=tuple(
            RouteStatus(route.topic, route.event_type, route.broker) for route in message.routes
        ),
        subscriptions=tuple(_subscription_from(s) for s in message.subscriptions),
    )


def _broker_from(message: admin_pb2.BrokerStatus) -> BrokerStatus:
    return BrokerStatus(
        name=message.name,
        type=message.type,
        connected=message.connected,
        since=datetime_from(message, "since"),
        detail=message.detail,
        reconnects=message.reconnects,
        pending_events=message.pending_events,
    )


def _subscription_from(message: admin_pb2.SubscriptionStatus) -> SubscriptionStatus:
    state = admin_pb2.SubscriptionState.Name(message.state)
    ordering = pubsub_pb2.Ordering.Name(message.ordering)
    return SubscriptionStatus(
        name=message.name,
        topic=message.topic,
        broker=message.broker,
        ordering=ordering.removeprefix("ORDERING_").lower(),
        state=state.removeprefix("SUBSCRIPTION_STATE_").lower(),
        detail=message.detail,
        consumers=message.consumers,
        in_flight_events=message.in_flight_events,
        waiting_events=message.waiting_events,
        retry_waiting_events=message.retry_waiting_events,
        lag_events=message.lag_events if message.HasField("lag_events") else None,
        declared=message.declared,
        partitions=tuple(
            PartitionLag(p.topic, p.partition, p.lag_events) for p in message.partitions
        ),
        held_bytes=message.held_bytes,
        reestablished=message.reestablished,
        push=_push_from(message.push) if message.HasField("push") else None,
        standby=message.standby,
    )


def _push_from(message: admin_pb2.PushStatus) -> PushStatus:
    circuit = admin_pb2.CircuitState.Name(message.circuit)
    return PushStatus(
        url=message.url,
        circuit=circuit.removeprefix("CIRCUIT_STATE_").lower(),
        detail=message.detail,
        concurrency=message.concurrency,
        requests=message.requests,
    )


def datetime_from(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    moment: datetime = getattr(message, field).ToDatetime(tzinfo=UTC)
    return moment


def duration_to(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    whole, rest = divmod(round(seconds * _NS), _NS)
    return Duration(seconds=whole, nanos=rest)


def seconds_from(duration: Duration) -> float:
    return duration.seconds + duration.nanos / _NS
