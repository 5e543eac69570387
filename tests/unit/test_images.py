"""Whatever image people have becomes an upright RGB JPEG, or is refused with a reason."""

import csv
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning.data.transforms import Preprocessing, decode
from launch.cli.images import images_at
from shards.images import UnreadableImageError, open_rgb, shrink, to_training_jpeg
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
    assert shrink(Image.new("RGB", (640, 480)), 256).size == (341, 256)
    assert shrink(Image.new("RGB", (100, 300)), 256).size == (100, 300)


def test_a_long_side_decides_in_place_of_the_short_one():
    """An image that it shrank is what padding to that many pixels wants: nothing is left to resize."""
    assert shrink(Image.new("RGB", (640, 480)), 256, 224).size == (224, 168)
    assert shrink(Image.new("RGB", (480, 641)), 0, 224).size == (168, 224)
    assert shrink(Image.new("RGB", (200, 10)), 256, 224).size == (200, 10)
    whole = Preprocessing(256, 224, False, "pad")
    for width in range(225, 700, 7):
        pixels = decode(to_training_jpeg(encoded(Image.new("RGB", (width, 423)), "PNG"), 256, 90, long_side=224))
        assert whole._whole(pixels) is pixels


def test_short_side_0_keeps_an_upright_rgb_jpeg_byte_for_byte():
    data = encoded(Image.new("RGB", (40, 30), "red"), "JPEG", quality=33)
    assert to_training_jpeg(data, 0, 90) == data
    grey = encoded(Image.new("L", (40, 30)), "JPEG")
    assert Image.open(io.BytesIO(to_training_jpeg(grey, 0, 90))).mode == "RGB"


def test_what_no_jpeg_can_hold_is_left_out_or_refused():
    long_comment = encoded(Image.new("P", (20, 20)), "GIF", comment=b"x" * 100_000)
    assert Image.open(io.BytesIO(to_training_jpeg(long_comment, 256, 90))).size == (20, 20)
    with pytest.raises(UnreadableImageError, match="70000 x 10 pixels cannot be stored"):
        to_training_jpeg(encoded(Image.new("L", (70_000, 10)), "PNG"), 256, 90)


def test_bombs_and_rubbish_are_refused(monkeypatch):
    with pytest.raises(UnreadableImageError):
        open_rgb(b"rubbish")
    monkeypatch.setattr("shards.images.MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="1,000"):
        open_rgb(encoded(Image.new("RGB", (100, 100)), "PNG"))


def test_more_than_8_bits_keep_their_brightness():
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    for values in (ramp, ramp * 255, (ramp * 65535).astype(np.int32), (ramp * 65535).astype(np.uint16)):
        image = open_rgb(encoded(Image.fromarray(values), "TIFF"))
        assert np.abs(np.asarray(image)[..., 0] - ramp * 255).max() <= 1
    black = open_rgb(encoded(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "TIFF"))
    assert np.asarray(black).max() == 0


def test_16_bit_gray_with_transparency_lies_on_white():
    values = np.full((4, 4), 30_000, dtype=np.uint16)
    values[0] = 500
    data = encoded(Image.fromarray(values), "PNG", transparency=500)
    shown = np.asarray(open_rgb(data))
    assert (shown[0] == 255).all() and (shown[1:] == 30_000 // 257).all()


@pytest.mark.parametrize("largest", [1.0, 255.0, 65535.0])
def test_infinities_and_what_is_no_number_do_not_change_the_rest(largest):
    values = np.linspace(0, largest, 16, dtype=np.float32).reshape(4, 4)
    values[0, :3] = np.inf, -np.inf, np.nan
    shown = np.asarray(open_rgb(encoded(Image.fromarray(values), "TIFF")))[..., 0].astype(int)
    assert shown[0, :3].tolist() == [255, 0, 0]
    assert np.abs(shown.ravel()[3:] - np.linspace(0, 255, 16)[3:]).max() <= 1


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "HTML page"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC image: convert"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2", "a video"),
        (b"PK\x03\x04" + bytes(60), "a zip"),
    ],
)
def test_what_is_no_image_is_named(data, name):
    with pytest.raises(UnreadableImageError, match=name):
        open_rgb(data)


