"""Two sidecars share one subscription on a real Kafka, while things are stopped and killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.drills.judge import Findings, Judge
from tests.drills.stage import TOPIC, Stage, acting
from tests.support.kafka import KafkaCluster
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

EVENTS = 100_000
PARTITIONS = 6
FAILING = 100
"""Each event with a number that this divides fails."""
ATTEMPTS = 3
"""So many deliveries it takes, the last of which is acked."""
RATE = 1500.0
"""Events per second where something happens meanwhile, so that it lasts about a minute."""
HURRY_RATE = 6000.0
"""So many that buffers fill up and commits are under way whenever a rebalance begins."""
LIMIT_SECONDS = 300.0
QUIET_SECONDS = 15.0
"""Longer than a session of a group: what comes again has come by then."""
GIVEN_UP_SECONDS = 45.0
AFTERWARDS_SECONDS = 5.0
DOWN_SECONDS = 2.0
COMPLAINTS = 20
"""So many lines of a sidecar's log are shown."""
CONFIG = """
[brokers.work]
type = "kafka"
bootstrap_servers = [{servers}]
group_protocol = "{protocol}"

[publishing]
timeout_seconds = 120

[[subscriptions]]
name = "drill"
topic = "drill.events"
max_in_flight = 1000
"""


def acks(event: int, attempt: int) -> bool:
    return event % FAILING != 0 or attempt >= ATTEMPTS


def attempts(event: int) -> int:
    return 1 if event % FAILING else ATTEMPTS


@dataclass
class Claim:
    """What is to hold, and what was found against it."""

    text: str
    against: Findings


class Report:
    """What was counted, and whether the claims hold."""

    def __init__(self, stage: Stage, late: str) -> None:
        """*late*: why the drill did not come to its end; empty: it did."""
        judge = Judge(stage.journal.entries, stage.receipts, attempts=attempts)
        self._stage = stage
        self._judge = judge
        self._logs = {name: one.log for name, one in stage.sidecars.items()}
        failed = [f"{count} {reason}" for reason, count in stage.failed.items()]
        ends = [f"status {s} after {seconds:.1f} s" for s, seconds in stage.stops if s != 0]
        self._claims = [
            Claim("the drill comes to its end", Findings([late] if late else [])),
            Claim("every event is acknowledged", Findings(failed)),
            Claim("what is acknowledged is delivered", _named(judge.missing)),
            Claim("and acked in the end", _named(judge.unacked)),
            Claim("a receipt says where the one copy is", judge.copies),
            Claim("in a key, in order and one at a time", judge.out_of_order),
            Claim("attempt numbers are right", judge.wrong_attempts),
            Claim("no delivery more than attempts and crashes ask for", judge.too_often),
            Claim("what was acked never comes again, but for a crash", judge.acked_again),
            Claim("orderly stops end with 0", Findings(ends)),
        ]

    @property
    def holds(self) -> bool:
        return not any(claim.against for claim in self._claims)

    def text(self) -> str:
        stage, judge = self._stage, self._judge
        by = ", ".join(f"{name} {n}" for name, n in sorted(stage.journal.by_sidecar.items()))
        refused = dict(judge.refused) or "none"
        lines = [
            f"published {stage.events}, acknowledged {len(stage.receipts)}, deliveries by {by}",
            f"settlements refused: {refused}; delivered, never acknowledged: {judge.unknown}",
            f"given back while an app had them, and delivered again: {judge.unsettled_again}",
        ]
        if stage.stops:
            took = ", ".join(f"{seconds:.1f}" for _, seconds in stage.stops)
            lines.append(f"orderly stops took {took} s")
        if judge.again_after_crash:
            lines.append(
                f"again after the crash of their holder, by what they were: "
                f"{dict(judge.again_after_crash)}; the oldest ack that was lost: "
                f"{judge.oldest_ack_lost:.3f} s before"
            )
        lines += [
            f"{'DOES NOT HOLD' if claim.against else 'holds'}: {claim.text}: {claim.against}"
            for claim in self._claims
        ]
        lines.append("HOLDS" if self.holds else "DOES NOT HOLD")
        if not self.holds:
            lines += ["the sidecars said:", *self._complaints()]
        return "\n".join(f"   {line}" for line in lines)

    def _complaints(self) -> list[str]:
        """Of each sidecar the last lines that are no mere information."""
        return [
            f"{name}: {line}"
            for name, log in self._logs.items()
            for line in _warnings(log)[-COMPLAINTS:]
        ]


def _warnings(log: str) -> list[str]:
    lines = [line for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if json.loads(line)["level"] != "info"]


def _named(events: list[int]) -> Findings:
    return Findings(f"event {number}" for number in events)


