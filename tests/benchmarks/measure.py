"""Runs the benchmarks: raw and sidecar in turn, each load in a process of its own."""

from __future__ import annotations

import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psutil

from tests.benchmarks.spec import Sample, Spec
from tests.support.sidecar_process import ROOT, SidecarProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.benches import Bench
    from tests.benchmarks.targets.target import Target

TOPIC = "benchmarks.made"
IDLE_SECONDS = 2.0
QUIET_CORES = 0.25
"""A round counts when everything else on the machine took less; if none does, all count."""


_CONSUMING = frozenset({"consume", "push"})


class RoundFailed(Exception):
    """A load got an answer that it should not get, or none at all: no figures then."""


class Effort(NamedTuple):
    """How long and how often."""

    rounds: int
    seconds: float
    warm_seconds: float
    starts: int


FULL = Effort(rounds=5, seconds=2.0, warm_seconds=0.7, starts=5)
QUICK = Effort(rounds=2, seconds=1.0, warm_seconds=0.4, starts=2)


class Result(msgspec.Struct, frozen=True):
    """The rounds of one benchmark that count; raw and sidecar were run in turn."""

    target: str
    bench: Bench
    raw: list[Sample]
    sidecar: list[Sample]
    disturbed: int
    """So many rounds were left out, because something else was busy."""


class Starts(msgspec.Struct, frozen=True):
    """How long several starts took, until ready, and the memory of each once it had nothing to do."""

    title: str
    seconds: list[float]
    idle_bytes: list[int]


def run(bench: Bench, target: Target, effort: Effort) -> Result:
    """The rounds of *bench*, each on a new sidecar: what one leaves behind is no load of the next."""
    _prepare(bench, target, effort)
    rounds: list[tuple[Sample, Sample]] = []
    quiet: list[tuple[Sample, Sample]] = []
    while len(quiet) < effort.rounds and len(rounds) < 2 * effort.rounds:
        raw = _round(bench, target, effort, len(rounds), None)
        with SidecarProcess(_config(bench, target, len(rounds))) as sidecar:
            ours = _round(bench, target, effort, len(rounds), sidecar)
        rounds.append((raw, ours))
        if _is_quiet(raw) and _is_quiet(ours):
            quiet.append((raw, ours))
    counted = quiet if len(quiet) > 1 else rounds
    return Result(
        target.name,
        bench,
        [raw for raw, _ in counted],
        [ours for _, ours in counted],
        len(rounds) - len(counted),
    )


def _config(bench: Bench, target: Target, number: int) -> str:
    """Of push the app cannot say what it subscribes to; the sidecar starts in an empty directory."""
    if bench.load != "push":
        return target.config
    return f"""{target.config}
[[subscriptions]]
name = "{_subscription(bench, number)}"
topic = "{TOPIC}"
max_in_flight = {bench.window}
push = {{ url = "unix://{_push_socket()}:/events", max_batch_events = {bench.batch} }}
"""


def _subscription(bench: Bench, number: int, whose: str = "sidecar") -> str:
    return f"{bench.name}-{whose}-{number}"


def _push_socket() -> Path:
    return Path(tempfile.gettempdir()) / f"benchmarks-{os.getpid()}.sock"


def _is_quiet(sample: Sample) -> bool:
    return sample.other_cpu_seconds / sample.seconds < QUIET_CORES


def profile(bench: Bench, target: Target, effort: Effort, lines: int) -> None:
    """Print where the sidecar's own functions take their time, as cProfile sees it."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "profile"
        profiled = [sys.executable, "-m", "cProfile", "-o", str(file), "-m", "sidecar"]
        config = _config(bench, target, 0)
        _prepare(bench, target, effort)
        with SidecarProcess(config, command=profiled) as sidecar:
            sample = _round(bench, target, effort, 0, sidecar)
        stats = pstats.Stats(str(file))
        sys.stdout.write(f"{sample.cpu_us:.0f} µs per event, cProfile's own included\n")
        stats.strip_dirs().sort_stats("tottime").print_stats(lines)


def starts(target: Target, effort: Effort, tell: Callable[[str], None]) -> list[Starts]:
    """Start to ready and idle memory; an external broker is there already."""
    measured = []
    for title, config in target.starts.items():
        tell(f"{target.name}: start, {title}")
        seconds, idle = [], []
        for _ in range(effort.starts):
            begin = time.perf_counter()
            with SidecarProcess(config) as sidecar:
                seconds.append(time.perf_counter() - begin)
                time.sleep(IDLE_SECONDS)
                idle.append(psutil.Process(sidecar.pid).memory_info().rss)
        measured.append(Starts(title, seconds, idle))
    return measured


def _prepare(bench: Bench, target: Target, effort: Effort) -> None:
    target.empty(TOPIC)
    if bench.load in _CONSUMING:
        _load(
            Spec(
                load="fill",
                target=target.name,
                broker_url=target.url,
                broker_pid=target.pid,
                topic=TOPIC,
                events=_to_consume(bench, target, effort),
                keys=bench.keys,
                warm_seconds=0,
                seconds=60,
            )
        )


def _to_consume(bench: Bench, target: Target, effort: Effort) -> int:
    seconds = effort.warm_seconds + effort.seconds
    return int(target.most_consumed * seconds) + 2 * bench.window


def _round(
    bench: Bench, target: Target, effort: Effort, number: int, sidecar: SidecarProcess | None
) -> Sample:
    """One round, of the raw client where there is no *sidecar*. Raises RoundFailed if anything failed in it."""
    if bench.load not in _CONSUMING:
        target.empty(TOPIC)
    sample = _load(
        Spec(
            load=bench.load if sidecar else bench.raw,
            target=target.name,
            broker_url=target.url,
            broker_pid=target.pid,
            topic=TOPIC,
            grpc_socket=str(sidecar.grpc_socket) if sidecar else "",
            http_socket=str(sidecar.http_socket) if sidecar else "",
            watched_pid=sidecar.pid if sidecar else 0,
            callers=bench.callers,
            batch=bench.batch,
            window=bench.window,
            credit=bench.credit,
            kept=bench.kept,
            events=_to_consume(bench, target, effort),
            push_socket=str(_push_socket()) if sidecar else "",
            subscription=_subscription(bench, number, "sidecar" if sidecar else "raw"),
            warm_seconds=effort.warm_seconds,
            seconds=effort.seconds,
        )
    )
    if sample.failures or not sample.events:
        raise RoundFailed(
            f"{bench.name}: {sample.events} events, {sample.failures} failures: {sample.failure[:500]}"
        )
    return sample


def _load(spec: Spec) -> Sample:
    command = [sys.executable, "-m", "tests.benchmarks.worker", msgspec.json.encode(spec).decode()]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120)
    return msgspec.json.decode(done.stdout, type=Sample)
