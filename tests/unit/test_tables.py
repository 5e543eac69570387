"""CSV, Flickr's token files and class folders, as they come: quoting, headers, lists, labels, and what is refused."""

import csv
import io
import json
import zipfile

import pytest
from PIL import Image

from launch import pack as command
from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.sources.columns import Chosen
from shards.sources.table import Reading, metadata_splits


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


EXPECTED = {"a.jpg": ("A cat.", "Another."), "b.png": ("A dog, running.",)}


@pytest.mark.parametrize(
    "text",
    [
        'image\tcaption\na.jpg\t"A cat."\na.jpg\tAnother.\nb.png\t"A dog, running."\n',  # quoted, in tabs
        'image, caption\na.jpg, "A cat."\na.jpg, "Another."\nb.png, "A dog, running."\n',  # a blank before the quote
        "image,caption\ra.jpg,A cat.\ra.jpg,Another.\rb.png,A dog, running.\r",  # ends of lines as old Macs have them
        "sep=;\r\nimage;caption\r\na.jpg;A cat.\r\na.jpg;Another.\r\nb.png;A dog, running.\r\n",  # Excel
        "image,caption\na.jpg,A cat.\na.jpg,Another.\nb.png,A dog, running.\n".encode("utf-16"),
        "image,caption\na.jpg,A cat.\na.jpg,Another.\nb.png,A dog, running.\n".encode("utf-16-le"),
        'image,captions\na.jpg,"[""A cat."", ""Another.""]"\nb.png,"[""A dog, running.""]"\n',  # JSON
        "image,captions\na.jpg,\"['A cat.', 'Another.']\"\nb.png,\"['A dog, running.']\"\n",  # Python, as pandas does
        "image,captions\na.jpg,\"['A cat.' 'Another.']\"\nb.png,\"['A dog, running.']\"\n",  # NumPy
        'image,caption_1,caption_2\na.jpg,A cat.,Another.\nb.png,"A dog, running.",\n',
        '{"image": "a.jpg", "caption": "A cat."}\n{"image": "a.jpg", "caption": "Another."}\n'
        '{"image": "b.png", "caption": "A dog, running."}\n',
        '[{"image": "a.jpg", "caption": ["A cat.", "Another."]}, {"caption": "A dog, running.", "image": "b.png"}]',
        '{"data": [{"file_name": "a.jpg", "text": ["A cat.", "Another."]}, {"file_name": "b.png", "text": '
        '["A dog, running."]}]}',
        '{"a.jpg": ["A cat.", "Another."], "b.png": "A dog, running."}',
        '{"image": "a.jpg", "sentences": [{"raw": "A cat."}, {"raw": "Another."}]}\n'
        '{"image": "b.png", "sentences": [{"raw": "A dog, running."}]}\n',
    ],
)
def test_more_layouts_say_the_same(tmp_path, text):
    assert captions_of(tmp_path, text) == EXPECTED


def test_a_list_like_caption_that_is_none_stays(tmp_path):
    text = "image\tcaption\na.jpg\t[blurred] a [thing]\nb.jpg\t[]\n"
    assert captions_of(tmp_path, text) == {"a.jpg": ("[blurred] a [thing]",)}


def test_unquoted_quotation_marks_in_tabs_stay(tmp_path):
    text = 'image\tcaption\na.jpg\t"Stop" says the sign\nb.jpg\tA 5" screen\nc.jpg\t"Half\n'
    assert captions_of(tmp_path, text) == {
        "a.jpg": ('"Stop" says the sign',),
        "b.jpg": ('A 5" screen',),
        "c.jpg": ('"Half',),
    }


def test_escaped_quotes_and_windows_paths(tmp_path):
    text = 'image,caption\nsub\\a.jpg,"A \\"red\\" car, parked"\n'
    assert captions_of(tmp_path, text) == {"sub/a.jpg": ('A "red" car, parked',)}


