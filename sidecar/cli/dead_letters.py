"""`sidecar dead-letters`: looking at what could not be delivered, redriving and discarding it."""

from __future__ import annotations

import asyncio
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from sidecar.cli import calling, exits
from sidecar.cli.tables import show_tables, table
from sidecar.client import CallFailed, DeadLetterFilter, RedriveProgress
from sidecar.wire.cloudevents import to_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from sidecar.cli.progress import RedriveBar
    from sidecar.client import DeadLetter, Position, Sidecar

_AGO = re.compile(r"(\d{1,9})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_MAX_ERROR = 60


# -- what is meant


def filter_of(
    *,
    ids: Sequence[str] = (),
    subscription: str,
    reasons: Sequence[str],
    since: str,
    until: str,
    event_type: str,
    key: str,
    error: str,
    topic: str,
    place: str,
) -> DeadLetterFilter:
    """Raises BadParameter."""
    broker, found, dead_letter_topic = place.partition("/")
    if place and not (broker and found and dead_letter_topic):
        raise typer.BadParameter(f"--in {place!r}: use BROKER/TOPIC, as events/dlq.orders.created")
    return DeadLetterFilter(
        ids=tuple(ids),
        subscription=subscription,
        reasons=tuple(reasons),
        after=_moment("--since", since),
        before=_moment("--until", until),
        event_type=event_type,
        key=key,
        error_contains=error,
        topic=topic,
        dead_letter_broker=broker,
        dead_letter_topic=dead_letter_topic,
    )


def _moment(option: str, text: str) -> datetime | None:
    if not text:
        return None
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None:
            return datetime.now(UTC) - timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]])
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f'{option} {text!r}: use how long ago, as "2h", or a time, as 2026-01-31T12:00:00Z'
        ) from None


class Job(msgspec.Struct, frozen=True):
    """What to redrive or discard, as it was typed."""

    target: str
    wanted: DeadLetterFilter
    redrives: bool
    every_one: bool
    dry_run: bool
    limit: int
    yes: bool
    rate: float = 0.0
    to_broker: str = ""
    to_topic: str = ""


def redrive_of(
    wanted: DeadLetterFilter,
    *,
    target: str,
    all_: bool,
    rate: float,
    to: str,
    dry_run: bool,
    limit: int | None,
    yes: bool,
) -> Job:
    """Raises BadParameter."""
    _check_said(wanted, all_=all_)
    broker, _, topic = to.rpartition("/")
    if to and not topic:
        raise typer.BadParameter(f"--to {to!r}: use TOPIC or BROKER/TOPIC")
    return Job(
        target=target,
        wanted=wanted,
        redrives=True,
        every_one=all_,
        dry_run=dry_run,
        limit=limit or 0,
        yes=yes,
        rate=rate,
        to_broker=broker,
        to_topic=topic,
    )


def discard_of(
    wanted: DeadLetterFilter,
    *,
    target: str,
    all_: bool,
    dry_run: bool,
    limit: int | None,
    yes: bool,
) -> Job:
    """Raises BadParameter."""
    _check_said(wanted, all_=all_)
    if not (yes or dry_run or _can_ask()):
        raise typer.BadParameter("there is no terminal to ask on: use --yes to discard")
    return Job(
        target=target,
        wanted=wanted,
        redrives=False,
        every_one=all_,
        dry_run=dry_run,
        limit=limit or 0,
        yes=yes,
    )


def _check_said(wanted: DeadLetterFilter, *, all_: bool) -> None:
    if wanted == DeadLetterFilter() and not all_:
        raise typer.BadParameter("say which dead letters: IDs, options as --subscription, or --all")


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


# -- list, show


