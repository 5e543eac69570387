"""The one exception that means "the input is wrong, and here is what to do about it"."""

from collections.abc import Iterable


class InputError(Exception):
    """Bad input: the message says what is wrong, where, and what to do. Commands print it and exit with status 2."""


class RetryError(Exception):
    """The input is right, and the same command again may go well. Commands print it and exit with status 75."""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Items one a line, indented; past ``limit`` only their number, so that an error fits a screen."""
    every = [str(item) for item in items]
    lines = [f"  {item}" for item in every[:limit]]
    if len(every) > limit:
        lines.append(f"  ... and {len(every) - limit:,} more")
    return "\n".join(lines)


def brief(text: object, limit: int = 300) -> str:
    """A text on one line, cut to ``limit`` characters: what others' errors and files say may be megabytes."""
    line = " ".join(str(text)[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def reason_of(error: Exception) -> str:
    """An error's kind and words, cut. Not its repr: of bytes that are no text, that has all of them."""
    return brief(f"{type(error).__name__}: {error}")
