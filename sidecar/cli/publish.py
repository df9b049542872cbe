"""`sidecar publish`: one event, or the lines of a file or of standard input, pipelined."""

from __future__ import annotations

import asyncio
import collections
import os
import stat
import sys
from typing import TYPE_CHECKING

import msgspec
import typer

from sidecar.cli import calling, events, exits
from sidecar.cli.lines import MAX_LINE_BYTES, Lines
from sidecar.client import CallFailed, Event, Receipt
from sidecar.errors import EventTooLarge, InvalidEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from sidecar.cli.progress import Progress
    from sidecar.client import PublishFailed, Sidecar

_BATCH_BYTES = 512 * 1024
"""Of one request, unless a single event is larger: any sidecar takes 1 MiB."""
MAX_EVENT_BYTES = 16 * 1024 * 1024
"""Of one event: a request that is larger would end the stream, and with it the run."""


class Job(msgspec.Struct, frozen=True):
    """What to publish where: *data* of one event, or the lines of the descriptor *fd*."""

    target: str
    topic: str
    template: Event
    data: bytes | None
    fd: int | None
    raw: bool
    batch: int
    quiet: bool


def job_of(
    *,
    target: str,
    topic: str,
    data: str | None,
    file: str | None,
    raw: bool,
    no_data: bool,
    template: Event,
    batch: int,
    quiet: bool,
) -> Job:
    """Opens the file. Raises BadParameter."""
    if (data is not None) + (file is not None) + no_data != 1:
        raise typer.BadParameter(
            'say what to publish, in one way: DATA, "-" for the lines of standard input, --file, '
            "or --no-data"
        )
    if data == "-":
        file = data
    fd = None if file is None else _open(file)
    if raw and fd is None:
        raise typer.BadParameter("--raw is for lines: use it with --file or -")
    if template.id and fd is not None:
        raise typer.BadParameter("--id is for one event: lines have ids of their own")
    one = None if fd is not None or data is None else os.fsencode(data)
    return Job(target, topic, template, one, fd, raw, batch, quiet)


def _open(file: str) -> int:
    if file == "-":
        return _opened_stdin()
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from error
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise typer.BadParameter(f"cannot read {file}: it is a directory")
    return fd


def _opened_stdin() -> int:
    if sys.stdin is None:
        raise typer.BadParameter("cannot read standard input: it is closed")
    fd = sys.stdin.fileno()
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise typer.BadParameter("cannot read standard input: it is a directory")
    return fd


def template_of(
    *,
    type: str,  # noqa: A002 - the attribute's name
    source: str,
    id: str,  # noqa: A002
    key: str,
    subject: str,
    content_type: str,
    extensions: Iterable[str],
    headers: Iterable[str],
) -> Event:
    """What the options say of every event. Raises BadParameter."""
    return events.template_of(
        type=type,
        source=source,
        id=id,
        key=key,
        subject=subject,
        content_type=content_type,
        extensions=_pairs("--extension", extensions),
        headers=_pairs("--header", headers),
    )


def _pairs(option: str, texts: Iterable[str]) -> Mapping[str, str]:
    pairs = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found or not name:
            raise typer.BadParameter(f"{option} {text!r}: use NAME=VALUE")
        pairs[name.lower()] = value
    return pairs


def publish(job: Job) -> int:
    return calling.call(job.target, _Publishing(job).run)