def list_(
    target: str,
    wanted: DeadLetterFilter,
    *,
    limit: int,
    oldest_first: bool,
    all_states: bool,
    as_json: bool,
) -> int:
    async def work(sidecar: Sidecar) -> int:
        found: list[DeadLetter] = []
        async for letter in sidecar.dead_letters.list(
            wanted, oldest_first=oldest_first, include_settled=all_states, limit=limit + 1
        ):
            if len(found) == limit:
                exits.complain(f"there are more than {limit}: --limit shows them")
                break
            found.append(letter)
            if as_json:
                exits.write(_json(letter) + b"\n")
        if not as_json:
            _show_list(found)
        return exits.OK

    return calling.call(target, work)


def _show_list(found: Sequence[DeadLetter]) -> None:
    if not found:
        exits.complain("no dead letters")
        return
    heads = (
        "stored",
        "subscription",
        "reason",
        "tries",
        "gen",
        "type",
        "key",
        "error",
        "state",
        "id",
    )
    rows = [
        (
            _time(letter.stored_at),
            letter.subscription,
            letter.reason,
            str(letter.attempts),
            str(letter.generation),
            letter.event.type,
            letter.event.key,
            _short(letter.error),
            letter.state,
            letter.id,
        )
        for letter in found
    ]
    show_tables(table(heads, rows))


def show(target: str, id_: str, *, as_json: bool) -> int:
    async def work(sidecar: Sidecar) -> int:
        letter = await sidecar.dead_letters.get(id_)
        if as_json:
            exits.write(msgspec.json.format(_json(letter)) + b"\n")
        else:
            _show_one(letter)
        return exits.OK

    return calling.call(target, work)


def _show_one(letter: DeadLetter) -> None:
    event = letter.event
    lies_in = f"{letter.dead_letter_broker}/{letter.dead_letter_topic}"
    rows = [
        ("id", letter.id),
        ("state", letter.state),
        ("subscription", letter.subscription),
        ("reason", letter.reason),
        ("error", letter.error),
        ("attempts", str(letter.attempts)),
        ("generation", str(letter.generation)),
        ("first failed", _time(letter.first_failed_at)),
        ("last failed", _time(letter.last_failed_at)),
        ("stored", _time(letter.stored_at)),
        ("came from", f"{letter.broker}/{letter.topic} {_place(letter.position)}".strip()),
        ("lies in", f"{lies_in} {_place(letter.dead_letter_position)}"),
        ("event id", event.id),
        ("event source", event.source),
        ("event type", event.type),
        ("key", event.key),
        ("content type", event.content_type),
        *((f"header {name}", value) for name, value in sorted(event.headers.items())),
    ]
    show_tables(table((), [row for row in rows if row[1]]))
    if event.data is not None:
        exits.say("")
        exits.write(_printable(event.data) + b"\n")


def _printable(data: bytes) -> bytes:
    """Text as it is, JSON laid out, and of other bytes how many: --json has them."""
    try:
        return msgspec.json.format(data)
    except msgspec.DecodeError:
        pass
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"{len(data)} bytes that are no text (--json has them)".encode()
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text).encode()


def _json(letter: DeadLetter) -> bytes:
    """The event as CloudEvents JSON, as `sidecar subscribe` prints it."""
    fields: dict[str, Any] = msgspec.structs.asdict(letter)
    fields |= {
        "position": _position(letter.position),
        "dead_letter_position": _position(letter.dead_letter_position),
        "headers": dict(letter.event.headers),
        "event": msgspec.Raw(to_json(letter.event)),
    }
    return msgspec.json.encode(fields)


def _position(position: Position | None) -> dict[str, object] | None:
    if position is None:
        return None
    if position.offset is not None:
        return {"partition": position.partition, "offset": position.offset}
    return {"stream": position.stream, "sequence": position.sequence}


def _place(position: Position | None) -> str:
    return "" if position is None else " ".join(f"{k} {v}" for k, v in _of(position).items())


def _of(position: Position) -> dict[str, object]:
    return _position(position) or {}


def _short(text: str) -> str:
    return text if len(text) <= _MAX_ERROR else text[: _MAX_ERROR - 1] + "…"


