"""Any image file people have -> the upright RGB JPEG that training reads."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.filetypes import ENOUGH, kind_of

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error: past it a small file may ask for gigabytes ("bomb")

Image.init()
# Not all that Pillow opens: it runs Ghostscript on an EPS, and some formats are none of pictures.
FORMATS = sorted(
    {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"}
    & set(Image.OPEN)
)
# Endings of the files that these formats have, with their dot.
SUFFIXES = frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)


class UnreadableImageError(Exception):
    """The bytes are not an image that can be decoded; the message says why."""


def open_rgb(data: bytes) -> Image.Image:
    """Decode any image to upright RGB: EXIF orientation applied, transparency laid on white, 16 bits cut to 8.

    Raises:
        UnreadableImageError: when the bytes are no image, are truncated, or decode to more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width} x {image.height} pixels is more than {MAX_PIXELS:,}")
            return upright_rgb(image)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:  # its message names an address in memory
        kind = kind_of(data[:ENOUGH])
        raise UnreadableImageError(f"it is {kind}" if kind else "not an image of a known format") from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet: OSError, SyntaxError, struct.error
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as ``open_rgb`` gives it.

    Raises:
        UnreadableImageError: when its pixels cannot be decoded.
    """
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        gray = _to_8_bits(values)
        if isinstance(clear := image.info.get("transparency"), int):  # 16-bit PNG: one value is to be seen through
            gray[values == clear] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """One channel of more than 8 bits, or of floats: 0..65535, 0..255 or 0..1, as its largest finite value tells. What
    is no number is black, infinities are black and white."""
    largest = np.max(values, initial=0, where=np.isfinite(values))
    scale = 255 / largest if largest > 65535 else 1 / 257 if largest > 255 else 255 if 0 < largest <= 1 else 1
    return np.nan_to_num(values * scale, posinf=255, neginf=0).clip(0, 255).astype(np.uint8)


def shrink(image: Image.Image, short_side: int = 0, long_side: int = 0) -> Image.Image:
    """Shrink so that the longer side is ``long_side`` pixels or, where that is 0, the shorter side ``short_side``; a
    smaller image is returned as it is, and any with both 0."""
    side, wanted = (max(image.size), long_side) if long_side else (min(image.size), short_side)
    if side <= wanted or not wanted:
        return image
    size = (max(1, round(image.width * wanted / side)), max(1, round(image.height * wanted / side)))
    return image.resize(size, Image.Resampling.LANCZOS)


def to_training_jpeg(data: bytes, short_side: int, quality: int, long_side: int = 0) -> bytes:
    """The JPEG bytes stored in a shard, of the image as ``shrink`` leaves it; with both sides 0 an upright RGB JPEG is
    kept byte for byte.

    Raises:
        UnreadableImageError: when the bytes cannot be decoded, or make no JPEG (of more than 65,500 pixels a side).
    """
    return training_image(data, short_side, quality, long_side)[0]


def training_image(data: bytes, short_side: int, quality: int, long_side: int = 0) -> tuple[bytes, Image.Image]:
    """``to_training_jpeg``, and the image it was encoded from.

    Raises:
        UnreadableImageError: as ``to_training_jpeg``.
    """
    image = open_rgb(data)
    if not short_side and not long_side and _is_upright_rgb_jpeg(data):
        return data, image
    image = shrink(image, short_side, long_side)
    out = io.BytesIO()
    try:
        image.save(out, "JPEG", quality=quality, comment=b"")
    except Exception as error:
        size = f"{image.width} x {image.height} pixels"
        raise UnreadableImageError(f"{size} cannot be stored as JPEG: {error}") from error
    return out.getvalue(), image


def _is_upright_rgb_jpeg(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
