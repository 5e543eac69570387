"""CSV, Flickr's token files and class folders, as they come: quoting, headers, lists, labels, and what is refused."""

import json
import zipfile

import pytest

from shards import sources
from shards.errors import InputError


def captions_of(tmp_path, text: str | bytes, **options) -> dict[str, tuple[str, ...]]:
    path = tmp_path / "captions.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {record.image: record.captions for record in sources.table(tmp_path, path, **options).records}


@pytest.mark.parametrize(
    "text",
    [
        "image,caption\na.jpg,A cat.\na.jpg,Another.\nb.png,A dog, running.\n",
        "a.jpg,A cat.\na.jpg,Another.\nb.png,A dog, running.\n",
        '"a.jpg","A cat."\r\n"a.jpg","Another."\r\n"b.png","A dog, running."\r\n',
        'id,Caption ,Image,extra\n1,A cat.,a.jpg,x\n2,Another.,a.jpg,y\n3,"A dog, running.",b.png,z\n',
        "image_name| comment_number| comment\na.jpg| 0| A cat.\na.jpg| 1| Another.\nb.png| 0| A dog, running.\n",
        "a.jpg#0\tA cat.\na.jpg#1\tAnother.\nb.png#0\tA dog, running.\n",
        '\ufeffcaption;path\nA cat.;a.jpg\n\n"An\nother.";a.jpg\nA dog, running.;b.png\n'.replace(
            "An\nother", "Another"
        ),
        "a.jpg\tA cat.\na.jpg\tAnother.\nb.png\tA dog, running.\n",
    ],
)
def test_every_layout_says_the_same(tmp_path, text):
    assert captions_of(tmp_path, text) == {"a.jpg": ("A cat.", "Another."), "b.png": ("A dog, running.",)}


def test_captions_keep_what_people_wrote(tmp_path):
    text = 'image,caption\na.jpg," Un café,\n ""noir"" "\na.jpg,猫\u2028猫\nb.jpg,\nc.jpg\n'
    path = tmp_path / "captions.csv"
    path.write_text(text, encoding="utf-8", newline="")
    source = sources.table(tmp_path, path)
    assert [record.captions for record in source.records] == [('Un café, "noir"', "猫 猫")]
    assert source.left_out == {"captions without text": 2, "images without a caption": 2}
    assert captions_of(tmp_path, 'a.jpg| he said "no\nb.jpg| fine\n') == {"a.jpg": ('he said "no',), "b.jpg": ("fine",)}


