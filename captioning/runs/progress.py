"""A progress bar for long work, with its time to go; silent where nobody watches."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

Progress = Callable[[int, int], None]  # called with (done, total)
QUIET = "CAPTIONING_QUIET"  # set in the environment, so that started processes are quiet too
_BAR_WIDTH, _ETA_WIDTH = 16, len("eta 100:00:00")
_GAP = "  "  # between two numbers


def is_quiet() -> bool:
    """Whether only results, warnings and errors are wanted."""
    return bool(os.environ.get(QUIET))


class Numbers(ProgressColumn):
    """The task's ``numbers``, texts in the order of their weight: as many as the console has room for."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        counts = 2 * len(str(int(task.total or 0))) + 1
        room = self._console.width - len(task.description) - _BAR_WIDTH - counts - _ETA_WIDTH - 7  # spaces
        return Text(fitting(task.fields["numbers"], room), no_wrap=True)


def fitting(numbers: tuple[str, ...], room: int) -> str:
    """The first of the numbers, to the first that goes beyond ``room`` characters."""
    shown = ""
    for number in numbers:
        longer = f"{shown}{_GAP}{number}" if shown else number
        if len(longer) > room:
            break
        shown = longer
    return shown


def progress(console: Console, shown: bool = True) -> RichProgress:
    """Bars for tasks with a field ``numbers``: name, bar, count, time to go, then the numbers. Draws only while the
    console is a terminal."""
    return RichProgress(
        TextColumn("{task.description}"), BarColumn(_BAR_WIDTH), MofNCompleteColumn(), TextColumn("eta"),
        TimeRemainingColumn(), Numbers(console),
        console=console, disable=not (shown and console.is_terminal) or is_quiet(),
    )  # fmt: skip


@contextmanager
def bar(what: str, shown: bool = True) -> Iterator[Progress]:
    """Yields a function to call with (done, total); draws on standard error while that is a terminal."""
    with progress(Console(stderr=True), shown) as drawn:
        task = drawn.add_task(what, total=None, numbers=())
        yield lambda done, total: drawn.update(task, completed=done, total=total)
