"""What a broker needs to be measured against: a server, an empty topic, and its raw client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

    from tests.benchmarks.spec import Sample, Spec


EXTERNAL = "external broker"
EMBEDDED = "embedded server"


class Target(ABC):
    """
    A real broker of its own, started with the benchmarks and gone with them; a context manager.

    Its raw loads do what the sidecar's loads do, with the client library alone.
    """

    name: ClassVar[str]
    raw_loads: ClassVar[Mapping[str, Callable[[Spec], Awaitable[Sample]]]]
    """
    "raw-publish" and "raw-consume": as fast as the library goes; "raw-latency"; and "fill", which
    publishes `spec.events` events and ends.
    """

    most_consumed: ClassVar[int]
    """Events per second that anybody may consume: there are so many for each second of a round."""

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run on this machine, in a sentence; None: it can."""
        return None

    @property
    @abstractmethod
    def url(self) -> str:
        """For raw clients."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The broker's process."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Server and raw client, for people."""

    @property
    @abstractmethod
    def config(self) -> str:
        """The [brokers.…] table of the sidecar's configuration."""

    @property
    def starts(self) -> Mapping[str, str]:
        """Configurations that a sidecar is started with, to see how long it takes, by title."""
        return {EXTERNAL: self.config}

    @abstractmethod
    def empty(self, topic: str) -> None:
        """Take all events of *topic* away; make what is missing to store some."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
