"""What is in a WebDataset tar: its files grouped to samples, where each lies, and what a sample says.

Our own tars hold KEY.jpg and KEY.json; those of others may hold png or webp, captions as ``.txt`` or in the json (as
img2dataset writes them), and a label as ``.cls``. Names are cut into key and extension as webdataset and DALI do: at
the first dot of the last path component.
"""

import json
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.captions import captions_in
from shards.errors import InputError

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif", "img", "image"),
    *("jpe", "jfif", "apng", "dib", "pgm", "pbm", "pnm", "j2k", "jpx", "tga", "qoi", "ico"),
)
TEXT_EXTENSIONS = ("txt", "text", "caption", "captions")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class SampleText:
    """What a sample says, without its picture."""

    key: str
    captions: tuple[str, ...]
    image_id: int | str
    label: str | None


File = tuple[str, int, int, str]  # extension, offset, size, name


@dataclass(frozen=True)
class TarSample:
    """The files of one sample in the order of the tar, but that the picture is the first image: of several the one with
    a plain ending, x.jpg before x.mask.png."""

    key: str
    files: tuple[File, ...]

    @property
    def image(self) -> File | None:
        """The sample's picture: its first file with an image's extension."""
        return next((file for file in self.files if is_image(file[0])), None)

    @property
    def images(self) -> int:
        """How many of its files are images."""
        return sum(is_image(file[0]) for file in self.files)


def main_file(files: Sequence[File]) -> File:
    """The file of a sample that is read with it and has a checksum: its image, else its first array (.npy), else its
    first."""
    return next((file for file in files if is_image(file[0])), (*_arrays(files), files[0])[0])


def view_file(files: Sequence[File], view: int) -> File:
    """The main file; or (``view`` from 1) another of the arrays of a sample that holds several views of its image.

    Raises:
        ValueError: when it has no such view.
    """
    if view and not view < len(_arrays(files)):
        raise ValueError(f"a sample of {len(_arrays(files))} views has no view {view}")
    return _arrays(files)[view] if view else main_file(files)


def _arrays(files: Sequence[File]) -> list[File]:
    return [file for file in files if file[0].rsplit(".", 1)[-1] == "npy"]


