"""`make bench`: what the sidecar costs, beside each raw client library, measured in one run."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import TYPE_CHECKING, NamedTuple

import psutil

from tests.benchmarks import measure, report
from tests.benchmarks.benches import BENCHES, Bench
from tests.benchmarks.targets.table import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.benchmarks.targets.target import Target

STARTS = "start"


class _Measured(NamedTuple):
    """One broker's section of the report."""

    text: str
    good: bool
    """Every load went through, and every budget was met."""


def main() -> int:
    """Run what was asked for; exit 1 when a budget is not met or a load failed, 2 for wrong arguments."""
    arguments = _arguments()
    effort = measure.QUICK if arguments.quick else measure.FULL
    measured: list[_Measured] = []
    good = True
    for name in TARGETS:  # one after the other: a broker that only waits would disturb, too
        if arguments.target and name not in arguments.target:
            continue
        if (why := TARGETS[name].missing()) is not None:
            _tell(f"FAILED: {name}: {why}")
            good = False
            continue
        with TARGETS[name]() as target:
            if arguments.profile:
                measure.profile(_named(arguments.profile)[0], target, effort, arguments.lines)
            else:
                measured.append(_measure(target, effort, arguments))
    if measured:
        head = f"{_machine()}; {effort.rounds} rounds of {effort.seconds:g} s; 1 KiB events"
        sys.stdout.write("\n\n".join([head, *(one.text for one in measured)]) + "\n")
    return 0 if good and all(one.good for one in measured) else 1


def _measure(target: Target, effort: measure.Effort, arguments: argparse.Namespace) -> _Measured:
    only: list[str] = arguments.only
    results, failed = [], False
    for bench in _chosen(only):
        if target.name not in bench.targets:
            continue
        _tell(f"{target.name}: {bench.title}")
        try:
            results.append(measure.run(bench, target, effort))
        except measure.RoundFailed as error:
            _tell(f"FAILED: {target.name}: {error}")
            failed = True
    started = []
    if not only or STARTS in only:
        started = measure.starts(target, effort, _tell)
    as_text = report.markdown if arguments.markdown else report.text
    through = [result for result in results if result.bench.load != "latency"]
    latencies = [result for result in results if result.bench.load == "latency"]
    budgets = report.budgets(results, started)
    tables = [
        report.throughput(through),
        report.latencies(latencies),
        report.starts(started),
        budgets,
    ]
    parts = [f"{'### ' if arguments.markdown else ''}{target.name}: {target.version}"]
    parts += [as_text(table) for table in tables if len(table) > 1]
    missed = any(row[-1] == report.NOT_MET for row in budgets)
    return _Measured("\n\n".join(parts), not failed and not missed)


def _arguments() -> argparse.Namespace:
    names = [bench.name for bench in BENCHES]
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, epilog=f"NAME: {', '.join(names)}, {STARTS}"
    )
    parser.add_argument("--quick", action="store_true", help="short, and less exact")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="this benchmark, or those whose name begins so, on every broker; may be repeated",
    )
    parser.add_argument(
        "--target",
        action="append",
        choices=list(TARGETS),
        help="this broker; may be repeated. Without it each benchmark runs on every one",
    )
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--profile", metavar="NAME", help="print the sidecar's hottest functions")
    parser.add_argument("--lines", type=int, default=30, help="of the profile")
    arguments = parser.parse_args()
    wanted = [*arguments.only, *([arguments.profile] if arguments.profile else [])]
    for name in wanted:
        if name != STARTS and not _named(name):
            parser.error(f"no benchmark {name!r}; there are: {', '.join(names)}, {STARTS}")
    return arguments


def _named(name: str) -> list[Bench]:
    """The one of this name, or those that begin with it."""
    exact = [bench for bench in BENCHES if bench.name == name]
    return exact or [bench for bench in BENCHES if bench.name.startswith(name)]


def _chosen(only: Sequence[str]) -> list[Bench]:
    if not only:
        return list(BENCHES)
    chosen = [bench for name in only for bench in _named(name)]
    return [bench for bench in BENCHES if bench in chosen]


def _tell(title: str) -> None:
    sys.stderr.write(f"… {title}\n")


def _machine() -> str:
    return f"{psutil.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
