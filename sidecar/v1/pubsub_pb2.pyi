import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sidecar.v1 import event_pb2 as _event_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Ordering(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORDERING_UNSPECIFIED: _ClassVar[Ordering]
    ORDERING_KEY: _ClassVar[Ordering]
    ORDERING_NONE: _ClassVar[Ordering]
    ORDERING_KEY_PER_REPLICA: _ClassVar[Ordering]

class RetryAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RETRY_ACTION_UNSPECIFIED: _ClassVar[RetryAction]
    RETRY_ACTION_RETRY: _ClassVar[RetryAction]
    RETRY_ACTION_REJECT: _ClassVar[RetryAction]
    RETRY_ACTION_RETRY_UNCOUNTED: _ClassVar[RetryAction]

class Expired(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPIRED_UNSPECIFIED: _ClassVar[Expired]
    EXPIRED_DEAD_LETTER: _ClassVar[Expired]
    EXPIRED_DROP: _ClassVar[Expired]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_ACK: _ClassVar[Verdict]
    VERDICT_NACK: _ClassVar[Verdict]
    VERDICT_REJECT: _ClassVar[Verdict]
    VERDICT_EXTEND: _ClassVar[Verdict]
ORDERING_UNSPECIFIED: Ordering
ORDERING_KEY: Ordering
ORDERING_NONE: Ordering
ORDERING_KEY_PER_REPLICA: Ordering
RETRY_ACTION_UNSPECIFIED: RetryAction
RETRY_ACTION_RETRY: RetryAction
RETRY_ACTION_REJECT: RetryAction
RETRY_ACTION_RETRY_UNCOUNTED: RetryAction
EXPIRED_UNSPECIFIED: Expired
EXPIRED_DEAD_LETTER: Expired
EXPIRED_DROP: Expired
VERDICT_UNSPECIFIED: Verdict
VERDICT_ACK: Verdict
VERDICT_NACK: Verdict
VERDICT_REJECT: Verdict
VERDICT_EXTEND: Verdict

class PublishRequest(_message.Message):
    __slots__ = ("topic", "events", "options")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    topic: str
    events: _containers.RepeatedCompositeFieldContainer[_event_pb2.Event]
    options: PublishOptions
    def __init__(self, topic: _Optional[str] = ..., events: _Optional[_Iterable[_Union[_event_pb2.Event, _Mapping]]] = ..., options: _Optional[_Union[PublishOptions, _Mapping]] = ...) -> None: ...

class PublishOptions(_message.Message):
    __slots__ = ("min_durability", "atomic", "timeout", "deliver_at", "deliver_after")
    MIN_DURABILITY_FIELD_NUMBER: _ClassVar[int]
    ATOMIC_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DELIVER_AT_FIELD_NUMBER: _ClassVar[int]
    DELIVER_AFTER_FIELD_NUMBER: _ClassVar[int]
    min_durability: _event_pb2.Durability
    atomic: bool
    timeout: _duration_pb2.Duration
    deliver_at: _timestamp_pb2.Timestamp
    deliver_after: _duration_pb2.Duration
    def __init__(self, min_durability: _Optional[_Union[_event_pb2.Durability, str]] = ..., atomic: _Optional[bool] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., deliver_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., deliver_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[PublishResult]
    def __init__(self, results: _Optional[_Iterable[_Union[PublishResult, _Mapping]]] = ...) -> None: ...

class PublishResult(_message.Message):
    __slots__ = ("receipt", "failure")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    receipt: _event_pb2.Receipt
    failure: _event_pb2.Failure
    def __init__(self, receipt: _Optional[_Union[_event_pb2.Receipt, _Mapping]] = ..., failure: _Optional[_Union[_event_pb2.Failure, _Mapping]] = ...) -> None: ...

class PublishStreamRequest(_message.Message):
    __slots__ = ("sequence", "topic", "events", "options")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    topic: str
    events: _containers.RepeatedCompositeFieldContainer[_event_pb2.Event]
    options: PublishOptions
    def __init__(self, sequence: _Optional[int] = ..., topic: _Optional[str] = ..., events: _Optional[_Iterable[_Union[_event_pb2.Event, _Mapping]]] = ..., options: _Optional[_Union[PublishOptions, _Mapping]] = ...) -> None: ...

class PublishStreamResponse(_message.Message):
    __slots__ = ("sequence", "results", "failure")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    results: _containers.RepeatedCompositeFieldContainer[PublishResult]
    failure: _event_pb2.Failure
    def __init__(self, sequence: _Optional[int] = ..., results: _Optional[_Iterable[_Union[PublishResult, _Mapping]]] = ..., failure: _Optional[_Union[_event_pb2.Failure, _Mapping]] = ...) -> None: ...

class RetryRule(_message.Message):
    __slots__ = ("reason", "action", "delay")
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    DELAY_FIELD_NUMBER: _ClassVar[int]
    reason: str
    action: RetryAction
    delay: _duration_pb2.Duration
    def __init__(self, reason: _Optional[str] = ..., action: _Optional[_Union[RetryAction, str]] = ..., delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("exact", "prefix", "suffix", "all", "any")
    EXACT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    ANY_FIELD_NUMBER: _ClassVar[int]
    NOT_FIELD_NUMBER: _ClassVar[int]
    exact: AttributeValues
    prefix: AttributeValues
    suffix: AttributeValues
    all: FilterList
    any: FilterList
    def __init__(self, exact: _Optional[_Union[AttributeValues, _Mapping]] = ..., prefix: _Optional[_Union[AttributeValues, _Mapping]] = ..., suffix: _Optional[_Union[AttributeValues, _Mapping]] = ..., all: _Optional[_Union[FilterList, _Mapping]] = ..., any: _Optional[_Union[FilterList, _Mapping]] = ..., **kwargs) -> None: ...

class AttributeValues(_message.Message):
    __slots__ = ("attributes",)
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class FilterList(_message.Message):
    __slots__ = ("filters",)
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    filters: _containers.RepeatedCompositeFieldContainer[Filter]
    def __init__(self, filters: _Optional[_Iterable[_Union[Filter, _Mapping]]] = ...) -> None: ...

class RetryPolicy(_message.Message):
    __slots__ = ("max_attempts", "initial", "max", "multiplier", "jitter", "total", "max_crashes", "rules")
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    JITTER_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    MAX_CRASHES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    max_attempts: int
    initial: _duration_pb2.Duration
    max: _duration_pb2.Duration
    multiplier: float
    jitter: float
    total: _duration_pb2.Duration
    max_crashes: int
    rules: _containers.RepeatedCompositeFieldContainer[RetryRule]
    def __init__(self, max_attempts: _Optional[int] = ..., initial: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., multiplier: _Optional[float] = ..., jitter: _Optional[float] = ..., total: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_crashes: _Optional[int] = ..., rules: _Optional[_Iterable[_Union[RetryRule, _Mapping]]] = ...) -> None: ...

class SubscriptionSpec(_message.Message):
    __slots__ = ("name", "topic", "broker", "ordering", "max_in_flight", "lease", "retry", "dead_letter_topic", "dead_letter_broker", "start", "event_types", "max_in_flight_bytes", "filters", "expired", "duplicate_window", "watchdog")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    ORDERING_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_TOPIC_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_BROKER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPES_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_WINDOW_FIELD_NUMBER: _ClassVar[int]
    WATCHDOG_FIELD_NUMBER: _ClassVar[int]
    name: str
    topic: str
    broker: str
    ordering: Ordering
    max_in_flight: int
    lease: _duration_pb2.Duration
    retry: RetryPolicy
    dead_letter_topic: str
    dead_letter_broker: str
    start: _event_pb2.StartPosition
    event_types: _containers.RepeatedScalarFieldContainer[str]
    max_in_flight_bytes: int
    filters: _containers.RepeatedCompositeFieldContainer[Filter]
    expired: Expired
    duplicate_window: _duration_pb2.Duration
    watchdog: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., topic: _Optional[str] = ..., broker: _Optional[str] = ..., ordering: _Optional[_Union[Ordering, str]] = ..., max_in_flight: _Optional[int] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., retry: _Optional[_Union[RetryPolicy, _Mapping]] = ..., dead_letter_topic: _Optional[str] = ..., dead_letter_broker: _Optional[str] = ..., start: _Optional[_Union[_event_pb2.StartPosition, _Mapping]] = ..., event_types: _Optional[_Iterable[str]] = ..., max_in_flight_bytes: _Optional[int] = ..., filters: _Optional[_Iterable[_Union[Filter, _Mapping]]] = ..., expired: _Optional[_Union[Expired, str]] = ..., duplicate_window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., watchdog: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("open", "settlements", "credit")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENTS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    open: SubscribeOpen
    settlements: _containers.RepeatedCompositeFieldContainer[Settlement]
    credit: int
    def __init__(self, open: _Optional[_Union[SubscribeOpen, _Mapping]] = ..., settlements: _Optional[_Iterable[_Union[Settlement, _Mapping]]] = ..., credit: _Optional[int] = ...) -> None: ...

class SubscribeOpen(_message.Message):
    __slots__ = ("subscription", "spec", "consumer", "max_batch_events")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_EVENTS_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    spec: SubscriptionSpec
    consumer: str
    max_batch_events: int
    def __init__(self, subscription: _Optional[str] = ..., spec: _Optional[_Union[SubscriptionSpec, _Mapping]] = ..., consumer: _Optional[str] = ..., max_batch_events: _Optional[int] = ...) -> None: ...

class SubscribeResponse(_message.Message):
    __slots__ = ("opened", "deliveries", "rejected_settlements")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    REJECTED_SETTLEMENTS_FIELD_NUMBER: _ClassVar[int]
    opened: SubscribeOpened
    deliveries: _containers.RepeatedCompositeFieldContainer[Delivery]
    rejected_settlements: _containers.RepeatedCompositeFieldContainer[SettleResult]
    def __init__(self, opened: _Optional[_Union[SubscribeOpened, _Mapping]] = ..., deliveries: _Optional[_Iterable[_Union[Delivery, _Mapping]]] = ..., rejected_settlements: _Optional[_Iterable[_Union[SettleResult, _Mapping]]] = ...) -> None: ...

class SubscribeOpened(_message.Message):
    __slots__ = ("subscription", "broker", "topic", "lease", "max_attempts")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    broker: str
    topic: str
    lease: _duration_pb2.Duration
    max_attempts: int
    def __init__(self, subscription: _Optional[str] = ..., broker: _Optional[str] = ..., topic: _Optional[str] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_attempts: _Optional[int] = ...) -> None: ...

class Delivery(_message.Message):
    __slots__ = ("token", "event", "topic", "attempt", "position")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    token: str
    event: _event_pb2.Event
    topic: str
    attempt: int
    position: _event_pb2.Position
    def __init__(self, token: _Optional[str] = ..., event: _Optional[_Union[_event_pb2.Event, _Mapping]] = ..., topic: _Optional[str] = ..., attempt: _Optional[int] = ..., position: _Optional[_Union[_event_pb2.Position, _Mapping]] = ...) -> None: ...

class Settlement(_message.Message):
    __slots__ = ("token", "verdict", "delay", "reason", "uncounted")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    DELAY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UNCOUNTED_FIELD_NUMBER: _ClassVar[int]
    token: str
    verdict: Verdict
    delay: _duration_pb2.Duration
    reason: str
    uncounted: bool
    def __init__(self, token: _Optional[str] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., reason: _Optional[str] = ..., uncounted: _Optional[bool] = ...) -> None: ...

class SettleResult(_message.Message):
    __slots__ = ("token", "failure")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    token: str
    failure: _event_pb2.Failure
    def __init__(self, token: _Optional[str] = ..., failure: _Optional[_Union[_event_pb2.Failure, _Mapping]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("subscription", "spec", "max_events", "wait")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MAX_EVENTS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    spec: SubscriptionSpec
    max_events: int
    wait: _duration_pb2.Duration
    def __init__(self, subscription: _Optional[str] = ..., spec: _Optional[_Union[SubscriptionSpec, _Mapping]] = ..., max_events: _Optional[int] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("deliveries", "lease")
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    deliveries: _containers.RepeatedCompositeFieldContainer[Delivery]
    lease: _duration_pb2.Duration
    def __init__(self, deliveries: _Optional[_Iterable[_Union[Delivery, _Mapping]]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("settlements",)
    SETTLEMENTS_FIELD_NUMBER: _ClassVar[int]
    settlements: _containers.RepeatedCompositeFieldContainer[Settlement]
    def __init__(self, settlements: _Optional[_Iterable[_Union[Settlement, _Mapping]]] = ...) -> None: ...

class SettleResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SettleResult]
    def __init__(self, results: _Optional[_Iterable[_Union[SettleResult, _Mapping]]] = ...) -> None: ...
