"""What an RPC is, whatever door it comes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from google.protobuf.message import Message

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler may know of its caller."""

    timeout: float | None = None
    """Seconds until the caller gives up, where it said so."""
    peer: str = ""


@dataclass(frozen=True, slots=True)
class UnaryMethod(Generic[RequestT, ResponseT]):
    """One unary RPC. Its handler raises SidecarError and nothing else on purpose."""

    service: str
    """With the package, as "sidecar.v1.PubSub"."""
    name: str
    request: type[RequestT]
    response: type[ResponseT]
    handler: Callable[[RequestT, Call], Awaitable[ResponseT]]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


@dataclass(frozen=True, slots=True)
class ServerStreamMethod(Generic[RequestT, ResponseT]):
    """One RPC with a stream of answers. Its handler raises SidecarError and nothing else on purpose."""

    service: str
    name: str
    request: type[RequestT]
    response: type[ResponseT]
    handler: Callable[[RequestT, Call], AsyncGenerator[ResponseT]]
    """Closed early when the caller has gone."""

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"
