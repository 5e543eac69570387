"""Images by name, from folders or straight from the zips people downloaded."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.errors import InputError
from shards.sources.records import Places


class ImageFiles:
    """Images by name, from one or several folders and zips.

    A name fits a file when one's path ends with the other's: COCO's json says "000000000009.jpg" and its zip
    "train2017/000000000009.jpg"; Karpathy's says "val2014/COCO_val2014_000000000042.jpg", and the folder may be
    val2014 itself.

    Raises:
        InputError: when a path is neither, or a zip is broken.
    """

    def __init__(self, places: Places):
        self._places = [_open(place) for place in ([places] if isinstance(places, Path) else places)]

    def read(self, name: str) -> bytes:
        """The bytes of one image.

        Raises:
            OSError: when it is missing or cannot be read.
        """
        parts = PurePosixPath(name.lstrip("/")).parts
        if ".." in parts:
            raise FileNotFoundError(f"{name} leads out of its folder")
        for start in range(len(parts)):
            for place in self._places:
                data = place.read(str(PurePosixPath(*parts[start:])), whole=start == 0)
                if data is not None:
                    return data
        raise FileNotFoundError(f"{name} is in none of {', '.join(str(place.path) for place in self._places)}")

    def names(self) -> list[str]:
        """Every file, as path relative to its folder or zip, sorted; hidden ones are left out."""
        names = sorted(name for place in self._places for name in place.names())
        return [name for name in names if not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))]


def _open(path: Path) -> "_Folder | _Zip":
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise InputError(f"There is no {path}. A folder of images, or a zip of them, is wanted.")
    return _Zip(path)


class _Folder:
    def __init__(self, path: Path):
        self.path = path

    def read(self, name: str, whole: bool) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self) -> Iterator[str]:
        return (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path} is neither a folder nor a readable zip ({error}). Download it again.") from error
        self._by_last: dict[str, list[str]] = {}
        for name in self.names():
            self._by_last.setdefault(name.rsplit("/", 1)[-1], []).append(name)

    def read(self, name: str, whole: bool) -> bytes | None:
        """The member of that name, or (for the ``whole`` name a dataset gives) the one whose path ends with it."""
        if name not in self._zip.NameToInfo:
            ending = [m for m in self._by_last.get(name.rsplit("/", 1)[-1], ()) if whole and m.endswith(f"/{name}")]
            if len(ending) > 1:
                raise OSError(f"{self.path.name} holds several of that name: {', '.join(ending)}")
            if not ending:
                return None
            name = ending[0]
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise OSError(f"{name}: {error}") from error  # damaged, cut short, or encrypted

    def names(self) -> Iterator[str]:
        return (name for name in self._zip.namelist() if not name.endswith("/"))