def is_image(ext: str) -> bool:
    """Whether an extension ("jpg", or what webdataset makes of a.b.jpg: "b.jpg") is an image's."""
    return ext.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a tar member; None for one that belongs to no sample (as webdataset has it)."""
    match = re.fullmatch(r"((?:.*/|)[^./][^.]*)[.]([^/]+)", name)
    return None if match is None or name.startswith("__") else (match[1], match[2])


def samples_of(tar: Path, prefix: str = "") -> list[TarSample]:
    """The samples of a tar: see ``read_tar``."""
    return read_tar(tar, prefix)[0]


def read_tar(tar: Path, prefix: str = "") -> tuple[list[TarSample], int]:
    """The samples of a tar, from its own headers (so it is right whatever wrote the tar), and how many tars there are
    in the file: of several written one after another the stock webdataset library reads the first alone.

    Args:
        prefix: put before every key and name, for tars whose keys begin anew in each.

    Raises:
        InputError: when it is compressed, no tar, cut short, or has duplicate or interleaved keys.
    """
    _refuse_compressed(tar)
    samples: dict[str, list[tuple[str, int, int, str]]] = {}
    last, archives = None, 0
    for members in _archives(tar):
        archives += 1
        for member in members:
            parts = split_name(member.name)
            if parts is None or member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise InputError(f"{tar}: {member.name} is a link or a sparse file: pack the tar with plain files.")
            key, ext = parts
            _refuse_out_of_order(tar, key, ext, key != last and key in samples, samples.get(key, []))
            samples.setdefault(key, []).append((ext, member.offset_data, member.size, prefix + member.name))
            last = key
    return [TarSample(prefix + key, _picture_first(files)) for key, files in samples.items()], archives


def _archives(tar: Path) -> Iterator[list[tarfile.TarInfo]]:
    """The members of each tar in a file."""
    with tar.open("rb") as file:
        start: int | None = 0
        while start is not None:
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    members = archive.getmembers()
                    end = archive.offset
            except (tarfile.TarError, EOFError) as error:
                raise InputError(f"{tar} is no tar, or was cut short ({error}). Copy it again.") from error
            _refuse_without_end(tar, end)  # tarfile takes a broken header, or a cut between two files, for the end
            yield members
            start = _next_archive(file, end)


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """Where the next tar begins, after the null bytes that end one; None at the end of the file."""
    at = end
    file.seek(at)
    while block := file.read(1 << 20):
        rest = block.lstrip(b"\0")
        if rest:
            return (at + len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(block)
    return None


def _picture_first(files: list[tuple[str, int, int, str]]) -> tuple[tuple[str, int, int, str], ...]:
    images = [file for file in files if is_image(file[0])]
    plain = next((file for file in images if "." not in file[0]), None)
    if plain is None or plain is images[0]:
        return tuple(files)
    others = [file for file in files if file is not plain]
    others.insert(others.index(images[0]), plain)
    return tuple(others)


def _refuse_without_end(tar: Path, end: int) -> None:
    with tar.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise InputError(f"{tar} was cut short or is damaged at byte {end:,}. Copy it again.")


def _refuse_compressed(tar: Path) -> None:
    with tar.open("rb") as file:
        start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise InputError(f"{tar} is compressed ({name}), so nothing in it can be read by offset. Decompress it.")


def _refuse_out_of_order(tar: Path, key: str, ext: str, again: bool, files: Iterable[tuple]) -> None:
    if again:
        raise InputError(
            f"{tar}: files of sample {key!r} are interleaved with others', or the key is used twice. "
            "A sample's files must be neighbours: write the tar again with sorted names."
        )
    if any(ext == other[0] for other in files):
        raise InputError(f"{tar}: {key}.{ext} is there twice. Keys must be distinct.")


def idx_text(samples: Iterable[TarSample]) -> str:
    """The DALI index (text, v1.2) of a tar's samples: a line each, of extension, offset, size and name of its files."""
    lines = [" ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in s.files) for s in samples]
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


def checksums(tar: Path, samples: Iterable[TarSample], views: int = 1) -> bytes:
    """crc32 of each sample's main file, 4 bytes each, little-endian: a flipped bit is found where a JPEG decodes. Of
    samples of several ``views``, of each of them."""
    with tar.open("rb") as file:
        contents = (_content(file, view_file(sample.files, view)) for sample in samples for view in range(views))
        return b"".join(zlib.crc32(content).to_bytes(4, "little") for content in contents)


def text_of(sample: TarSample, tar: BinaryIO, field: str | None = None) -> SampleText:
    """What a sample says: captions from its json ("captions"), or its ``.txt``, or another of its json's
    CAPTION_FIELDS, in that order; id and label from its json, else its key and its ``.cls``. Captions may be missing.

    Args:
        field: the field of the json, or the ending of the file, that holds the captions.

    Raises:
        InputError: when one of its files is no text or no json.
    """
    try:
        about = json_of(sample, tar)
        found = _captions(sample, tar, about, field)
        label = about.get("label")
        if "label" not in about and (classes := _of_ending(sample, "cls")):
            label = _content(tar, classes[0]).decode().strip()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{tar.name}: sample {sample.key!r} holds a text that cannot be read ({error}).") from error
    captions = tuple(map(clean, found))
    image_id = about["image_id"] if isinstance(about.get("image_id"), int | str) else sample.key
    return SampleText(sample.key, tuple(filter(None, captions)), image_id, None if label is None else str(label))


def json_of(sample: TarSample, tar: BinaryIO) -> dict[str, Any]:
    """What a sample's json holds; a list is taken for its captions.

    Raises:
        ValueError: when it is no json.
    """
    files = _of_ending(sample, "json")
    about = json.loads(_content(tar, files[0])) if files else {}
    return about if isinstance(about, dict) else {"captions": about}


def _captions(sample: TarSample, tar: BinaryIO, about: dict[str, Any], field: str | None) -> list[str]:
    if field is not None:
        by_name = {str(name).lower(): name for name in about}
        if field.lower() in by_name:
            return captions_in(about[by_name[field.lower()]])
        return [_content(tar, file).decode("utf-8-sig") for file in _of_ending(sample, field.lower())]
    if any(map(str.strip, found := captions_in(about.get("captions")))):
        return found
    for ending in TEXT_EXTENSIONS:
        if files := _of_ending(sample, ending):
            return [_content(tar, file).decode("utf-8-sig") for file in files]
    return captions_in(about)


def _of_ending(sample: TarSample, ending: str) -> list[tuple[str, int, int, str]]:
    """x.txt, or x.0.txt, x.1.txt ... (by their numbers)."""
    files = [file for file in sample.files if file[0].lower() == ending]
    numbered = [(re.fullmatch(rf"(\d+)\.{re.escape(ending)}", file[0].lower()), file) for file in sample.files]
    return files or [file for _, file in sorted((int(match[1]), file) for match, file in numbered if match)]


def clean(caption: str) -> str:
    """One line, single spaces, Unicode NFC, no byte order mark; COCO's captions hold newlines and stray spaces. Half an
    emoji, as a JSON's escapes can name where a text was cut, becomes "?"."""
    return " ".join(unicodedata.normalize("NFC", caption.encode(errors="replace").decode()).lstrip("\ufeff").split())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _content(tar: BinaryIO, file: File) -> bytes:
    _ext, offset, size, _name = file
    tar.seek(offset)
    return tar.read(size)
