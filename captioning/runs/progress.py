"""A progress bar for long work, with its time to go; silent where nobody watches."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Progress = Callable[[int, int], None]  # called with (done, total)
QUIET = "CAPTIONING_QUIET"  # set in the environment, so that started processes are quiet too


def is_quiet() -> bool:
    """Whether only results, warnings and errors are wanted."""
    return bool(os.environ.get(QUIET))


def progress(what: str, console: Console, shown: bool = True) -> RichProgress:
    """A bar for one task, whose field ``numbers`` stands behind it; draws only while the console is a terminal."""
    return RichProgress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
        console=console, disable=not (shown and console.is_terminal) or is_quiet(),
    )  # fmt: skip


@contextmanager
def bar(what: str, shown: bool = True) -> Iterator[Progress]:
    """Yields a function to call with (done, total); draws on standard error while that is a terminal."""
    with progress(what, Console(stderr=True), shown) as drawn:
        task = drawn.add_task(what, total=None, numbers="")
        yield lambda done, total: drawn.update(task, completed=done, total=total)
