"""What is measured, and what it may cost on each broker: the table of benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from tests.benchmarks.targets.target import EMBEDDED, EXTERNAL

if TYPE_CHECKING:
    from collections.abc import Mapping


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What a benchmark is held to on one broker; None: nothing."""

    cpu_us: float | None = None
    """CPU time of the sidecar per event, at most."""
    rate: float | None = None
    """Events per second, at least."""
    ratio: float | None = None
    """Of the raw client's events per second, at least."""
    p50_ms: float | None = None
    p99_ms: float | None = None


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """One load on the sidecar, beside what the raw client does."""

    name: str
    title: str
    load: str
    raw: str = "raw-publish"
    callers: int = 1
    batch: int = 1
    window: int = 1000
    credit: int = 0
    kept: int = 0
    keys: int = 1000
    """As in Spec."""
    targets: tuple[str, ...] = ("jetstream", "kafka")
    budgets: Mapping[str, Budget] = {}
    """By target; none for a broker with whose client in mind it was not set."""


_DOORS = (
    ("unary", "grpc-unary", "gRPC unary", Budget(cpu_us=180)),
    ("connect", "connect", "Connect unary, protobuf", Budget(cpu_us=45)),
    ("cloudevents", "cloudevents", "CloudEvents binary", Budget(cpu_us=45)),
)


def _callers(load: str, name: str, title: str, budget: Budget) -> list[Bench]:
    """The budget is for 64 callers, on Kafka."""
    return [
        Bench(
            name=f"{name}-{callers}",
            title=f"publish, {title}, {callers} caller{'s' * (callers > 1)}",
            load=load,
            callers=callers,
            budgets={"kafka": budget} if callers == 64 else {},
        )
        for callers in (1, 16, 64)
    ]


_STREAM_BUDGETS = {
    "kafka": Budget(cpu_us=10, rate=90_000),
    "jetstream": Budget(cpu_us=26, ratio=0.7),
}


def _in_batches(batch: int) -> str:
    return "an event a request" if batch == 1 else f"batches of up to {batch}"


_SIZES = (1_000, 10_000, 100_000)
"""Of a partition of Kafka some 600 to 1,400 events may be unacked, so there only the first."""

BENCHES: tuple[Bench, ...] = (
    *(bench for door in _DOORS for bench in _callers(*door)),
    *(
        Bench(
            name=f"grpc-stream-{batch}",
            title=f"publish, gRPC stream, batches of {batch}",
            load="stream",
            batch=batch,
            budgets=_STREAM_BUDGETS if batch == 100 else {},
        )
        for batch in (1, 10, 100)
    ),
    Bench(
        name="consume",
        title="deliver + ack, gRPC stream, 1,000 in flight",
        load="consume",
        raw="raw-consume",
        budgets={
            "kafka": Budget(cpu_us=20, rate=40_000),
            "jetstream": Budget(cpu_us=45, rate=20_000),
        },
    ),
    Bench(
        name="consume-256",
        title="deliver + ack, gRPC stream, 256 in flight",
        load="consume",
        raw="raw-consume",
        window=256,
    ),
    *(
        Bench(
            name=f"push-{batch}",
            title=f"deliver + ack, push, {_in_batches(batch)}",
            load="push",
            raw="raw-consume",
            batch=batch,
        )
        for batch in (1, 100)
    ),
    *(
        Bench(
            name=f"consume-keys-{keys}",
            title=f"deliver + ack, {keys:,} keys in the app's hands",
            load="consume",
            raw="raw-consume",
            window=keys * 2,
            kept=keys,
            keys=keys * 2,
            targets=("jetstream", "kafka") if keys == _SIZES[0] else ("jetstream",),
        )
        for keys in _SIZES
    ),
    *(
        Bench(
            name=f"consume-waiting-{events}",
            title=f"deliver + ack, {events:,} events wait in the sidecar",
            load="consume",
            raw="raw-consume",
            window=events,
            credit=500,
            targets=("jetstream", "kafka") if events == _SIZES[0] else ("jetstream",),
        )
        for events in _SIZES
    ),
    Bench(
        name="latency",
        title="publish → receive, gRPC, 1,000 events/s",
        load="latency",
        raw="raw-latency",
        budgets={"kafka": Budget(p50_ms=1.2, p99_ms=8)},
    ),
)

START_SECONDS = {EXTERNAL: 0.8, EMBEDDED: 2.0}
IDLE_BYTES = 80e6
LOADED_BYTES = 160e6
USUAL_WINDOW = 1000
"""The budget of memory is for subscriptions that hold some hundreds of events, as they do by default."""