class Drill:
    """A cluster with the topic, and a stage on it with the sidecars a and b."""

    def __init__(self, cluster: KafkaCluster, stage: Stage) -> None:
        self.cluster = cluster
        self.stage = stage

    async def run(
        self, disturb: Callable[[Drill], Coroutine[None, None, None]] | None = None
    ) -> Report:
        stage, late = self.stage, ""
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                async with acting(stage, *stage.sidecars):
                    async with asyncio.TaskGroup() as tasks:
                        if disturb is not None:
                            tasks.create_task(disturb(self))
                        await stage.publish(stage.batches[:-1])
                    await stage.quiet(QUIET_SECONDS, given_up_after=GIVEN_UP_SECONDS)
                await self._afterwards()
        except TimeoutError:
            late = f"not within {LIMIT_SECONDS:g} s"
        return Report(stage, late)

    async def _afterwards(self) -> None:
        """
        A sidecar that begins anew gets the last batch, and nothing before it: all is committed.

        While they run, sidecars remember what was acked, and would hide that it was not.
        """
        stage = self.stage
        for name in [name for name, one in stage.sidecars.items() if one.process is not None]:
            await stage.stop(name)
        await stage.start("a")
        async with acting(stage, "a"):
            await stage.publish(stage.batches[-1:])
            await stage.quiet(AFTERWARDS_SECONDS, given_up_after=GIVEN_UP_SECONDS)


@contextlib.asynccontextmanager
async def _drill(
    events: int,
    *,
    nodes: int = 1,
    rate: float = RATE,
    protocol: str = "auto",
    started: str = "ab",
) -> AsyncIterator[Drill]:
    with KafkaCluster(nodes) as cluster, contextlib.ExitStack() as stack:
        cluster.create_topic(TOPIC, PARTITIONS)
        servers = ", ".join(f'"{server}"' for server in cluster.bootstrap_servers.split(","))
        config = CONFIG.format(servers=servers, protocol=protocol)
        sidecars = {}
        for name in "ab":
            sidecars[name] = SidecarProcess(config)
            stack.callback(sidecars[name].close)
            if name in started:
                sidecars[name].start()
        yield Drill(cluster, Stage(sidecars, events, rate=rate, acks=acks))


async def undisturbed(events: int) -> Report:
    """nothing happens"""
    async with _drill(events, rate=0) as drill:
        return await drill.run()


async def nodes_killed(events: int) -> Report:
    """of three nodes one is killed and comes back, then the other two at once"""

    async def disturb(drill: Drill) -> None:
        for share, nodes in ((0.15, (1,)), (0.5, (2, 3))):
            await drill.stage.published(share)
            _say(f"nodes {nodes} are killed")
            await asyncio.to_thread(drill.cluster.kill, *nodes)
            await asyncio.sleep(DOWN_SECONDS)
            await asyncio.to_thread(drill.cluster.restart, *nodes)
            await asyncio.to_thread(drill.cluster.wait_ready)
            _say("they are in step again")

    async with _drill(events, nodes=3) as drill:
        return await drill.run(disturb)


async def _come_and_go(events: int, protocol: str, *, times: int = 4, rate: float = RATE) -> Report:
    async def disturb(drill: Drill) -> None:
        for time in range(times):
            await drill.stage.published((2 * time + 1) / (2 * times + 2))
            await drill.stage.start("b")
            _say("b is there")
            await drill.stage.published((2 * time + 2) / (2 * times + 2))
            await drill.stage.stop("b")
            _say(f"b is gone after {drill.stage.stops[-1][1]:.1f} s")

    async with _drill(events, protocol=protocol, rate=rate, started="a") as drill:
        return await drill.run(disturb)


async def sidecars_come_and_go(events: int) -> Report:
    """a second sidecar joins and leaves four times; group protocol consumer"""
    return await _come_and_go(events, "consumer")


async def sidecars_come_and_go_classic(events: int) -> Report:
    """the same with group protocol classic"""
    return await _come_and_go(events, "classic")


async def sidecars_hurry(events: int) -> Report:
    """a second sidecar joins and leaves eight times, with three times the events, fast; group protocol consumer"""
    return await _come_and_go(3 * events, "consumer", times=8, rate=HURRY_RATE)


async def sidecars_hurry_classic(events: int) -> Report:
    """the same with group protocol classic"""
    return await _come_and_go(3 * events, "classic", times=8, rate=HURRY_RATE)


async def _killed(events: int, protocol: str) -> Report:
    async def disturb(drill: Drill) -> None:
        await drill.stage.published(0.5)
        await drill.stage.kill("b")
        _say("b is killed")
        await asyncio.sleep(DOWN_SECONDS)
        await drill.stage.start("b")
        _say("b is there again")

    async with _drill(events, protocol=protocol) as drill:
        return await drill.run(disturb)


async def sidecar_killed(events: int) -> Report:
    """kill -9 of the consuming sidecar b in the middle; it is started again; group protocol consumer"""
    return await _killed(events, "consumer")


async def sidecar_killed_classic(events: int) -> Report:
    """the same with group protocol classic"""
    return await _killed(events, "classic")


def _say(text: str) -> None:
    print(f"   {text}", flush=True)


SCENARIOS: dict[str, Callable[[int], Coroutine[None, None, Report]]] = {
    "kafka_undisturbed": undisturbed,
    "kafka_nodes_killed": nodes_killed,
    "kafka_sidecars_come_and_go": sidecars_come_and_go,
    "kafka_sidecars_come_and_go_classic": sidecars_come_and_go_classic,
    "kafka_sidecars_hurry": sidecars_hurry,
    "kafka_sidecars_hurry_classic": sidecars_hurry_classic,
    "kafka_sidecar_killed": sidecar_killed,
    "kafka_sidecar_killed_classic": sidecar_killed_classic,
}
