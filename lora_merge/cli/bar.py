"""The progress bar of a long step."""

from rich import progress
from rich.console import Console
from rich.text import Text


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def bar_of(console: Console, unit: str) -> progress.Progress:
    """A bar that goes when it is done: how many of how many `unit`, how fast, since when, how long yet."""
    counts: tuple[progress.ProgressColumn, ...] = (progress.MofNCompleteColumn(), progress.TextColumn(unit), _Rate())
    if unit == "bytes":
        counts = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *counts,
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console, transient=True)
