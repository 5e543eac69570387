"""The one exception that means "the input is wrong, and here is what to do about it"."""

import unicodedata
from collections.abc import Iterable

# Unicode's marks that reorder the text around them (https://trojansource.codes).
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


class InputError(Exception):
    """Bad input: the message says what is wrong, where, and what to do. Commands print it and exit with status 2."""


class RetryError(Exception):
    """The input is right, and the same command again may go well. Commands print it and exit with status 75."""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Items one a line, indented; past ``limit`` only their number, so that an error fits a screen."""
    every = [printable(str(item)) for item in items]
    lines = [f"  {item}" for item in every[:limit]]
    if len(every) > limit:
        lines.append(f"  ... and {len(every) - limit:,} more")
    return "\n".join(lines)


def brief(text: object, limit: int = 300) -> str:
    """A text on one line, cut to ``limit`` characters: what others' errors and files say may be megabytes."""
    line = " ".join(str(text)[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def printable(text: str) -> str:
    """A text from elsewhere (a caption, a key, a file's name) for a terminal, log or page: what would act on it is
    escaped, such as \\x1b, which begins a terminal's commands, and marks that turn the direction of writing. Line ends
    and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if _acts(letter) and letter not in "\n\t" else letter
        for letter in text
    )


def _acts(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in _TURNING


def reason_of(error: Exception) -> str:
    """An error's kind and words, cut. Not its repr: of bytes that are no text, that has all of them."""
    return brief(f"{type(error).__name__}: {error}")