def test_caption_takes_every_ending_that_packing_reads(tmp_path):
    endings = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "ppm", "jp2", "tga", "avif", "JFIF", "txt"]
    for ending in endings:
        (tmp_path / f"a.{ending}").write_bytes(b"")
    found = {Path(name).suffix[1:] for name, _ in images_at(str(tmp_path))}
    assert found >= {e for e in endings if e not in ("txt", "avif")} and "txt" not in found


def test_a_small_file_of_many_pixels_is_refused_without_decoding_it():
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)  # 120 GB of RGB

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(UnreadableImageError, match="limit"):
        open_rgb(bomb)


def test_no_program_is_run_on_a_file():
    """Pillow would hand an EPS to Ghostscript."""
    with pytest.raises(UnreadableImageError, match="known format"):
        open_rgb(encoded(Image.new("RGB", (8, 8)), "EPS"))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_common_formats_become_jpeg_at_any_short_side(form):
    data = encoded(Image.new("RGB", (60, 40), "blue"), form)
    for short_side, size in ((0, (60, 40)), (20, (30, 20)), (50, (60, 40))):
        packed = Image.open(io.BytesIO(to_training_jpeg(data, short_side, 90)))
        assert (packed.format, packed.mode, packed.size) == ("JPEG", "RGB", size)


@pytest.mark.parametrize("change", ["cmyk", "turned", "cut", "grey"])
def test_short_side_0_keeps_no_other_jpeg(change):
    image = Image.radial_gradient("L").convert("RGB").resize((64, 40))
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(image, "JPEG", quality=80)
    match change:
        case "cmyk":
            data = encoded(image.convert("CMYK"), "JPEG")
        case "turned":
            data = encoded(image, "JPEG", exif=exif)
        case "grey":
            data = encoded(image.convert("L"), "JPEG")
        case "cut":
            with pytest.raises(UnreadableImageError, match=r"(?i)truncated"):
                to_training_jpeg(data[: len(data) // 2], 0, 90)
            return
    kept = to_training_jpeg(data, 0, 95)
    assert kept != data
    upright = Image.open(io.BytesIO(kept))
    assert upright.mode == "RGB" and upright.getexif().get(0x0112, 1) == 1
    shown = image.rotate(180) if change == "turned" else image
    assert np.abs(np.asarray(upright, dtype=int) - np.asarray(shown)).mean() < 6


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


def test_odd_real_files_keep_their_bytes_where_they_can():
    """With --short-side 0: an upright RGB JPEG byte for byte; the orientations of one picture all come out upright."""
    folder = DATA / "odd"
    if not folder.is_dir():
        pytest.skip(f"the collection of odd images is not here ({folder})")
    with (folder / "MANIFEST.tsv").open() as manifest:
        rows = {row["file"]: row["opens_as"] for row in csv.DictReader(manifest, delimiter="\t")}
    kept = set()
    for name, opens_as in rows.items():
        if "load:" not in opens_as:
            data = (folder / name).read_bytes()
            if to_training_jpeg(data, 0, 90) == data:
                kept.add(name)
    upright = {name for name, opens_as in rows.items() if re.fullmatch(r"JPEG RGB \d+x\d+( exif1)?", opens_as)}
    assert kept == upright and len(kept) == 7
    landscapes = [open_rgb((folder / name).read_bytes()).resize((180, 120)) for name in rows if "landscape" in name]
    assert len(landscapes) == 3
    for other in landscapes[1:]:
        assert np.abs(np.asarray(landscapes[0], dtype=int) - np.asarray(other)).mean() < 3
