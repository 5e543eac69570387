"""What splits share: copies are found, other pictures are not taken for one, and training refuses shared images."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from captioning import config as configuration
from captioning.training import checks
from launch import audit
from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.index import Index
from shards.overlap import overlap
from shards.packing.packer import Settings, pack
from shards.perceptual import NEAR_BITS, perceptual_hash, split_signs
from tests.conftest import DATA


def scene(seed: int) -> Image.Image:
    """A picture with structure at several scales, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (3, 6, 12)]
    pixels = [np.asarray(layer.resize((160, 120), Image.Resampling.BICUBIC), dtype=float) for layer in layers]
    return Image.fromarray((pixels[0] * 0.5 + pixels[1] * 0.3 + pixels[2] * 0.2).astype(np.uint8))


def stored(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def packed(folder, split: str, images: dict[str, bytes], **settings) -> Index:
    (folder / split).mkdir(parents=True)
    for name, data in images.items():
        (folder / split / name).write_bytes(data)
    path = folder / split / "t.csv"
    path.write_text("image,caption\n" + "".join(f"{name},A picture.\n" for name in images))
    return pack(sources.table(folder / split, path), split, folder / "shards", Settings(**settings))


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("overlap")
    images = {f"{n}.jpg": stored(scene(n), quality=95) for n in range(12)}
    images["flat.png"] = stored(Image.new("RGB", (50, 50), "white"), "PNG")
    return packed(folder, "train", images)


def test_copies_are_found_and_other_pictures_are_not(train, tmp_path):
    copies = {
        "bytes.jpg": stored(scene(0), quality=95),
        "encoded.webp": stored(scene(1), "WEBP", quality=50),
        "resized.jpg": stored(scene(2).resize((80, 60))),
        "mirrored.jpg": stored(ImageOps.mirror(scene(3))),
        "cropped.jpg": stored(scene(4).crop((2, 2, 158, 118))),
        "5.jpg": stored(scene(5), quality=40),  # its name besides
        "6.jpg": stored(scene(100)),  # nothing but its name
        "other.jpg": stored(scene(101)),
        "flat2.png": stored(Image.new("RGB", (60, 50), "gray"), "PNG"),
    }
    val = packed(tmp_path, "val", copies)
    found = overlap(train, val)
    ours, theirs = train.texts(), val.texts()
    pairs = {theirs[p.val].image_id: (ours[p.train].image_id, p.why) for p in found.pairs}
    assert pairs == {
        "bytes.jpg": ("0.jpg", "same bytes"),
        "encoded.webp": ("1.jpg", "near"),
        "resized.jpg": ("2.jpg", "near"),
        "mirrored.jpg": ("3.jpg", "near, mirrored"),
        "cropped.jpg": ("4.jpg", "near"),
        "5.jpg": ("5.jpg", "near"),
    }
    assert (found.shared_bytes, found.near_duplicates, found.shared_ids, found.shared_keys) == (1, 5, 2, 2)
    assert found.same == 2  # the same bytes, and the same picture under the same name
    assert not found.packing_differs


def without_hashes(index: Index) -> None:
    """As packed by an earlier version."""
    for shard in index.shards:
        path = shard_index.captions_path(shard.path)
        document = json.loads(path.read_text())
        for sample in document["samples"]:
            del sample["image_sha256"], sample["image_phash"]
        path.write_text(json.dumps(document))


def test_splits_without_hashes_are_compared_by_key_and_id(train, tmp_path):
    val = packed(tmp_path, "val", {"0.jpg": stored(scene(0), quality=95), "x.jpg": stored(scene(1))}, short_side=0)
    without_hashes(val)
    found = overlap(train, val)
    assert (found.shared_bytes, found.near_duplicates, found.same) == (None, None, 1)
    assert found.packing_differs == ["short_side 256 in train, 0 in val"]


def config_of(train: Index, val: Index, **data):
    values = {"run": "unused", "train": {"epochs": 1}, "data": {"train": str(train.path), "val": str(val.path), **data}}
    return configuration.from_dict(values, "test")


def test_training_refuses_splits_that_share_images(train, tmp_path, caplog):
    val = packed(tmp_path, "val", {"a.jpg": stored(scene(0), quality=95), "b.jpg": stored(scene(1), quality=50)})
    with pytest.raises(
        InputError, match=r"holds 1 images of data\.train.*\n.*captioning audit.*data\.allow_overlap=true"
    ):
        checks.check_overlap(train, val, config_of(train, val))
    checks.check_overlap(train, val, config_of(train, val, allow_overlap=True))
    assert "1 near duplicates" in caplog.text
    caplog.clear()
    (tmp_path / "near").mkdir()
    near = packed(tmp_path / "near", "val", {"b.jpg": stored(scene(1), quality=50)}, quality=70)
    checks.check_overlap(train, near, config_of(train, near))
    told = caplog.text
    assert "1 near duplicates" in told and "quality 90 in train, 70 in val" in told


def test_the_command_writes_numbers_and_a_page(train, tmp_path, monkeypatch, capsys):
    val = packed(tmp_path, "val", {"a.jpg": stored(scene(0), quality=95), "b.jpg": stored(scene(50))})
    numbers, page = tmp_path / "audit.json", tmp_path / "page"
    places = [str(train.path), str(val.path)]
    monkeypatch.setattr("sys.argv", ["audit", *places, "--json", str(numbers), "--html", str(page)])
    audit.main()
    assert "1 files of the same bytes" in capsys.readouterr().out
    (result,) = json.loads(numbers.read_text())
    assert (result["shared_bytes"], result["near_duplicates"], result["same"]) == (1, 0, 1)
    assert result["pairs"] == [{"train": "0", "val": "a", "why": "same bytes", "bits": 0}]
    html = (page / "index.html").read_text()
    assert html.count("data:image/jpeg") == 2 and "same bytes" in html


def test_real_photographs():
    """At least 99 % of copies encoded again or resized are found; fewer than 0.1 % of other pairs are taken for one."""
    folder = DATA / "flickr8k-256" / "Images"
    if not folder.is_dir():
        pytest.skip(f"real photographs are not here ({folder}): this test runs where the developers' data is")
    photographs = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))[:300]]

    def signs(change) -> np.ndarray:
        changed = [Image.open(io.BytesIO(stored(change(image), quality=60))).convert("RGB") for image in photographs]
        return np.hstack(split_signs([perceptual_hash(image) or "" for image in changed]))

    originals = np.hstack(split_signs([perceptual_hash(image) or "" for image in photographs]))
    for change in (lambda i: i, lambda i: i.resize((i.width // 2, i.height // 2)), lambda i: i.resize((96, 96))):
        bits = (originals.shape[1] - signs(change) @ originals.T) / 2
        assert np.mean(np.diag(bits) <= NEAR_BITS) >= 0.99
        np.fill_diagonal(bits, 999)
        assert np.mean(bits <= NEAR_BITS) < 0.001


@pytest.mark.parametrize(
    ("side", "data", "said"),
    [
        ({"long_side": 224}, {}, "with --long-side 224.*crop asks for data.resize_size=256.*with --short-side 256"),
        ({"long_side": 224}, {"crop_mode": "pad", "image_size": 224}, None),
        ({"long_side": 224}, {"crop_mode": "pad", "image_size": 384}, "image_size=384.*with --long-side 384"),
        ({"short_side": 256}, {}, None),
        ({"short_side": 256}, {"crop_mode": "squash", "image_size": 384}, "image_size=384.*with --short-side 384"),
        ({"short_side": 0}, {}, None),
    ],
)
def test_pictures_that_training_would_enlarge_are_told(tmp_path, side, data, said):
    train = packed(tmp_path, "train", {"0.jpg": stored(scene(0))}, **side)
    told = checks.enlarged(train, config_of(train, train, **data))
    assert (told is None) == (said is None) and (said is None or re.search(said, told))
