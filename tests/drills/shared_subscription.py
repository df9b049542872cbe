"""Two sidecars share one subscription on a real JetStream, while things are stopped and killed."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.drills.journal import Delivered
from tests.drills.stage import Stage, acting, key_of
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable

EVENTS = 200_000
QUIET_SECONDS = 35.0
"""Longer than the ack wait: what comes again has come by then."""
GIVEN_UP_SECONDS = 60.0
LIMIT_SECONDS = 600.0
LATE_SECONDS = 25.0
"""Later than this after the disturbance is what its ack wait, 30 s, held back."""
CONFIG = """
[brokers.work]
type = "jetstream"
servers = ["{url}"]
auto_create_streams = true
reconnect_seconds = 0.5

[publishing]
timeout_seconds = 60

[[subscriptions]]
name = "drill"
topic = "drill.>"
max_in_flight = 1000
ordering = "{ordering}"
"""


@dataclass
class Report:
    """What was counted, and whether the claims hold."""

    stage: Stage
    disturbed_at: float | None
    over_all: bool
    """Order is judged over all sidecars together, whenever an event came, but for those that came again."""

    def __post_init__(self) -> None:
        deliveries = [e for e in self.stage.journal.entries if isinstance(e, Delivered)]
        counts = Counter(delivery.event for delivery in deliveries)
        self.missing = self.stage.receipts.keys() - counts.keys()
        self.unknown = counts.keys() - self.stage.receipts.keys()
        self.again = sum(count - 1 for count in counts.values())
        late_from = math.inf if self.disturbed_at is None else self.disturbed_at + LATE_SECONDS
        self.late = sum(delivery.at >= late_from for delivery in deliveries)
        if self.over_all:
            self.disorder = {"all": _overtaken(deliveries)}
            return
        self.disorder = {
            name: _disorder((d for d in deliveries if d.life.sidecar == name), late_from)
            for name in self.stage.sidecars
        }

    @property
    def holds(self) -> bool:
        return (
            not self.missing
            and not any(self.disorder.values())
            and (
                self.disturbed_at is not None
                or (self.again == 0 and len(self.stage.receipts) == self.stage.events)
            )
        )

    def text(self) -> str:
        stage = self.stage
        again = f"delivered again: {self.again} (given again after the ack wait: {self.late}; "
        lines = (
            f"published {stage.events}, acknowledged {len(stage.receipts)}",
            f"failed {dict(stage.failed)}, receipts marked duplicate {stage.duplicate_receipts}",
            f"deliveries by sidecar {dict(stage.journal.by_sidecar)}",
            f"acknowledged and missing: {len(self.missing)}",
            again + f"delivered, never acknowledged: {len(self.unknown)})",
            f"out of order, but for those given again: {self.disorder}",
            "HOLDS" if self.holds else "DOES NOT HOLD",
        )
        return "\n".join(f"   {line}" for line in lines)


def _disorder(deliveries: Iterable[Delivered], late_from: float) -> int:
    """
    Deliveries that came behind a later event of their key, but for those that came late.

    Late is what the broker gave again after its ack wait: what a sidecar that is gone had, or
    whose ack was lost. Its successors may have been handled meanwhile, by whoever got them.
    """
    newest: dict[int, int] = defaultdict(lambda: -1)
    wrong = 0
    for delivery in deliveries:
        number, key = delivery.event, key_of(delivery.event)
        wrong += number < newest[key] and delivery.at < late_from
        newest[key] = max(newest[key], number)
    return wrong


def _overtaken(deliveries: Iterable[Delivered]) -> int:
    """Events that were handed out for the first time behind a later one of their key."""
    newest: dict[int, int] = defaultdict(lambda: -1)
    seen: set[int] = set()
    wrong = 0
    for delivery in deliveries:
        number, key = delivery.event, key_of(delivery.event)
        wrong += number < newest[key] and number not in seen
        seen.add(number)
        newest[key] = max(newest[key], number)
    return wrong


class Drill:
    """One run: a server, two sidecars with a consumer each, and a third through which is published."""

    def __init__(self, server: NatsServer, stage: Stage, *, over_all: bool) -> None:
        self.server = server
        self.stage = stage
        self.over_all = over_all
        self.disturbed_at: float | None = None

    async def run(
        self, disturb: Callable[[Drill], Coroutine[None, None, None]] | None = None
    ) -> Report:
        stage = self.stage
        async with asyncio.timeout(LIMIT_SECONDS), acting(stage, "a", "b"):
            async with asyncio.TaskGroup() as tasks:
                if disturb is not None:
                    tasks.create_task(disturb(self))
                await stage.publish(stage.batches)
            await stage.quiet(QUIET_SECONDS if disturb else 2.0, given_up_after=GIVEN_UP_SECONDS)
        return Report(stage, self.disturbed_at, self.over_all)

    @property
    def busier(self) -> str:
        """The sidecar that was given more; with one at a time, the one that has the feed."""
        by_sidecar = self.stage.journal.by_sidecar
        return max("ab", key=lambda name: by_sidecar[name])

    async def half(self) -> None:
        """Wait until half of the events are published."""
        await self.stage.published(0.5)
        self.disturbed_at = asyncio.get_running_loop().time()


@contextlib.asynccontextmanager
async def _drill(events: int, ordering: str) -> AsyncIterator[Drill]:
    with NatsServer() as server:
        config = CONFIG.format(url=server.url, ordering=ordering)
        with (
            SidecarProcess(config) as publishing,
            SidecarProcess(config) as a,
            SidecarProcess(config) as b,
        ):
            stage = Stage({"publishing": publishing, "a": a, "b": b}, events)
            yield Drill(server, stage, over_all=ordering == "key")


async def _undisturbed(events: int, ordering: str) -> Report:
    async with _drill(events, ordering) as drill:
        return await drill.run()


async def _server_stopped(events: int, ordering: str) -> Report:
    async def disturb(drill: Drill) -> None:
        await drill.half()
        await asyncio.to_thread(drill.server.stop)
        await asyncio.sleep(5)
        await asyncio.to_thread(drill.server.start)

    async with _drill(events, ordering) as drill:
        return await drill.run(disturb)


async def _sidecar_killed(events: int, ordering: str) -> Report:
    async def disturb(drill: Drill) -> None:
        await drill.half()
        killed = drill.busier
        await drill.stage.kill(killed)
        await asyncio.sleep(2)
        await drill.stage.start(killed)

    async with _drill(events, ordering) as drill:
        return await drill.run(disturb)


async def undisturbed(events: int) -> Report:
    """nothing happens, events are dealt out: every id exactly once, order per key right in each sidecar"""
    return await _undisturbed(events, "key_per_replica")


async def server_stopped(events: int) -> Report:
    """events are dealt out, nats-server is stopped for 5 s in the middle"""
    return await _server_stopped(events, "key_per_replica")


async def sidecar_killed(events: int) -> Report:
    """events are dealt out, kill -9 of a consuming sidecar in the middle; it is started again"""
    return await _sidecar_killed(events, "key_per_replica")


async def ordered_undisturbed(events: int) -> Report:
    """one sidecar at a time, nothing happens: every id exactly once, order per key right over both"""
    return await _undisturbed(events, "key")


async def ordered_server_stopped(events: int) -> Report:
    """one sidecar at a time, nats-server is stopped for 5 s in the middle"""
    return await _server_stopped(events, "key")


async def ordered_sidecar_killed(events: int) -> Report:
    """one sidecar at a time, and kill -9 of that one in the middle; it is started again"""
    return await _sidecar_killed(events, "key")


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "undisturbed": undisturbed,
    "server_stopped": server_stopped,
    "sidecar_killed": sidecar_killed,
    "ordered_undisturbed": ordered_undisturbed,
    "ordered_server_stopped": ordered_server_stopped,
    "ordered_sidecar_killed": ordered_sidecar_killed,
}
