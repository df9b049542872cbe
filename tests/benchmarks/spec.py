"""What a load process is told, and what it answers: one JSON document each."""

from __future__ import annotations

import msgspec


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One load, run by one process of its own."""

    load: str
    """A key of worker.LOADS, or "raw-publish", "raw-consume", "raw-latency", "fill"."""
    target: str
    """A key of targets.table.TARGETS."""
    broker_url: str
    topic: str
    grpc_socket: str = ""
    http_socket: str = ""
    push_socket: str = ""
    """Where the app is to listen that is pushed to."""
    watched_pid: int = 0
    """The process whose CPU time and memory are measured; 0: the load's own (raw clients)."""
    broker_pid: int
    callers: int = 1
    batch: int = 1
    """Events of one request."""
    events: int = 0
    """consume: how many there are; fill: how many to publish."""
    window: int = 1000
    """Events that the sidecar may hold at once."""
    credit: int = 0
    """Deliveries that may be out at once; 0: as many as it may hold."""
    kept: int = 0
    """Deliveries that the app keeps in its hands, and settles the oldest of only as more come."""
    keys: int = 1000
    """fill: how many keys the events have, in turn."""
    subscription: str = ""
    """A name not used before, so that it starts at the first event."""
    warm_seconds: float
    seconds: float


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured in one window of one load."""

    events: int
    seconds: float
    watched_cpu_seconds: float
    """User and system time of the sidecar, or of the raw client."""
    client_cpu_seconds: float
    broker_cpu_seconds: float
    other_cpu_seconds: float
    """Of everything else on the machine: on a quiet one next to nothing."""
    rss_bytes: int
    """Of the watched process, at the end of the window."""
    failures: int = 0
    """Answers that were no receipt. A sample with any is worth nothing."""
    failure: str = ""
    """What the first of them said."""
    p50_seconds: float | None = None
    p99_seconds: float | None = None

    @property
    def rate(self) -> float:
        return self.events / self.seconds

    @property
    def cpu_us(self) -> float:
        """CPU time of the watched process per event, in µs."""
        return self.watched_cpu_seconds / self.events * 1e6 if self.events else float("nan")
