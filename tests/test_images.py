"""Whatever image people have becomes an upright RGB JPEG, or is refused with a reason."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from shards.images import UnreadableImageError, open_rgb, resize_short_side, to_training_jpeg
from tests.conftest import DATA


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 128), (127, 127, 127)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected):
    image = open_rgb(encoded(Image.new(mode, (4, 4), colour), "PNG"))
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == expected


def test_cmyk_becomes_rgb():
    image = open_rgb(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = image.getpixel((8, 8))
    assert red > 200 and green < 60 and blue < 60


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 10, 10))  # black on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: black on top
    upright = open_rgb(encoded(image, "JPEG", exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 3))[0] < 50 < 200 < upright.getpixel((5, 16))[0]


def test_short_side_shrinks_and_never_enlarges():
    assert resize_short_side(Image.new("RGB", (640, 480)), 256).size == (341, 256)
    assert resize_short_side(Image.new("RGB", (100, 300)), 256).size == (100, 300)


def test_short_side_0_keeps_an_upright_rgb_jpeg_byte_for_byte():
    data = encoded(Image.new("RGB", (40, 30), "red"), "JPEG", quality=33)
    assert to_training_jpeg(data, 0, 90) == data
    grey = encoded(Image.new("L", (40, 30)), "JPEG")
    assert Image.open(io.BytesIO(to_training_jpeg(grey, 0, 90))).mode == "RGB"


def test_bombs_and_rubbish_are_refused(monkeypatch):
    with pytest.raises(UnreadableImageError):
        open_rgb(b"rubbish")
    monkeypatch.setattr("shards.images.MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="1,000"):
        open_rgb(encoded(Image.new("RGB", (100, 100)), "PNG"))


def test_odd_real_files():
    """Every file of the collection: what Pillow reads is packed at the upright size, what it cannot is refused."""
    folder = DATA / "odd"
    if not folder.is_dir():
        pytest.skip(f"the collection of odd images is not here ({folder})")
    with (folder / "MANIFEST.tsv").open() as manifest:
        rows = list(csv.DictReader(manifest, delimiter="\t"))
    assert len(rows) == 27
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        if "load:" in row["opens_as"]:
            with pytest.raises(UnreadableImageError):
                to_training_jpeg(data, 256, 90)
            continue
        _form, _mode, size, *exif = row["opens_as"].split()
        packed = Image.open(io.BytesIO(to_training_jpeg(data, 256, 90)))
        width, height = map(int, size.split("x"))
        if exif and exif[0] in ("exif5", "exif6", "exif7", "exif8"):
            width, height = height, width
        assert packed.mode == "RGB"
        assert min(packed.size) == min(256, width, height)
        assert np.isclose(packed.width / packed.height, width / height, rtol=0.02)
