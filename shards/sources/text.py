"""Text files as UTF-8 or UTF-16; a file that is something else is named for what it is."""

from pathlib import Path

from shards.errors import InputError
from shards.filetypes import ENOUGH, kind_of


def read_text(path: Path, encoding: str | None = None) -> str:
    """A text file: UTF-8, or UTF-16, with or without a byte order mark, unless an encoding is named. A file whose lines
    all end in a carriage return alone gets newlines.

    Raises:
        InputError: when it is missing, a folder, no text, or of another encoding.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"There is no {path}.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; a file is wanted.") from error
    if kind := kind_of(data[:ENOUGH]):
        raise InputError(f"{path} cannot be read: it is {kind}.{_advice(kind)}")
    try:
        text = data.decode(encoding or _unicode_encoding(data)).removeprefix("\ufeff")
    except (UnicodeDecodeError, LookupError) as error:
        if encoding:
            raise InputError(f"{path} is not {encoding} ({error}).") from error
        raise InputError(
            f"{path} is not UTF-8 ({error}).\nSave it as UTF-8. A table may stay as it is: `pack table` takes "
            "--encoding cp1252 (or what it was written in)."
        ) from error
    if not encoding and "\0" in text:
        raise InputError(f"{path} is no text: it holds null bytes.")
    return text if "\n" in text else text.replace("\r", "\n")


def _unicode_encoding(data: bytes) -> str:
    """UTF-16 where there is its mark, or every other byte at the start is null, as Latin letters have it."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    start = data[:64]
    if len(start) >= 8 and len(start) % 2 == 0 and not any(start[1::2]) and all(start[::2]):
        return "utf-16-le"
    if len(start) >= 8 and len(start) % 2 == 0 and not any(start[::2]) and all(start[1::2]):
        return "utf-16-be"
    return "utf-8"


def _advice(kind: str) -> str:
    if kind.startswith("a zip"):
        return " Unpack it; images may stay in their zip: --images takes it. Save a spreadsheet as CSV."
    if "image" in kind:
        return " --images takes the folder it is in."
    if kind == "a tar":
        return " `pack tars` indexes tars of images and captions."
    if kind.startswith("compressed"):
        return " Decompress it."
    if kind == "Parquet":
        return " `pack table` reads it."
    return ""
