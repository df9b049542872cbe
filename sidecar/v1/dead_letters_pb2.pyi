import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sidecar.v1 import event_pb2 as _event_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeadLetterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEAD_LETTER_STATE_UNSPECIFIED: _ClassVar[DeadLetterState]
    DEAD_LETTER_STATE_OPEN: _ClassVar[DeadLetterState]
    DEAD_LETTER_STATE_REDRIVEN: _ClassVar[DeadLetterState]
    DEAD_LETTER_STATE_DISCARDED: _ClassVar[DeadLetterState]
    DEAD_LETTER_STATE_CLAIMED: _ClassVar[DeadLetterState]
DEAD_LETTER_STATE_UNSPECIFIED: DeadLetterState
DEAD_LETTER_STATE_OPEN: DeadLetterState
DEAD_LETTER_STATE_REDRIVEN: DeadLetterState
DEAD_LETTER_STATE_DISCARDED: DeadLetterState
DEAD_LETTER_STATE_CLAIMED: DeadLetterState

class DeadLetter(_message.Message):
    __slots__ = ("id", "event", "subscription", "reason", "error", "broker", "topic", "position", "attempts", "first_failed_at", "last_failed_at", "generation", "dead_letter_broker", "dead_letter_topic", "dead_letter_position", "stored_at", "state", "data_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FAILED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILED_AT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_BROKER_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_TOPIC_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_POSITION_FIELD_NUMBER: _ClassVar[int]
    STORED_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    event: _event_pb2.Event
    subscription: str
    reason: str
    error: str
    broker: str
    topic: str
    position: _event_pb2.Position
    attempts: int
    first_failed_at: _timestamp_pb2.Timestamp
    last_failed_at: _timestamp_pb2.Timestamp
    generation: int
    dead_letter_broker: str
    dead_letter_topic: str
    dead_letter_position: _event_pb2.Position
    stored_at: _timestamp_pb2.Timestamp
    state: DeadLetterState
    data_bytes: int
    def __init__(self, id: _Optional[str] = ..., event: _Optional[_Union[_event_pb2.Event, _Mapping]] = ..., subscription: _Optional[str] = ..., reason: _Optional[str] = ..., error: _Optional[str] = ..., broker: _Optional[str] = ..., topic: _Optional[str] = ..., position: _Optional[_Union[_event_pb2.Position, _Mapping]] = ..., attempts: _Optional[int] = ..., first_failed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_failed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., generation: _Optional[int] = ..., dead_letter_broker: _Optional[str] = ..., dead_letter_topic: _Optional[str] = ..., dead_letter_position: _Optional[_Union[_event_pb2.Position, _Mapping]] = ..., stored_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[_Union[DeadLetterState, str]] = ..., data_bytes: _Optional[int] = ...) -> None: ...

class DeadLetterFilter(_message.Message):
    __slots__ = ("ids", "subscription", "reasons", "after", "before", "event_type", "key", "error_contains", "topic", "dead_letter_broker", "dead_letter_topic")
    IDS_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ERROR_CONTAINS_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_BROKER_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_TOPIC_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    subscription: str
    reasons: _containers.RepeatedScalarFieldContainer[str]
    after: _timestamp_pb2.Timestamp
    before: _timestamp_pb2.Timestamp
    event_type: str
    key: str
    error_contains: str
    topic: str
    dead_letter_broker: str
    dead_letter_topic: str
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., subscription: _Optional[str] = ..., reasons: _Optional[_Iterable[str]] = ..., after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., before: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., event_type: _Optional[str] = ..., key: _Optional[str] = ..., error_contains: _Optional[str] = ..., topic: _Optional[str] = ..., dead_letter_broker: _Optional[str] = ..., dead_letter_topic: _Optional[str] = ...) -> None: ...

class DeadLettersListRequest(_message.Message):
    __slots__ = ("filter", "page_size", "page_token", "oldest_first", "include_settled", "include_data")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIRST_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SETTLED_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_DATA_FIELD_NUMBER: _ClassVar[int]
    filter: DeadLetterFilter
    page_size: int
    page_token: str
    oldest_first: bool
    include_settled: bool
    include_data: bool
    def __init__(self, filter: _Optional[_Union[DeadLetterFilter, _Mapping]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., oldest_first: _Optional[bool] = ..., include_settled: _Optional[bool] = ..., include_data: _Optional[bool] = ...) -> None: ...

class DeadLettersListResponse(_message.Message):
    __slots__ = ("dead_letters", "next_page_token")
    DEAD_LETTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    dead_letters: _containers.RepeatedCompositeFieldContainer[DeadLetter]
    next_page_token: str
    def __init__(self, dead_letters: _Optional[_Iterable[_Union[DeadLetter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeadLettersGetRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeadLettersGetResponse(_message.Message):
    __slots__ = ("dead_letter",)
    DEAD_LETTER_FIELD_NUMBER: _ClassVar[int]
    dead_letter: DeadLetter
    def __init__(self, dead_letter: _Optional[_Union[DeadLetter, _Mapping]] = ...) -> None: ...

class DeadLettersRedriveRequest(_message.Message):
    __slots__ = ("filter", "all", "rate_per_second", "to_topic", "to_broker", "dry_run", "limit")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    RATE_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TO_TOPIC_FIELD_NUMBER: _ClassVar[int]
    TO_BROKER_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    filter: DeadLetterFilter
    all: bool
    rate_per_second: float
    to_topic: str
    to_broker: str
    dry_run: bool
    limit: int
    def __init__(self, filter: _Optional[_Union[DeadLetterFilter, _Mapping]] = ..., all: _Optional[bool] = ..., rate_per_second: _Optional[float] = ..., to_topic: _Optional[str] = ..., to_broker: _Optional[str] = ..., dry_run: _Optional[bool] = ..., limit: _Optional[int] = ...) -> None: ...

class DeadLettersProgress(_message.Message):
    __slots__ = ("scanned", "matched", "done", "failed", "waiting", "total", "failure")
    SCANNED_FIELD_NUMBER: _ClassVar[int]
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    scanned: int
    matched: int
    done: int
    failed: int
    waiting: int
    total: int
    failure: _event_pb2.Failure
    def __init__(self, scanned: _Optional[int] = ..., matched: _Optional[int] = ..., done: _Optional[int] = ..., failed: _Optional[int] = ..., waiting: _Optional[int] = ..., total: _Optional[int] = ..., failure: _Optional[_Union[_event_pb2.Failure, _Mapping]] = ...) -> None: ...

class DeadLettersRedriveResponse(_message.Message):
    __slots__ = ("progress", "finished")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    progress: DeadLettersProgress
    finished: bool
    def __init__(self, progress: _Optional[_Union[DeadLettersProgress, _Mapping]] = ..., finished: _Optional[bool] = ...) -> None: ...

class DeadLettersDiscardRequest(_message.Message):
    __slots__ = ("filter", "all", "dry_run", "limit")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    filter: DeadLetterFilter
    all: bool
    dry_run: bool
    limit: int
    def __init__(self, filter: _Optional[_Union[DeadLetterFilter, _Mapping]] = ..., all: _Optional[bool] = ..., dry_run: _Optional[bool] = ..., limit: _Optional[int] = ...) -> None: ...

class DeadLettersDiscardResponse(_message.Message):
    __slots__ = ("progress", "finished")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    progress: DeadLettersProgress
    finished: bool
    def __init__(self, progress: _Optional[_Union[DeadLettersProgress, _Mapping]] = ..., finished: _Optional[bool] = ...) -> None: ...
