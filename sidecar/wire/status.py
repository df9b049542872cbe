"""Our errors in the words of gRPC, Connect and HTTP: codes, ErrorInfo, RetryInfo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from sidecar import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

DOMAIN = "sidecar"

CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = 1, 2, 3, 4, 5
ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION = 6, 7, 8, 9
ABORTED, OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 10, 11, 12, 13, 14
DATA_LOSS, UNAUTHENTICATED = 15, 16

_CODES: Mapping[type[errors.SidecarError], int] = {
    errors.Internal: INTERNAL,
    errors.InvalidRequest: INVALID_ARGUMENT,
    errors.InvalidEvent: INVALID_ARGUMENT,
    errors.EventTooLarge: INVALID_ARGUMENT,
    errors.InvalidTopic: INVALID_ARGUMENT,
    errors.MalformedBody: INVALID_ARGUMENT,
    errors.UnsupportedMediaType: INVALID_ARGUMENT,
    errors.BadToken: INVALID_ARGUMENT,
    errors.MethodMissing: UNIMPLEMENTED,
    errors.NoRoute: NOT_FOUND,
    errors.TopicMissing: NOT_FOUND,
    errors.SubscriptionMissing: NOT_FOUND,
    errors.DeadLetterMissing: NOT_FOUND,
    errors.SubscriptionConflict: FAILED_PRECONDITION,
    errors.NotSupported: FAILED_PRECONDITION,
    errors.BrokerRefused: FAILED_PRECONDITION,
    errors.AlreadySettled: FAILED_PRECONDITION,
    errors.LeaseExpired: FAILED_PRECONDITION,
    errors.BrokerUnavailable: UNAVAILABLE,
    errors.SourceLost: UNAVAILABLE,
    errors.Draining: UNAVAILABLE,
    errors.OutcomeUnknown: DEADLINE_EXCEEDED,
    errors.DeadlineExceeded: DEADLINE_EXCEEDED,
    errors.QueueFull: RESOURCE_EXHAUSTED,
}
"""google.rpc.Code of each error that can reach a caller."""

_HTTP_STATUS = {
    CANCELLED: 499,
    UNKNOWN: 500,
    INVALID_ARGUMENT: 400,
    DEADLINE_EXCEEDED: 504,
    NOT_FOUND: 404,
    ALREADY_EXISTS: 409,
    PERMISSION_DENIED: 403,
    RESOURCE_EXHAUSTED: 429,
    FAILED_PRECONDITION: 400,
    ABORTED: 409,
    OUT_OF_RANGE: 400,
    UNIMPLEMENTED: 501,
    INTERNAL: 500,
    UNAVAILABLE: 503,
    DATA_LOSS: 500,
    UNAUTHENTICATED: 401,
}
"""The Connect protocol's table, "Error codes"."""

CONNECT_CODES = {
    CANCELLED: "canceled",
    UNKNOWN: "unknown",
    INVALID_ARGUMENT: "invalid_argument",
    DEADLINE_EXCEEDED: "deadline_exceeded",
    NOT_FOUND: "not_found",
    ALREADY_EXISTS: "already_exists",
    PERMISSION_DENIED: "permission_denied",
    RESOURCE_EXHAUSTED: "resource_exhausted",
    FAILED_PRECONDITION: "failed_precondition",
    ABORTED: "aborted",
    OUT_OF_RANGE: "out_of_range",
    UNIMPLEMENTED: "unimplemented",
    INTERNAL: "internal",
    UNAVAILABLE: "unavailable",
    DATA_LOSS: "data_loss",
    UNAUTHENTICATED: "unauthenticated",
}


def code_of(error: errors.SidecarError) -> int:
    """The google.rpc.Code of an error."""
    for kind in type(error).__mro__:
        code = _CODES.get(kind)
        if code is not None:
            return code
    return INTERNAL


def http_status_of(code: int) -> int:
    """The HTTP status that the Connect protocol gives a code."""
    return _HTTP_STATUS.get(code, 500)


def details_of(error: errors.SidecarError) -> list[any_pb2.Any]:
    """ErrorInfo always; RetryInfo where the error knows how long to wait."""
    info = error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata=error.metadata)
    details: list[error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo] = [info]
    if error.retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after)))
    packed = []
    for detail in details:
        item = any_pb2.Any()
        item.Pack(detail)
        packed.append(item)
    return packed


def status_of(error: errors.SidecarError) -> status_pb2.Status:
    """The error as google.rpc.Status, for the grpc-status-details-bin trailer."""
    return status_pb2.Status(code=code_of(error), message=error.message, details=details_of(error))


def duration(seconds: float) -> duration_pb2.Duration:
    whole, rest = divmod(round(seconds * 1e9), 1_000_000_000)
    return duration_pb2.Duration(seconds=whole, nanos=rest)
