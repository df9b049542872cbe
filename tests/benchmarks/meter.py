"""Counts events over a window, and the CPU time that processes took in it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import psutil

from tests.benchmarks.spec import Sample

if TYPE_CHECKING:
    from tests.benchmarks.spec import Spec


FIRST_SECONDS = 20.0
"""So long a consumer may take to get its first event."""


class _Moment(NamedTuple):
    at: float
    events: int
    watched: float
    own: float
    broker: float
    machine: float


class Meter:
    """Told by a load of each event that is answered; takes the sample while the load goes on."""

    def __init__(self, spec: Spec) -> None:
        self.events = 0
        self._failures = 0
        self._failure = ""
        self.stopping = False
        self.run_out = asyncio.Event()
        """Set by a load that has no more to do."""
        self._spec = spec
        self._own = psutil.Process()
        self._watched = psutil.Process(spec.watched_pid) if spec.watched_pid else self._own
        self._broker = psutil.Process(spec.broker_pid)

    def failed(self, count: int, why: str) -> None:
        self._failures += count
        self._failure = self._failure or why

    async def sample(self, first: asyncio.Event | None = None) -> Sample:
        """
        Warm up, then measure for the window, or until the load ran out.

        *first*: begin when it is set. A consumer has to join its group, which is no part of its pace.
        """
        if first is not None:
            async with asyncio.timeout(FIRST_SECONDS):
                await first.wait()
        await asyncio.sleep(self._spec.warm_seconds)
        begin = self._now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._spec.seconds):
                await self.run_out.wait()
        end = self._now()
        self.stopping = True
        watched, own, broker = (
            end.watched - begin.watched,
            end.own - begin.own,
            end.broker - begin.broker,
        )
        ours = broker + own + (watched if self._watched is not self._own else 0)
        return Sample(
            events=end.events - begin.events,
            seconds=end.at - begin.at,
            watched_cpu_seconds=watched,
            client_cpu_seconds=own,
            broker_cpu_seconds=broker,
            other_cpu_seconds=max(0.0, end.machine - begin.machine - ours),
            rss_bytes=self._watched.memory_info().rss,
            failures=self._failures,
            failure=self._failure,
        )

    def _now(self) -> _Moment:
        return _Moment(
            time.perf_counter(),
            self.events,
            _cpu_seconds(self._watched),
            _cpu_seconds(self._own),
            _cpu_seconds(self._broker),
            _machine_seconds(),
        )


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _machine_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


async def wait_until_idle(process: psutil.Process) -> None:
    """
    Until *process* takes less than a tenth of a core, for 20 s at most: what came before has gone.

    Kafka takes up to 6 % with nothing to do.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while True:
                before = _cpu_seconds(process)
                await asyncio.sleep(0.5)
                if _cpu_seconds(process) - before < 0.05:
                    return