def test_a_list_chooses_the_split(tmp_path):
    (tmp_path / "list.txt").write_text("c.jpg\na\n\nnowhere.jpg\n")
    path = tmp_path / "captions.txt"
    path.write_text("a.jpg#0\tA.\nb.jpg#0\tB.\nc.jpg#0\tC.\n")
    source = sources.table(tmp_path, path, only=tmp_path / "list.txt")
    assert {record.image for record in source.records} == {"a.jpg", "c.jpg"}
    assert source.left_out == {"listed images without a caption": 1, "images not listed in list.txt": 1}
    (tmp_path / "list.txt").write_text("other.jpg\n")
    with pytest.raises(InputError, match=r"list\.txt names no image of the table"):
        sources.table(tmp_path, path, only=tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("one,two\nthree,four\n", "neither a header"),
        ('image,caption\na.jpg,"never closed\nb.jpg,A dog.\nc.jpg,A cat.\n', "never closed"),
        ("image,caption\n,A dog.\n", "line 2: no image"),
        ("image,caption\na.jpg,\n", "nothing to pack"),
        ("image,caption\na.jpg,caf\xe9\n".encode("latin1"), "not UTF-8"),
        ("image,caption\na.jpg,x\na.png,y\n", "more than once"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        captions_of(tmp_path, text)


@pytest.fixture
def class_root(tmp_path):
    for name in (
        "tabby_cat/1.jpg",
        "tabby_cat/deep/2.JPG",
        "dog/1.jpg",
        "dog/notes.txt",
        "dog/.hidden.jpg",
        "loose.jpg",
    ):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"x")
    return tmp_path / "root"


def test_class_folders_give_labels_and_captions(class_root, tmp_path):
    source = sources.classes(class_root, template="a {class}.")
    assert [(r.image, r.label, r.captions) for r in source.records] == [
        ("dog/1.jpg", "dog", ("a dog.",)),
        ("tabby_cat/1.jpg", "tabby_cat", ("a tabby cat.",)),
        ("tabby_cat/deep/2.JPG", "tabby_cat", ("a tabby cat.",)),
    ]
    assert source.left_out == {"files that are no image of a class": 2}
    with zipfile.ZipFile(tmp_path / "root.zip", "w") as archive:
        for path in class_root.glob("*/**/*.*"):
            archive.write(path, path.relative_to(tmp_path))
    zipped = sources.classes(tmp_path / "root.zip", template="a {class}.")
    assert [r.label for r in zipped.records] == ["dog", "tabby_cat", "tabby_cat"]


def test_class_folders_take_captions_from_a_table(class_root, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("dog/1.jpg,A good dog.\n2.JPG,A cat.\n")
    source = sources.classes(class_root, captions=table)
    assert {r.image: (r.label, r.captions) for r in source.records} == {
        "dog/1.jpg": ("dog", ("A good dog.",)),
        "tabby_cat/deep/2.JPG": ("tabby_cat", ("A cat.",)),
    }
    assert source.left_out["images without a caption"] == 1
    table.write_text("1.jpg,Which one?\n")
    with pytest.raises(InputError, match=r"1\.jpg: dog/1\.jpg, tabby_cat/1\.jpg"):
        sources.classes(class_root, captions=table)
    with pytest.raises(InputError, match=r"\{class\}"):
        sources.classes(class_root, template="a photo")
    with pytest.raises(InputError, match="class folders"):
        sources.classes(class_root / "dog")


def karpathy_json(folder, **changes):
    image = {
        "filepath": "val2014",
        "filename": "a.jpg",
        "cocoid": 7,
        "split": "train",
        "sentences": [{"raw": " A\ncat"}],
    }
    others = [
        {"filename": "b.jpg", "imgid": 1, "split": "restval", "sentences": [{"raw": "B"}, {"raw": " "}]},
        {"filename": "c.jpg", "imgid": 2, "split": "val", "sentences": [{"raw": "C"}]},
        {"filename": "d.jpg", "imgid": 3, "split": "val", "sentences": []},
    ]
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": [{**image, **changes}, *others], "dataset": "coco"}))
    return path


def test_karpathys_splits(tmp_path):
    splits = sources.karpathy(tmp_path, karpathy_json(tmp_path))
    assert set(splits) == {"train", "val"}
    assert [(r.image, r.captions, r.image_id) for r in splits["train"].records] == [
        ("val2014/a.jpg", ("A cat",), 7),
        ("b.jpg", ("B",), 1),
    ]
    assert splits["train"].left_out == {"captions without text": 1}
    assert splits["val"].left_out == {"images without a caption": 1}


@pytest.mark.parametrize(
    "changes", [{"split": 3}, {"filename": None}, {"sentences": "x"}, {"sentences": [{"tokens": []}]}]
)
def test_what_is_not_karpathys_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match=r"dataset_coco\.json: images\[0\] has"):
        sources.karpathy(tmp_path, karpathy_json(tmp_path, **changes))


def test_names_find_their_files_in_any_of_several_places(tmp_path):
    """Karpathy's filepath may be part of the place's path or not; a name never finds a file of another folder."""
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.jpg").write_bytes(b"a")
    with zipfile.ZipFile(tmp_path / "train2014.zip", "w") as archive:
        for name in ("train2014/b.jpg", "x/same.jpg", "y/same.jpg"):
            archive.writestr(name, name)
    files = sources.ImageFiles([tmp_path / "val2014", tmp_path / "train2014.zip"])
    assert (
        files.read("val2014/a.jpg") == files.read("a.jpg") == sources.ImageFiles(tmp_path).read("val2014/a.jpg") == b"a"
    )
    assert files.read("train2014/b.jpg") == files.read("b.jpg") == b"train2014/b.jpg"
    with pytest.raises(FileNotFoundError):
        files.read("val2014/b.jpg")
    with pytest.raises(OSError, match="several"):
        files.read("same.jpg")
