"""Every error the sidecar raises: a stable code, and whether trying again can help."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class SidecarError(Exception):
    """
    What went wrong, for people (the message) and for programs (the code and the metadata).

    *metadata* names what is meant: field, topic, broker, limit. Values are strings and never
    event data or secrets.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, retry_after: float | None = None, **metadata: object
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Seconds to wait before the next try, where that is known."""
        self.metadata: Mapping[str, str] = {k: str(v) for k, v in metadata.items()}


class Internal(SidecarError):
    """A fault of the sidecar itself."""


# -- the caller's input


class InvalidRequest(SidecarError):
    """The call as a whole makes no sense."""

    code = "REQUEST_INVALID"


class InvalidEvent(SidecarError):
    """One event breaks a rule of CloudEvents or of the sidecar."""

    code = "EVENT_INVALID"


class EventTooLarge(InvalidEvent):
    """The event is larger than the configuration or the broker allows."""

    code = "EVENT_TOO_LARGE"


class InvalidTopic(InvalidRequest):
    """Not a topic one can publish to, or not a pattern one can subscribe to."""

    code = "TOPIC_INVALID"


class MalformedBody(InvalidRequest):
    """The bytes of a request are not what their content type says."""

    code = "BODY_MALFORMED"


class UnsupportedMediaType(InvalidRequest):
    """A content type or encoding that this door does not speak."""

    code = "MEDIA_TYPE_UNSUPPORTED"


class MethodMissing(SidecarError):
    """No such RPC or path."""

    code = "METHOD_MISSING"


class BadToken(InvalidRequest):
    """Not a delivery token of this sidecar."""

    code = "TOKEN_INVALID"


# -- what is not there, or not so


class NoRoute(SidecarError):
    """No route matches the topic or the event's type."""

    code = "ROUTE_MISSING"


class TopicMissing(SidecarError):
    """The broker does not know the topic (JetStream: no stream has the subject)."""

    code = "TOPIC_MISSING"


class SubscriptionMissing(SidecarError):
    """Neither declared in the configuration nor described by an app so far."""

    code = "SUBSCRIPTION_MISSING"


class DeadLetterMissing(SidecarError):
    """No dead letter of this id, or no broker of its name."""

    code = "DEAD_LETTER_MISSING"


class SubscriptionConflict(SidecarError):
    """The description differs from the subscription of that name that is in use."""

    code = "SUBSCRIPTION_CONFLICT"


class NotSupported(SidecarError):
    """The broker cannot keep what was asked for."""

    code = "NOT_SUPPORTED"


class BrokerRefused(SidecarError):
    """The broker answered, and the answer was no; the same call will fail again."""

    code = "BROKER_REFUSED"


# -- settling


class AlreadySettled(SidecarError):
    """The delivery is over: settled before, or handed back."""

    code = "ALREADY_SETTLED"


class LeaseExpired(SidecarError):
    """Too late: the lease ended, and the event is on its way again."""

    code = "LEASE_EXPIRED"


# -- what may pass


class BrokerUnavailable(SidecarError):
    """Not connected. Nothing was published."""

    code = "BROKER_UNAVAILABLE"
    retryable = True


class OutcomeUnknown(SidecarError):
    """No answer in time: the event may be stored. Publish it again with the same id."""

    code = "OUTCOME_UNKNOWN"
    retryable = True


class QueueFull(SidecarError):
    """A bounded queue stayed full."""

    code = "QUEUE_FULL"
    retryable = True


class Draining(SidecarError):
    """The sidecar is stopping."""

    code = "DRAINING"
    retryable = True


class DeadlineExceeded(SidecarError):
    """The caller's time is up, or the caller said nothing for too long."""

    code = "DEADLINE_EXCEEDED"
    retryable = True


class SourceLost(SidecarError):
    """A subscription's feed at its broker ended; subscribe again."""

    code = "SOURCE_LOST"
    retryable = True


# -- before anything runs


class ConfigInvalid(SidecarError):
    """Everything that is wrong with the configuration, one problem per key path."""

    code = "CONFIG_INVALID"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class EmbeddedServerFailed(SidecarError):
    """The nats-server child could not be started, or its data directory is taken."""

    code = "EMBEDDED_SERVER_FAILED"


class AddressUnavailable(SidecarError):
    """A socket of ours could not be opened."""

    code = "ADDRESS_UNAVAILABLE"
