"""What the benchmarks found, as tables: of the figures, and of the budgets."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from tests.benchmarks import benches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.benchmarks.benches import Budget
    from tests.benchmarks.measure import Result, Starts
    from tests.benchmarks.spec import Sample

Row = tuple[str, ...]
NOT_MET = "NOT MET"
FULL_CORE = 0.9
"""A client that takes more of its core than this is the bottleneck; its row is marked with *."""


def throughput(results: Iterable[Result]) -> list[Row]:
    """One row per benchmark; medians over the rounds."""
    rows: list[Row] = [
        (
            "",
            "rounds",
            "events/s",
            "±",
            "CPU µs/event",
            "±",
            "cores: sidecar",
            "client",
            "broker",
            "others",
            "RSS MB",
            "raw events/s",
            "±",
            "raw µs/event",
            "ratio",
        )
    ]
    for result in results:
        ours, raw = result.sidecar, result.raw
        rows.append(
            (
                result.bench.title,
                _rounds(result),
                f"{_median(ours, _rate):,.0f}",
                _spread(ours, _rate),
                f"{cpu_us(result):.1f}",
                _spread(ours, _cpu_us),
                f"{_cores(ours, lambda s: s.watched_cpu_seconds):.2f}",
                _client(ours),
                f"{_cores(ours, lambda s: s.broker_cpu_seconds):.2f}",
                f"{_cores(ours, lambda s: s.other_cpu_seconds):.2f}",
                f"{rss(result) / 1e6:.0f}",
                f"{_median(raw, _rate):,.0f}",
                _spread(raw, _rate),
                f"{_median(raw, _cpu_us):.1f}",
                f"{ratio(result):.2f}",
            )
        )
    return rows


def latencies(results: Iterable[Result]) -> list[Row]:
    rows: list[Row] = [
        (
            "",
            "rounds",
            "p50 ms",
            "±",
            "p99 ms",
            "±",
            "raw p50 ms",
            "raw p99 ms",
            "CPU µs/event",
            "RSS MB",
        )
    ]
    rows.extend(
        (
            result.bench.title,
            _rounds(result),
            f"{p50(result) * 1e3:.2f}",
            _spread(result.sidecar, _p50),
            f"{p99(result) * 1e3:.2f}",
            _spread(result.sidecar, _p99),
            f"{_median(result.raw, _p50) * 1e3:.2f}",
            f"{_median(result.raw, _p99) * 1e3:.2f}",
            f"{cpu_us(result):.1f}",
            f"{rss(result) / 1e6:.0f}",
        )
        for result in results
    )
    return rows


def starts(measured: Iterable[Starts]) -> list[Row]:
    rows: list[Row] = [("", "start to ready s", "worst s", "idle RSS MB")]
    rows.extend(
        (
            one.title,
            f"{statistics.median(one.seconds):.2f}",
            f"{max(one.seconds):.2f}",
            f"{statistics.median(one.idle_bytes) / 1e6:.0f}",
        )
        for one in measured
    )
    return rows


# -- figures


def cpu_us(result: Result) -> float:
    return _median(result.sidecar, _cpu_us)


def ratio(result: Result) -> float:
    """Of neighbouring rounds, so that a machine that changes its pace changes both."""
    pairs = zip(result.sidecar, result.raw, strict=True)
    return statistics.median(ours.rate / raw.rate for ours, raw in pairs)


def p50(result: Result) -> float:
    return _median(result.sidecar, _p50)


def p99(result: Result) -> float:
    return _median(result.sidecar, _p99)


def rss(result: Result) -> int:
    return max(sample.rss_bytes for sample in result.sidecar)


def rate(result: Result) -> float:
    return _median(result.sidecar, _rate)


def _rate(sample: Sample) -> float:
    return sample.rate


def _cpu_us(sample: Sample) -> float:
    return sample.cpu_us


def _p50(sample: Sample) -> float:
    assert sample.p50_seconds is not None
    return sample.p50_seconds


def _p99(sample: Sample) -> float:
    assert sample.p99_seconds is not None
    return sample.p99_seconds


def _median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    return statistics.median(map(figure, samples))


def _cores(samples: Sequence[Sample], cpu_seconds: Callable[[Sample], float]) -> float:
    return _median(samples, lambda s: cpu_seconds(s) / s.seconds)


def _spread(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> str:
    """Half of the way from the least to the most, of the median."""
    values = [figure(sample) for sample in samples]
    return f"{(max(values) - min(values)) / 2 / statistics.median(values):.0%}"


def _rounds(result: Result) -> str:
    """How many count, of how many."""
    counted = len(result.sidecar)
    return f"{counted} of {counted + result.disturbed}" if result.disturbed else str(counted)


def _client(samples: Sequence[Sample]) -> str:
    share = _cores(samples, lambda s: s.client_cpu_seconds)
    return f"{share:.2f}{'*' if share > FULL_CORE else ''}"


# -- budgets


def budgets(results: Sequence[Result], started: Sequence[Starts]) -> list[Row]:
    rows: list[Row] = [("budget", "at most / at least", "measured", "")]
    for result in results:
        rows += _of_bench(result)
    for one in started:
        limit = benches.START_SECONDS[one.title]
        value = statistics.median(one.seconds)
        rows.append(
            _row(
                f"start to ready, {one.title}", f"≤ {limit} s", f"{value:.2f} s", met=value <= limit
            )
        )
        idle = statistics.median(one.idle_bytes)
        rows.append(
            _row(
                f"idle memory, {one.title}",
                f"≤ {benches.IDLE_BYTES / 1e6:.0f} MB",
                f"{idle / 1e6:.0f} MB",
                met=idle <= benches.IDLE_BYTES,
            )
        )
    usual = [result for result in results if result.bench.window <= benches.USUAL_WINDOW]
    if usual:
        most = max(usual, key=rss)
        rows.append(
            _row(
                f"memory under load (most: {most.bench.name})",
                f"≤ {benches.LOADED_BYTES / 1e6:.0f} MB",
                f"{rss(most) / 1e6:.0f} MB",
                met=rss(most) <= benches.LOADED_BYTES,
            )
        )
    return rows


def _of_bench(result: Result) -> Iterable[Row]:
    bench = result.bench
    if result.target in bench.budgets:
        yield from _of_budget(result, bench.budgets[result.target])
        return
    for owner, budget in bench.budgets.items():
        for title, limit, measured, _ in _of_budget(result, budget):
            yield (title, f"none; {owner}: {limit}", measured, "")


def _of_budget(result: Result, budget: Budget) -> Iterable[Row]:
    title = result.bench.title
    if (limit := budget.cpu_us) is not None:
        value = cpu_us(result)
        yield _row(title, f"≤ {limit:g} µs/event", f"{value:.1f} µs", met=value <= limit)
    if (limit := budget.rate) is not None:
        value = rate(result)
        yield _row(title, f"≥ {limit:,.0f} events/s", f"{value:,.0f}", met=value >= limit)
    if (limit := budget.ratio) is not None:
        value = ratio(result)
        yield _row(title, f"≥ {limit:.2f} of raw", f"{value:.2f}", met=value >= limit)
    if (limit := budget.p50_ms) is not None:
        value = p50(result) * 1e3
        yield _row(title, f"p50 ≤ {limit:g} ms", f"{value:.2f} ms", met=value <= limit)
    if (limit := budget.p99_ms) is not None:
        value = p99(result) * 1e3
        yield _row(title, f"p99 ≤ {limit:g} ms", f"{value:.2f} ms", met=value <= limit)


def _row(title: str, limit: str, measured: str, *, met: bool) -> Row:
    return (title, limit, measured, "met" if met else NOT_MET)


# -- text


def text(rows: Sequence[Row]) -> str:
    """Aligned, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)
