"""What happened, as values; who cares (metrics, later traces) is somebody else's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.event import Outcome


@dataclass(frozen=True, slots=True)
class Published:
    """One batch was answered by one broker."""

    broker: str
    """Empty: it never reached one."""
    topic: str
    """The pattern of its route."""
    types: Sequence[str]
    """Of its events, in order; "" where there is no event but its error."""
    outcomes: Sequence[Outcome]
    """One for each type."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Settled:
    """Deliveries of one subscription ended: ack, nack, reject, expired or released."""

    subscription: str
    result: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Skipped:
    """Events of one subscription were acked without being handed over."""

    subscription: str
    why: str
    """filtered, expired or duplicate."""
    count: int = 1


@dataclass(frozen=True, slots=True)
class Pushed:
    """One request of push ended."""

    subscription: str
    outcome: str
    """ack, nack, reject, timeout, unreachable or broken."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Reestablished:
    """The watchdog subscribed anew: there were events, and none came."""

    subscription: str


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """One event went to the dead letters."""

    subscription: str
    reason: str


class PublishFacts(Protocol):
    """Who is told of publishing. Quick, and never raises: it is called on the path of an event."""

    def published(self, fact: Published) -> None: ...


class Facts(PublishFacts, Protocol):
    """Who is told of everything."""

    def settled(self, fact: Settled) -> None: ...

    def skipped(self, fact: Skipped) -> None: ...

    def pushed(self, fact: Pushed) -> None: ...

    def reestablished(self, fact: Reestablished) -> None: ...

    def dead_lettered(self, fact: DeadLettered) -> None: ...
