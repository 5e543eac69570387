"""COCO as people have it: folder or zip, captions with stray spaces, and files that are something else."""

import argparse
import json
import re
import zipfile

import pytest

from shards import sources
from shards.errors import InputError
from tests.conftest import write_coco


def test_captions_are_cleaned_and_empty_ones_counted(tmp_path):
    source = sources.coco(*write_coco(tmp_path, {"a.jpg": [" A\n cat.  ", " \n"], "b.jpg": ["naïve café"]}, b""))
    assert [record.captions for record in source.records] == [("A cat.",), ("naïve café",)]
    assert source.left_out == {"captions without text": 1}


def test_images_without_captions_are_left_out_and_counted(tmp_path):
    source = sources.coco(*write_coco(tmp_path, {"a.jpg": ["A cat."], "b.jpg": []}, b""))
    assert [record.image for record in source.records] == ["a.jpg"]
    assert source.left_out == {"images without a caption": 1}


def test_captions_of_images_that_are_not_listed_are_counted(tmp_path):
    images, captions = write_coco(tmp_path, {"a.jpg": ["A cat."], "b.jpg": ["A dog.", "Two."]}, b"")
    document = json.loads(captions.read_text())
    document["images"].pop()
    captions.write_text(json.dumps(document))
    source = sources.coco(images, captions)
    assert [record.image for record in source.records] == ["a.jpg"]
    assert source.left_out == {"captions whose image is not listed": 2}


def test_every_kind_of_dataset_keeps_the_protocol(tmp_path):
    """A kind is a name, a line of help, its arguments, and a reader; the command knows no more of it."""
    names = [name for kind in sources.KINDS for name in kind.names]
    assert len(set(names)) == len(names) and {"coco", "karpathy", "table", "csv", "classes", "scenes"} <= set(names)
    parser = argparse.ArgumentParser()
    drawn = next(kind for kind in sources.KINDS if "scenes" in kind.names)
    drawn.add_arguments(parser)
    splits = drawn.read(parser.parse_args(["--count", "10"]), tmp_path)
    assert {name: len(source.records) for name, source in splits.items()} == {"train": 10, "val": 1}


def test_names_that_lead_out_of_the_folder_find_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"a")
    for name in ("../a.jpg", str(tmp_path / "a.jpg"), "x/../../a.jpg"):
        with pytest.raises(FileNotFoundError):
            sources.ImageFiles(tmp_path / "images").read(name)


def test_keys_hold_no_dot_and_no_space_and_stay_distinct():
    assert sources.Record("000000000009.jpg", ("x",), 9).key == "000000000009"
    names = [
        "sub dir/a photo.v2.jpg",
        "sub_dir_a_photo_v2.jpg",
        "猫.jpg",
        "犬.jpg",
        "x" * 200 + ".jpg",
        "x" * 201 + ".jpg",
    ]
    keys = [sources.Record(name, ("x",), 1).key for name in names]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)


@pytest.mark.parametrize("name", [".", "", "caf\udce9.jpg"])
def test_images_that_no_sample_can_be_called_after_are_refused(tmp_path, name):
    """The last is how Python names a file whose name is Latin-1."""
    document = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    (tmp_path / "captions.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="Rename it"):
        sources.coco(tmp_path, tmp_path / "captions.json")


def test_half_an_emoji_is_no_error(tmp_path):
    source = sources.coco(*write_coco(tmp_path, {"a.jpg": ["A cat \ud83d"]}, b""))
    assert source.records[0].captions == ("A cat ?",)


def test_a_zip_reads_like_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w") as archive:
        archive.writestr("train2017/000000000009.jpg", b"bytes")
    files = sources.ImageFiles(tmp_path / "train2017.zip")
    assert files.read("000000000009.jpg") == b"bytes"
    with pytest.raises(FileNotFoundError, match=r"train2017\.zip"):
        files.read("000000000010.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "not JSON"),
        ("[1, 2]", "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}', "instances_"),
        ('{"images": [{"id": 1}], "annotations": []}', "no 'file_name'"),
        ('{"images": [], "annotations": []}', "nothing to pack"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": 5}]}', "not text"),
        ('{"images": [{"id": [1], "file_name": "a.jpg"}], "annotations": []}', r"images\[0\] has the id '\[1\]'"),
        ('{"images": [], "annotations": [{"image_id": {}, "caption": "a"}]}', r"annotations\[0\] has the image_id"),
        ('{"images": [], "annotations": [{"image_id": 1, "id": [], "caption": "a"}]}', r"annotations\[0\] has the id"),
    ],
)
def test_a_json_that_is_not_captions_is_refused(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        sources.coco(tmp_path, path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("cocoid", [1]), ("imgid", {}), ("filepath", ["a"])])
def test_names_and_ids_of_karpathys_splits_are_text_or_numbers(tmp_path, name, value):
    image = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a cat"}], name: value}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(InputError, match=rf"images\[0\] has (the|a) {name}"):
        sources.karpathy([tmp_path], tmp_path / "dataset.json")


def test_missing_files_and_broken_zips_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"There is no .*nowhere\.json"):
        sources.coco(tmp_path, tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="folder of images, or a zip"):
        sources.ImageFiles(tmp_path / "nowhere")
    with zipfile.ZipFile(tmp_path / "broken.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(range(256)) * 40)
    data = bytearray((tmp_path / "broken.zip").read_bytes())
    data[60:90] = bytes(30)
    (tmp_path / "broken.zip").write_bytes(data)
    with pytest.raises(OSError, match=r"a\.jpg"):
        sources.ImageFiles(tmp_path / "broken.zip").read("a.jpg")
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4 cut short")
    with pytest.raises(InputError, match="Download it again"):
        sources.ImageFiles(tmp_path / "cut.zip")


def test_one_file_twice_is_refused(tmp_path):
    images, captions = write_coco(tmp_path, {"a.jpg": ["A cat."], "b.jpg": ["A dog."]}, b"")
    document = json.loads(captions.read_text())
    document["images"][1]["file_name"] = "a.jpg"
    captions.write_text(json.dumps(document))
    with pytest.raises(InputError, match="more than once"):
        sources.coco(images, captions)