@pytest.mark.parametrize("library", ["csv", "pandas-like"])
def test_what_the_csv_module_writes_is_read_back(tmp_path, library):
    """pandas writes with this very module, a first column of row numbers before it."""
    captions = ['He said "no".', "Two\nlines", "a\tb, c;d|e", " 'single' ", "[1] and [2]"]
    for delimiter in ",\t;|":
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=delimiter)
        number = [""] if library == "pandas-like" else []
        writer.writerow([*number, "image", "caption"])
        writer.writerows([*([n] if number else []), f"{n}.jpg", caption] for n, caption in enumerate(captions))
        found = captions_of(tmp_path, out.getvalue())
        assert found == {f"{n}.jpg": (" ".join(caption.split()),) for n, caption in enumerate(captions)}, delimiter


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), "it is a zip"),
        (b"\x1f\x8b" + bytes(40), "compressed"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG image.*--images"),
        (bytes(257) + b"ustar" + bytes(250), "a tar.*pack tars"),
        (b"\x80\x04\x95" + bytes(40), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b'{"images": [], "annotations": []}', "pack coco"),
        (b'{"images": [{"sentences": []}]}', "pack karpathy"),
        (b'{"shardlist": []}', "packed split"),
        (b'[{"picture": "a.jpg", "words": "x"}]', "--image-column"),
        (b'{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "capt', "line 2 is not JSON"),
        (b'{"image": "a.jpg", "caption": "x"}\n{"caption": "y"}\n', "row 2 names no image"),
        ("image,caption\na.jpg,caf\xe9\n".encode("cp1252"), "--encoding"),
        (b"image,caption,split\na.jpg,A dog, running,train\n", "line 2: 4 cells, and 3 columns"),
        (b"image,caption\nhttps://127.0.0.1/a.jpg,x\n", "on the web"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, message):
    with pytest.raises(InputError, match=f"(?s){message}") as error:
        captions_of(tmp_path, content)
    assert "iconv" not in str(error.value)


def test_columns_and_an_encoding_may_be_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("picture,words\na.jpg,caf\xe9\n".encode("cp1252"))
    reading = Reading(Chosen("picture", "words"), "cp1252")
    (source,) = sources.table_splits([tmp_path], [path], reading=reading).values()
    assert source.records[0].captions == ("café",)


def test_a_split_column_is_obeyed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("image,caption,split\na.jpg,A.,train\na.jpg,,train\nb.jpg,B.,restval\nc.jpg,C.,val\nd.jpg,D.,\n")
    splits = sources.table_splits([tmp_path], [path])
    assert {name: [r.image for r in source.records] for name, source in splits.items()} == {
        "train": ["a.jpg", "b.jpg"],
        "val": ["c.jpg"],
    }
    assert splits["train"].left_out == {"captions without text": 1, "images in no split": 1}
    path.write_text("image,caption,split\na.jpg,A.,train\na.jpg,B.,val\n")
    with pytest.raises(InputError, match=r"a\.jpg is in two splits, train and val"):
        sources.table_splits([tmp_path], [path])
    path.write_text("image,caption,split\na.jpg,A.,half a pear\n")
    with pytest.raises(InputError, match="about something else"):
        sources.table_splits([tmp_path], [path])


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


def test_metadata_folders_as_hugging_face_has_them(tmp_path):
    for split, line in (("train", '{"file_name": "a.png", "text": "A."}'), ("test", "")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(picture(9))
        if line:
            (tmp_path / split / "metadata.jsonl").write_text(line)
        else:
            (tmp_path / split / "metadata.csv").write_text("file_name,text\na.png,T.\n")
    splits = metadata_splits(tmp_path)
    assert {name: source.records[0].captions for name, source in splits.items()} == {"train": ("A.",), "test": ("T.",)}
    assert sources.ImageFiles(splits["train"].images).read("a.png") == picture(9)
    assert set(metadata_splits(tmp_path / "train")) == {""}
    with pytest.raises(InputError, match=r"metadata\.csv"):
        metadata_splits(tmp_path / "nowhere")


def test_parquet_with_names_and_with_images(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet is read where pyarrow is installed")
    import pyarrow
    from pyarrow import parquet

    captions = [["A cat.", "Another."], ["A dog, running."]]
    names = pyarrow.table({"image": ["a.jpg", "b.png"], "captions": captions})
    parquet.write_table(names, tmp_path / "names.parquet")
    source = sources.table(tmp_path, tmp_path / "names.parquet")
    assert {record.image: record.captions for record in source.records} == EXPECTED
    images = [{"bytes": picture(shade), "path": "../x.png"} for shade in (1, 2)]
    parquet.write_table(pyarrow.table({"image": images, "caption": captions}), tmp_path / "images.parquet")
    (tmp_path / "scratch").mkdir()
    (held,) = sources.table_splits(
        [], [tmp_path / "images.parquet"], reading=Reading(scratch=tmp_path / "scratch")
    ).values()
    files = sources.ImageFiles(held.images)
    assert [files.read(record.image) for record in held.records] == [picture(1), picture(2)]
    with pytest.raises(InputError, match="holds the images themselves"):
        sources.table(tmp_path, tmp_path / "images.parquet")
    (tmp_path / "names.parquet").write_bytes((tmp_path / "names.parquet").read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        sources.table(tmp_path, tmp_path / "names.parquet")


def test_dividing_keeps_alike_images_together(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}.png").write_bytes(b"image %d" % (number // 2))  # two files of the same bytes each
    path = tmp_path / "t.csv"
    path.write_text("image,caption\n" + "".join(f"{n}.png,One.\n{n}.png,Two.\n" for n in range(300)))
    whole = sources.table(tmp_path, path)
    splits = sources.divide(whole, {"train": 0.8, "val": 0.1, "test": 0.1})
    of_image = {int(r.image[:-4]): split for split, source in splits.items() for r in source.records}
    assert len(of_image) == 300 and all(of_image[n] == of_image[n + 1] for n in range(0, 300, 2))
    sizes = {split: len(source.records) for split, source in splits.items()}
    assert 200 < sizes["train"] < 270 and sizes["val"] > 8 and sizes["test"] > 8
    fewer = sources.Source(tmp_path, whole.records[:100], {})
    again = sources.divide(fewer, {"train": 0.8, "val": 0.1, "test": 0.1})
    assert all(of_image[int(r.image[:-4])] == split for split, source in again.items() for r in source.records)
    with pytest.raises(InputError, match="no image for b"):
        sources.divide(fewer, {"a": 0.999999, "b": 0.000001})


def test_the_commands_names_of_splits(tmp_path, monkeypatch, capsys):
    """`csv` is another name of `table`; a split is named, divided, or the table's own."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        (images / f"{number}.png").write_bytes(picture(20 * number))
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n}.png,A picture.\n" for n in range(12)))

    def packed(name: str, *options: str) -> None:
        common = ["--images", str(images), "--csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["pack", name, *common, "--workers", "1", *options])
        command.main()

    packed("csv", "--splits", "a=0.5,b=0.5")
    assert sum(len(shard_index.load(tmp_path / "out" / f"{name}.json")) for name in "ab") == 12
    with pytest.raises(InputError, match="--split NAME is wanted"):
        packed("table")
    with pytest.raises(SystemExit):
        packed("table", "--splits", "a=0.5,b=0.6")
    assert "add up to 1" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("image,caption,split\n0.png,A.,train\n1.png,B.,val\n")
    with pytest.raises(InputError, match="splits are train, val"):
        packed("table", "--split", "test")
    with pytest.raises(InputError, match="splits of its own"):
        packed("table", "--splits", "a=0.5,b=0.5")
    packed("table", "--split", "val")
    assert not (tmp_path / "out" / "train.json").exists()
