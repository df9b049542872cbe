"""The progress bar of a long publish, on a terminal's standard error."""

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


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
