"""Places that are no local path: http(s) URLs, what fsspec opens (s3://, gs:// ...), and ``pipe:`` commands."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from shards.errors import InputError


@dataclass(frozen=True)
class Url:
    """A URL or command that ends in, or holds, a file's name; its neighbours differ in the name alone.

    ``https://host/coco/train.json?token=x`` and ``pipe:ssh host cat /data/train.json`` have the neighbours
    ``https://host/coco/train-000000.tar?token=x`` and ``pipe:ssh host cat /data/train-000000.tar``.
    """

    before: str
    name: str
    after: str = ""

    @property
    def text(self) -> str:
        """The whole of it, also what may be secret."""
        return self.before + self.name + self.after

    @property
    def scheme(self) -> str:
        return "pipe" if self.before.startswith("pipe:") else urlsplit(self.before).scheme

    @property
    def is_http(self) -> bool:
        return self.scheme in ("http", "https")

    def with_suffix(self, suffix: str) -> "Url":
        return Url(self.before, str(PurePosixPath(self.name).with_suffix(suffix)), self.after)

    def __str__(self) -> str:
        """For people and logs: without passwords, and without a query, which may hold a token."""
        if self.scheme == "pipe":
            return self.text
        return re.sub(r"//[^/@]*@", "//***@", self.before) + self.name


Place = Path | Url
# What an index may name elsewhere, where it is trusted: nothing of this machine, nothing that opens something else.
_REMOTE = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss")


def place_of(text: str | Path) -> Place:
    """A local path, or a Url for what begins like one (``scheme://`` or ``pipe:``).

    Raises:
        InputError: for a ``pipe:`` command in which no NAME.json is to be found, or what is no name of a file.
    """
    text = str(text)
    if _holds_control_characters(text):
        raise InputError(f"{text[:200]!r} holds a control character: no file or URL is called so.")
    if text.startswith("pipe:"):
        names = list(re.finditer(r"[\w.-]+\.json(?![\w.-])", text))
        if not names:
            raise InputError(
                f"{text}: the command must name the split's NAME.json, as in pipe:ssh host cat /data/train.json"
            )
        return Url(text[: names[-1].start()], names[-1].group(), text[names[-1].end() :])
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        return Path(text)
    if scheme[1].lower() == "file":
        return Path(unquote(urlsplit(text).path))
    try:
        urlsplit(text)
    except ValueError as error:
        raise InputError(f"{text.partition('?')[0][:200]} is no URL: {error}.") from error
    path, mark, query = text.partition("?") if scheme[1].lower() in ("http", "https") else (text, "", "")
    before, slash, name = path.rpartition("/")
    if not name or (scheme[1].lower() in ("http", "https") and before.endswith(":/")):
        raise InputError(f"{text.partition('?')[0]} names no file: a split's NAME.json is wanted.")
    return Url(before + slash, name, mark + query)


def sibling(place: Place, name: str, trust_urls: bool = False) -> Place:
    """The file that an index at ``place`` calls ``name``: beside or below it.

    Args:
        trust_urls: let the index name files in any folder (of its own machine), and on other hosts.

    Raises:
        InputError: for a command, anything that is no plain path where a command would be run with it, and what is
            elsewhere, unless it is trusted.
    """
    if _holds_control_characters(name):
        raise InputError(f"{place} names a shard {name[:200]!r}, which holds a control character.")
    if name.startswith("pipe:"):
        raise InputError(
            f"{place} asks to run {name!r}. Commands are run only where you give them: data.train=pipe:..."
        )
    if "://" in name:
        return _elsewhere(place, name, trust_urls)
    parts = PurePosixPath(name if isinstance(place, Path) else unquote(name)).parts
    if not parts:
        raise InputError(f"{place} names a shard {name!r}, which is no file.")
    if (parts[0].startswith("/") or ".." in parts) and not (trust_urls and isinstance(place, Path)):
        raise _outside(place, name)
    if isinstance(place, Path):
        return place.parent / name
    if place.scheme == "pipe" and not re.fullmatch(r"\w[\w./-]*", name):
        raise InputError(f"{place} names a shard {name!r}: beside a pipe: command, letters, digits, . _ - and / only.")
    if re.search(r"[?#\\]|::", name):
        raise InputError(f"{place} names a shard {name!r}: in the name of a remote file ?, #, \\ and :: are escaped.")
    return Url(place.before, name, place.after)


def _elsewhere(place: Place, name: str, trust_urls: bool) -> Url:
    if not trust_urls:
        raise _outside(place, name)
    other = place_of(name)
    if isinstance(other, Path) or other.scheme.lower() not in _REMOTE or "::" in name:
        raise InputError(f"{place} names a shard {name!r}: an index may name {', '.join(_REMOTE)} alone.")
    return other


def _outside(place: Place, name: str) -> InputError:
    return InputError(
        f"{place} names a shard {name!r}, which is not in its own folder. If you trust its writer set "
        "data.trust_urls=true, or put the shards beside it."
    )


def _holds_control_characters(text: str) -> bool:
    return any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text)
