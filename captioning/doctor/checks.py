"""A thing looked at, and how it stands."""

from collections.abc import Callable
from dataclasses import dataclass

from shards.errors import InputError


@dataclass(frozen=True)
class Check:
    """What was looked at, what was seen, and whether that is well; None where it is only told."""

    what: str
    seen: str
    well: bool | None = None


def look(what: str, work: Callable[[], Check]) -> Check:
    """The check that ``work`` makes. Whatever it raises is a failed check: a diagnosis ends in a table, not a crash."""
    try:
        return work()
    except InputError as error:
        return Check(what, str(error), False)
    except Exception as error:
        return Check(what, f"{type(error).__name__}: {error}", False)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