class _Publishing:
    """One run of the command: what goes out, what came back, and the sum of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lines = None if job.fd is None else Lines(job.fd)
        self._labels: collections.deque[Sequence[str]] = collections.deque()
        self._published = 0
        self._duplicates = 0
        self._failed: collections.Counter[str] = collections.Counter()
        self._unanswered = 0
        self._broken = False
        self._interrupted = False
        self._progress: Progress | None = None

    async def run(self, sidecar: Sidecar) -> int:
        if not self._job.quiet:
            exits.output()  # nothing is published whose receipt has no place to go
        loop = asyncio.get_running_loop()
        started = loop.time()
        with calling.ended_by_signals(self._interrupt):
            try:
                async for results in sidecar.publish_stream(self._batches()):
                    self._answered(results)
                    self._show_progress(loop.time() - started)
            except CallFailed as error:
                exits.complain(calling.explain(error, self._job.target))
                self._broken = True
                self._unanswered = sum(map(len, self._labels))
            finally:
                if self._progress is not None:
                    self._progress.close()
        if self._lines is not None or self._job.quiet:
            exits.complain(self._summary(loop.time() - started))
        if self._interrupted:
            return exits.INTERRUPTED
        return exits.FAILED if self._failed or self._broken else exits.OK

    def _interrupt(self) -> None:
        """Read no more; what is on its way is still answered."""
        self._interrupted = True
        if self._lines is not None:
            self._lines.stop()

    # -- out

    async def _batches(self) -> AsyncIterator[tuple[str, Sequence[Event]]]:
        topic = self._job.topic
        if self._lines is None:
            self._labels.append(["the event"])
            yield topic, [events.event_of_data(self._job.data, self._job.template)]
            return
        number = 0
        batch = _Batch(self._job.batch)
        async for lines in self._lines.read():
            for line in lines:
                number += 1
                event = self._event(number, line)
                if event is None:
                    continue
                if not batch.fits(event):
                    yield topic, self._sent(batch)
                batch.add(f"line {number}", event)
            # A pipe that pauses must not hold back what it brought.
            if batch.events and not self._lines.is_file:
                yield topic, self._sent(batch)
        if batch.events:
            yield topic, self._sent(batch)

    def _sent(self, batch: _Batch) -> Sequence[Event]:
        labels, sent = batch.take()
        self._labels.append(labels)
        return sent

    def _event(self, number: int, line: bytes | None) -> Event | None:
        """The event of a line; None where there is none, or it was told to be bad."""
        try:
            return self._event_of(line)
        except InvalidEvent as error:
            self._fail(f"line {number}", error.code, error.message)
            return None

    def _event_of(self, line: bytes | None) -> Event | None:
        if line is None:
            raise EventTooLarge(f"over {MAX_LINE_BYTES} bytes, the longest line that is read")
        if self._job.raw:
            event = events.event_of_data(line.removesuffix(b"\r"), self._job.template)
        elif line.strip():
            event = events.event_of_line(line, self._job.template)
        else:
            return None
        if event.size > MAX_EVENT_BYTES:
            raise EventTooLarge(f"{event.size} bytes, at most {MAX_EVENT_BYTES} can be sent")
        return event

    # -- back

    def _answered(self, results: Sequence[Receipt | PublishFailed]) -> None:
        receipts = []
        for label, result in zip(self._labels.popleft(), results, strict=True):
            if isinstance(result, Receipt):
                self._published += 1
                self._duplicates += result.duplicate
                receipts.append(events.receipt_line(result) + b"\n")
            else:
                self._fail(label, result.reason, result.message)
        if receipts and not self._job.quiet:
            exits.write(b"".join(receipts))

    def _fail(self, label: str, reason: str, message: str) -> None:
        self._failed[reason] += 1
        if not self._job.quiet:
            exits.complain(f"{label}: {reason}: {message}")

    def _show_progress(self, seconds: float) -> None:
        if self._lines is None:
            return
        if self._progress is None:
            if seconds < 1 or sys.stderr is None or not sys.stderr.isatty():
                return
            if not self._job.quiet and exits.output().isatty():
                return  # the receipts are the progress
            from sidecar.cli.progress import Progress  # noqa: PLC0415 - rich, for the long ones

            self._progress = Progress(self._lines.total_bytes)
        self._progress.show(self._published, self._failed.total(), self._lines.read_bytes)

    def _summary(self, seconds: float) -> str:
        parts = [f"published {self._published:,}"]
        if self._duplicates:
            parts.append(f"{self._duplicates:,} of them duplicates")
        if self._failed:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self._failed.most_common())
            parts.append(f"failed {self._failed.total():,} ({reasons})")
        if self._unanswered:
            parts.append(f"without an answer {self._unanswered:,}")
        if self._interrupted:
            parts.append("interrupted")
        return f"{', '.join(parts)} in {seconds:.2f} s"


class _Batch:
    """Events until there are enough of them, by number or by size."""

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._labels: list[str] = []
        self.events: list[Event] = []
        self._bytes = 0

    def fits(self, event: Event) -> bool:
        """Whether the event may be added; one of any size may, to an empty batch."""
        return not self.events or (
            len(self.events) < self._max_events and self._bytes + event.size <= _BATCH_BYTES
        )

    def add(self, label: str, event: Event) -> None:
        self._labels.append(label)
        self.events.append(event)
        self._bytes += event.size

    def take(self) -> tuple[Sequence[str], Sequence[Event]]:
        taken = self._labels, self.events
        self._labels, self.events, self._bytes = [], [], 0
        return taken
