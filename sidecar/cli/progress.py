"""The progress bars of a long publish and a redrive, on a terminal's standard error."""

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from sidecar.client import RedriveProgress


class Progress:
    """How much of *total_bytes* was read (None: unknown), and what became of it."""

    def __init__(self, total_bytes: int | None) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
        self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total_bytes)
        self._bar.start()

    def show(self, published: int, failed: int, read_bytes: int) -> None:
        text = f"{published:,} published"
        if failed:
            text += f", {failed:,} failed"
        self._bar.update(self._task, description=text, completed=read_bytes)

    def close(self) -> None:
        self._bar.stop()


class RedriveBar:
    """How far a redrive or discard is, of *total* dead letters; 0: not counted."""

    def __init__(self, total: int) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
        self._total = total
        self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total or None)
        self._bar.start()

    def show(self, progress: RedriveProgress) -> None:
        text = f"{progress.done:,} done"
        if progress.failed:
            text += f", {progress.failed:,} failed"
        if progress.waiting:
            text += f", {progress.waiting:,} held by another redrive, waited for"
        completed, total = progress.done + progress.failed, self._total
        if not total:
            completed, total = progress.scanned, max(progress.total, progress.scanned)
        self._bar.update(self._task, description=text, completed=completed, total=total or None)

    def close(self) -> None:
        self._bar.stop()
