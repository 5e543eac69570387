"""A progress bar for long work, with its time to go; silent where nobody watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Progress = Callable[[int, int], None]  # called with (done, total)


@contextmanager
def bar(what: str, shown: bool = True) -> Iterator[Progress]:
    """Yields a function to call with (done, total); draws on standard error while that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"))
    with RichProgress(
        *columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
