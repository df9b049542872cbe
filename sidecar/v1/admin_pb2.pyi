import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sidecar.v1 import event_pb2 as _event_pb2
from sidecar.v1 import pubsub_pb2 as _pubsub_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubscriptionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUBSCRIPTION_STATE_UNSPECIFIED: _ClassVar[SubscriptionState]
    SUBSCRIPTION_STATE_CONNECTING: _ClassVar[SubscriptionState]
    SUBSCRIPTION_STATE_ACTIVE: _ClassVar[SubscriptionState]
    SUBSCRIPTION_STATE_PAUSED: _ClassVar[SubscriptionState]
    SUBSCRIPTION_STATE_DRAINING: _ClassVar[SubscriptionState]

class CircuitState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CIRCUIT_STATE_UNSPECIFIED: _ClassVar[CircuitState]
    CIRCUIT_STATE_CLOSED: _ClassVar[CircuitState]
    CIRCUIT_STATE_OPEN: _ClassVar[CircuitState]
    CIRCUIT_STATE_HALF_OPEN: _ClassVar[CircuitState]
SUBSCRIPTION_STATE_UNSPECIFIED: SubscriptionState
SUBSCRIPTION_STATE_CONNECTING: SubscriptionState
SUBSCRIPTION_STATE_ACTIVE: SubscriptionState
SUBSCRIPTION_STATE_PAUSED: SubscriptionState
SUBSCRIPTION_STATE_DRAINING: SubscriptionState
CIRCUIT_STATE_UNSPECIFIED: CircuitState
CIRCUIT_STATE_CLOSED: CircuitState
CIRCUIT_STATE_OPEN: CircuitState
CIRCUIT_STATE_HALF_OPEN: CircuitState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "app", "started_at", "ready", "not_ready", "draining", "brokers", "routes", "subscriptions")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NOT_READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTIONS_FIELD_NUMBER: _ClassVar[int]
    version: str
    app: str
    started_at: _timestamp_pb2.Timestamp
    ready: bool
    not_ready: _containers.RepeatedScalarFieldContainer[str]
    draining: bool
    brokers: _containers.RepeatedCompositeFieldContainer[BrokerStatus]
    routes: _containers.RepeatedCompositeFieldContainer[RouteStatus]
    subscriptions: _containers.RepeatedCompositeFieldContainer[SubscriptionStatus]
    def __init__(self, version: _Optional[str] = ..., app: _Optional[str] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ready: _Optional[bool] = ..., not_ready: _Optional[_Iterable[str]] = ..., draining: _Optional[bool] = ..., brokers: _Optional[_Iterable[_Union[BrokerStatus, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[RouteStatus, _Mapping]]] = ..., subscriptions: _Optional[_Iterable[_Union[SubscriptionStatus, _Mapping]]] = ...) -> None: ...

class BrokerStatus(_message.Message):
    __slots__ = ("name", "type", "connected", "since", "detail", "reconnects", "pending_events")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    PENDING_EVENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    connected: bool
    since: _timestamp_pb2.Timestamp
    detail: str
    reconnects: int
    pending_events: int
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., connected: _Optional[bool] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., detail: _Optional[str] = ..., reconnects: _Optional[int] = ..., pending_events: _Optional[int] = ...) -> None: ...

class RouteStatus(_message.Message):
    __slots__ = ("topic", "event_type", "broker")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    topic: str
    event_type: str
    broker: str
    def __init__(self, topic: _Optional[str] = ..., event_type: _Optional[str] = ..., broker: _Optional[str] = ...) -> None: ...

class SubscriptionStatus(_message.Message):
    __slots__ = ("name", "topic", "broker", "ordering", "state", "detail", "consumers", "in_flight_events", "waiting_events", "retry_waiting_events", "lag_events", "declared", "partitions", "held_bytes", "reestablished", "push", "standby")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    ORDERING_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CONSUMERS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_EVENTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_EVENTS_FIELD_NUMBER: _ClassVar[int]
    RETRY_WAITING_EVENTS_FIELD_NUMBER: _ClassVar[int]
    LAG_EVENTS_FIELD_NUMBER: _ClassVar[int]
    DECLARED_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    REESTABLISHED_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    name: str
    topic: str
    broker: str
    ordering: _pubsub_pb2.Ordering
    state: SubscriptionState
    detail: str
    consumers: int
    in_flight_events: int
    waiting_events: int
    retry_waiting_events: int
    lag_events: int
    declared: bool
    partitions: _containers.RepeatedCompositeFieldContainer[PartitionLag]
    held_bytes: int
    reestablished: int
    push: PushStatus
    standby: bool
    def __init__(self, name: _Optional[str] = ..., topic: _Optional[str] = ..., broker: _Optional[str] = ..., ordering: _Optional[_Union[_pubsub_pb2.Ordering, str]] = ..., state: _Optional[_Union[SubscriptionState, str]] = ..., detail: _Optional[str] = ..., consumers: _Optional[int] = ..., in_flight_events: _Optional[int] = ..., waiting_events: _Optional[int] = ..., retry_waiting_events: _Optional[int] = ..., lag_events: _Optional[int] = ..., declared: _Optional[bool] = ..., partitions: _Optional[_Iterable[_Union[PartitionLag, _Mapping]]] = ..., held_bytes: _Optional[int] = ..., reestablished: _Optional[int] = ..., push: _Optional[_Union[PushStatus, _Mapping]] = ..., standby: _Optional[bool] = ...) -> None: ...

class PushStatus(_message.Message):
    __slots__ = ("url", "circuit", "detail", "concurrency", "requests")
    URL_FIELD_NUMBER: _ClassVar[int]
    CIRCUIT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    url: str
    circuit: CircuitState
    detail: str
    concurrency: int
    requests: int
    def __init__(self, url: _Optional[str] = ..., circuit: _Optional[_Union[CircuitState, str]] = ..., detail: _Optional[str] = ..., concurrency: _Optional[int] = ..., requests: _Optional[int] = ...) -> None: ...

class PartitionLag(_message.Message):
    __slots__ = ("topic", "partition", "lag_events")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    LAG_EVENTS_FIELD_NUMBER: _ClassVar[int]
    topic: str
    partition: int
    lag_events: int
    def __init__(self, topic: _Optional[str] = ..., partition: _Optional[int] = ..., lag_events: _Optional[int] = ...) -> None: ...

class PauseSubscriptionRequest(_message.Message):
    __slots__ = ("subscription",)
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    def __init__(self, subscription: _Optional[str] = ...) -> None: ...

class PauseSubscriptionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeSubscriptionRequest(_message.Message):
    __slots__ = ("subscription",)
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    def __init__(self, subscription: _Optional[str] = ...) -> None: ...

class ResumeSubscriptionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SeekSubscriptionRequest(_message.Message):
    __slots__ = ("subscription", "to")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    to: _event_pb2.StartPosition
    def __init__(self, subscription: _Optional[str] = ..., to: _Optional[_Union[_event_pb2.StartPosition, _Mapping]] = ...) -> None: ...

class SeekSubscriptionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
