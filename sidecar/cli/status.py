"""`sidecar status`: what a running sidecar is connected to, its routes and its subscriptions."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import msgspec

from sidecar.cli import calling, exits

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from rich.console import Console

    from sidecar.client import Sidecar, Status

_WIDE = 200
"""Columns where the output is no terminal: nothing is folded or cut."""


def status(target: str, *, as_json: bool) -> int:
    async def work(sidecar: Sidecar) -> int:
        found = await sidecar.status()
        if as_json:
            exits.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        else:
            _show(found)
        return exits.OK if found.ready else exits.FAILED

    return calling.call(target, work)


def _show(found: Status) -> None:
    from rich.console import Console  # noqa: PLC0415 - not for --json

    terminal, text = exits.output().isatty(), io.StringIO()
    width = None if terminal else _WIDE
    _show_all(Console(file=text, force_terminal=terminal, width=width, highlight=False), found)
    exits.write(text.getvalue().encode())


def _show_all(console: Console, found: Status) -> None:
    state = "draining" if found.draining else "ready" if found.ready else "not ready"
    style = "green" if found.ready else "red"
    console.print(
        f"{found.app}: [bold {style}]{state}[/], sidecar {found.version}, "
        f"since {_time(found.started_at)}"
    )
    for reason in found.not_ready:
        console.print(f"  {reason}", markup=False)
    _show_brokers(console, found)
    _show_routes(console, found)
    _show_subscriptions(console, found)
    _show_push(console, found)
    _show_lag(console, found)


def _show_brokers(console: Console, found: Status) -> None:
    rows = [
        (
            broker.name,
            broker.type,
            "connected" if broker.connected else "away",
            _time(broker.since),
            str(broker.reconnects),
            str(broker.pending_events),
            broker.detail,
        )
        for broker in found.brokers
    ]
    heads = ("broker", "type", "state", "since", "reconnects", "pending", "detail")
    _show_table(console, heads, rows)


def _show_routes(console: Console, found: Status) -> None:
    rows = [(r.topic or "any", r.event_type or "any", r.broker) for r in found.routes]
    _show_table(console, ("route: topic", "event type", "broker"), rows)


def _show_subscriptions(console: Console, found: Status) -> None:
    rows = [
        (
            s.name,
            s.topic,
            s.broker,
            ("standby" if s.standby else s.state) + (f": {s.detail}" if s.detail else ""),
            str(s.consumers),
            str(s.in_flight_events),
            str(s.waiting_events),
            str(s.retry_waiting_events),
            "unknown" if s.lag_events is None else str(s.lag_events),
        )
        for s in found.subscriptions
    ]
    counts = ("consumers", "in flight", "waiting", "to retry", "lag")
    _show_table(console, ("subscription", "topic", "broker", "state", *counts), rows)


def _show_push(console: Console, found: Status) -> None:
    rows = [
        (
            s.name,
            s.push.url,
            s.push.circuit + (f": {s.push.detail}" if s.push.detail else ""),
            str(s.push.requests),
            str(s.push.concurrency),
        )
        for s in found.subscriptions
        if s.push is not None
    ]
    heads = ("push: subscription", "url", "circuit", "requests", "at most")
    _show_table(console, heads, rows)


def _show_lag(console: Console, found: Status) -> None:
    """Which partitions are behind, where there are several."""
    rows = [
        (s.name, p.topic, str(p.partition), str(p.lag_events))
        for s in found.subscriptions
        for p in s.partitions
        if p.lag_events and len(s.partitions) > 1
    ]
    _show_table(console, ("behind: subscription", "topic", "partition", "lag"), rows)


def _show_table(console: Console, heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(*heads, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if table.row_count:
        console.print()
        console.print(table)


def _time(moment: datetime | None) -> str:
    return "-" if moment is None else moment.astimezone().isoformat(" ", "seconds")