def _time(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone().isoformat(" ", "seconds")


# -- redrive, discard


def redrive(job: Job) -> int:
    return calling.call(job.target, _Redriving(job).run)


class _Redriving:
    """One run of the command."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last: RedriveProgress | None = None
        self._error: CallFailed | None = None
        self._interrupted = False
        self._told_waiting = False

    async def run(self, sidecar: Sidecar) -> int:
        job, total = self._job, 0
        if not (job.dry_run or job.yes) and _can_ask():
            total = await self._count(sidecar)
            if not total:
                exits.complain("no dead letters")
                return exits.OK
            verb = "Redrive" if job.redrives else "Discard"
            if not await asyncio.to_thread(typer.confirm, f"{verb} {total:,}?", err=True):
                return exits.OK
        return await self._do(sidecar, total)

    async def _count(self, sidecar: Sidecar) -> int:
        done = 0
        async for progress in self._calls(sidecar, dry_run=True):
            done = progress.done
        return done

    async def _do(self, sidecar: Sidecar, total: int) -> int:
        from sidecar.cli.progress import RedriveBar  # noqa: PLC0415 - rich, only when needed

        loop = asyncio.get_running_loop()
        started = loop.time()
        bar = RedriveBar(total) if sys.stderr is not None and sys.stderr.isatty() else None
        try:
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(self._follow(sidecar, bar))

                def end() -> None:
                    """What is under way there is still brought to its end."""
                    self._interrupted = True
                    following.cancel()

                with calling.ended_by_signals(end):
                    await asyncio.wait([following])
        finally:
            if bar is not None:
                bar.close()
        if self._error is not None:
            exits.complain(self._explained(self._error))
        exits.complain(self._summary(loop.time() - started))
        if self._interrupted:
            return exits.INTERRUPTED
        failed = self._error is not None or (self._last is not None and self._last.failed > 0)
        return exits.FAILED if failed else exits.OK

    def _explained(self, error: CallFailed) -> str:
        if self._last is not None and not error.reason:
            return "the sidecar went away: call this again when it is back, and it goes on"
        return calling.explain(error, self._job.target)

    async def _follow(self, sidecar: Sidecar, bar: RedriveBar | None) -> None:
        try:
            async for progress in self._calls(sidecar, dry_run=self._job.dry_run):
                last, self._last = self._last, progress
                if bar is not None:
                    bar.show(progress)
                elif last is not None:
                    self._tell_waiting(last, progress)
        except CallFailed as error:
            self._error = error

    def _tell_waiting(self, last: RedriveProgress, now: RedriveProgress) -> None:
        """Where there is no bar, why nothing happens; once."""
        if now.waiting and now.done == last.done and not self._told_waiting:
            self._told_waiting = True
            exits.complain(
                f"{now.waiting:,} are held by another redrive, or by one that was killed: waiting"
            )

    def _calls(self, sidecar: Sidecar, *, dry_run: bool) -> AsyncGenerator[RedriveProgress, None]:
        job = self._job
        if not job.redrives:
            return sidecar.dead_letters.discard(
                job.wanted, all=job.every_one, dry_run=dry_run, limit=job.limit
            )
        return sidecar.dead_letters.redrive(
            job.wanted,
            all=job.every_one,
            rate_per_second=job.rate,
            to_topic=job.to_topic,
            to_broker=job.to_broker,
            dry_run=dry_run,
            limit=job.limit,
        )

    def _summary(self, seconds: float) -> str:
        last = self._last
        did = "redriven" if self._job.redrives else "discarded"
        if self._job.dry_run:
            did = f"would be {did}"
        parts = [f"{last.done if last else 0:,} {did}"]
        if last is not None and last.failed:
            why = f" ({last.failure.message})" if last.failure else ""
            parts.append(f"{last.failed:,} failed and stay{why}")
        if last is not None and last.waiting:
            parts.append(f"{last.waiting:,} held by another redrive")
        if self._interrupted:
            parts.append("interrupted: the rest stays")
        return f"{', '.join(parts)}, in {seconds:.1f} s"
