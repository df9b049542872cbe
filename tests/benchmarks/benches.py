"""What is measured, and what it may cost: the table of benchmarks."""

from __future__ import annotations

import msgspec


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What a benchmark is held to; None: nothing."""

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
    budget: Budget = Budget()


_DOORS = (
    ("unary", "grpc-unary", "gRPC unary", Budget(cpu_us=180)),
    ("connect", "connect", "Connect unary, protobuf", Budget(cpu_us=45)),
    ("cloudevents", "cloudevents", "CloudEvents binary", Budget(cpu_us=45)),
)


def _callers(load: str, name: str, title: str, budget: Budget) -> list[Bench]:
    """The budget is for 64 callers."""
    return [
        Bench(
            name=f"{name}-{callers}",
            title=f"publish, {title}, {callers} caller{'s' * (callers > 1)}",
            load=load,
            callers=callers,
            budget=budget if callers == 64 else Budget(),
        )
        for callers in (1, 16, 64)
    ]


BENCHES: tuple[Bench, ...] = (
    *(bench for door in _DOORS for bench in _callers(*door)),
    *(
        Bench(
            name=f"grpc-stream-{batch}",
            title=f"publish, gRPC stream, batches of {batch}",
            load="stream",
            batch=batch,
            budget=Budget(cpu_us=26, ratio=0.7) if batch == 100 else Budget(),
        )
        for batch in (1, 10, 100)
    ),
    Bench(
        name="consume",
        title="deliver + ack, gRPC stream, 1,000 in flight",
        load="consume",
        raw="raw-consume",
        budget=Budget(cpu_us=45, rate=20_000),
    ),
    Bench(
        name="consume-256",
        title="deliver + ack, gRPC stream, 256 in flight",
        load="consume",
        raw="raw-consume",
        window=256,
    ),
    Bench(
        name="latency",
        title="publish → receive, gRPC, 1,000 events/s",
        load="latency",
        raw="raw-latency",
        budget=Budget(p50_ms=1.2, p99_ms=8),
    ),
)

START_SECONDS = 0.8
START_EMBEDDED_SECONDS = 2.0
IDLE_BYTES = 80e6
LOADED_BYTES = 160e6
