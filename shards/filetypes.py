"""What a file really is, told from its first bytes, so that a message can name it."""

import re

ENOUGH = 512  # bytes from the start that ``kind_of`` looks at
_MAGIC = (
    (b"PK\x03\x04", "a zip (or a file of an office program)"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"BZh", "compressed (bzip2)"),
    (b"\xfd7zXZ\x00", "compressed (xz)"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89HDF", "HDF5"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x80\x02", "a Python pickle, which is never opened"),
    (b"\x80\x03", "a Python pickle, which is never opened"),
    (b"\x80\x04", "a Python pickle, which is never opened"),
    (b"\x80\x05", "a Python pickle, which is never opened"),
    (b"\xd0\xcf\x11\xe0", "a file of an old office program"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"8BPS", "a Photoshop document"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
)
_ISO_MEDIA = {b"hei": "a HEIC image: convert it to JPEG", b"hev": "a HEIC image: convert it to JPEG"}
_ISO_MEDIA |= {b"mif": "a HEIC image: convert it to JPEG", b"avi": "an AVIF image"}


def kind_of(start: bytes) -> str | None:
    """What a file is that begins with ``start``, in words that follow "it is"; None for plain text and the unknown."""
    if not start:
        return "empty"
    if start[4:8] == b"ftyp":
        return _ISO_MEDIA.get(start[8:11], "a video (MP4 or its like)")
    if start[:4] == b"RIFF":
        return "a WebP image" if start[8:12] == b"WEBP" else "sound or video (RIFF)"
    if start[257:262] == b"ustar":
        return "a tar"
    if re.match(rb"\s*(<!doctype html|<html)", start.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE):
        return "an HTML page: the download met a login or an error"
    return next((name for magic, name in _MAGIC if start.startswith(magic)), None)
