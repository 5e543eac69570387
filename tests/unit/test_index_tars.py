"""Tars made by others (img2dataset's, png, webp): read by number like ours, or refused with a clear word."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from captioning.config import Config
from captioning.data.dataset import EvaluationBatches
from captioning.data.transforms import preprocessing_of
from shards import index as shard_index
from shards.errors import InputError
from shards.packing.index_tars import Options, index_tars
from shards.reader import Sample, read_sample
from tests.conftest import module, run_command


def picture(form: str, shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(out, form)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def img2dataset(key: str, caption: str | None, shade: int = 50) -> list[tuple[str, bytes]]:
    """A sample as img2dataset writes it: jpg, json and, where there is a caption, txt."""
    about = {"caption": caption, "url": "http://127.0.0.1/x.jpg", "key": key, "status": "success", "width": 40}
    text = [(f"{key}.txt", caption.encode())] if caption is not None else []
    return [(f"{key}.jpg", picture("JPEG", shade)), (f"{key}.json", json.dumps(about).encode()), *text]


def test_img2datasets_tars(tmp_path):
    """By the command; read by number, verified, and the same as what the stock library reads."""
    samples = [("000000000", "A cat.\n on a mat"), ("000000001", None), ("000000002", "naïve"), ("000000003", "  ")]
    write_tar(tmp_path / "00000.tar", [file for key, caption in samples for file in img2dataset(key, caption)])
    write_tar(tmp_path / "00001.tar", img2dataset("000010000", "A dog.", shade=200))
    (tmp_path / "00000_stats.json").write_text("{}")
    done = run_command(module("launch.pack", "index", tmp_path, "--split", "train"))
    assert done.returncode == 0, done.stderr
    assert "3 images in 2 shard(s)" in done.stdout and "left out: 2 samples without a caption" in done.stdout
    index = shard_index.load(tmp_path / "train.json")
    shard_index.verify(index)
    ours = [read_sample(index, number) for number in range(3)]
    assert [s.captions for s in ours] == [("A cat. on a mat",), ("naïve",), ("A dog.",)]
    assert [s.image_id for s in ours] == ["000000000", "000000002", "000010000"]
    theirs = webdataset.WebDataset([str(s.path) for s in index.shards], shardshuffle=False)
    jpegs = {sample["__key__"]: sample["jpg"] for sample in theirs}
    assert all(sample.image_bytes == jpegs[sample.key] for sample in ours)
    batch = EvaluationBatches(index, preprocessing_of(Config()))[(0, 3)]
    assert not batch.unreadable
    assert [round(float(image.float().mean()), -1) for image in batch.inputs] == [50, 50, 200]
    again = index_tars([tmp_path], "train")  # the same again is the same
    assert again.fingerprint == index.fingerprint


def test_other_images_labels_and_long_names(tmp_path):
    long = "n01440764/" + "x" * 120  # longer than a plain tar header holds
    members = [
        (f"{long}.cls", b"7"),
        (f"{long}.PNG", picture("PNG", 10)),
        (f"{long}.txt", b"A fish."),
        ("b.c/two.webp", picture("WEBP", 90)),
        ("b.c/two.json", json.dumps({"captions": ["One.", " ", "Two."], "image_id": 5, "label": "dog"}).encode()),
        ("nothing.txt", b"no picture"),
        ("._hidden.jpg", b""),
        ("__meta__.json", b"{}"),
    ]
    index = index_tars([write_tar(tmp_path / "deep" / "a.tar", members)], "mixed")
    assert index.path == tmp_path / "deep" / "mixed.json"
    assert index.document["left_out"] == {"samples without an image": 1}
    first, second = (read_sample(index, number) for number in (0, 1))
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert (first.key, first.captions, first.label, first.image_id) == (long, ("A fish.",), "7", long)
    assert (second.key, second.captions, second.label, second.image_id) == ("b.c/two", ("One.", "Two."), "dog", 5)
    assert np.asarray(Image.open(io.BytesIO(first.image_bytes))).mean() == 10
    shard_index.verify(index)


def test_tars_in_several_folders_share_one_index(tmp_path):
    for number in (2, 1):
        write_tar(tmp_path / f"part{number}" / "00000.tar", img2dataset(f"{number}", f"Picture {number}."))
    index = index_tars([tmp_path / "part2", tmp_path / "part1" / "00000.tar"], "train")
    assert index.path == tmp_path / "train.json"
    assert [shard.path.relative_to(tmp_path).as_posix() for shard in index.shards] == [
        "part1/00000.tar",
        "part2/00000.tar",
    ]
    assert [text.key for text in index.texts()] == ["1", "2"]


A, B = img2dataset("a", "A."), img2dataset("b", "B.")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*A[:2], *B, A[2]], r"'a' are interleaved"),
        ([*A, *A], r"a\.jpg is there twice"),
        (img2dataset("a b", "A."), "names with spaces"),
        ([("a.jpg", b""), ("a.json", b"{cut")], "'a' holds a text that cannot be read"),
        ([("a.jpg", b"x")], "No sample of 1 tar"),
    ],
)
def test_what_cannot_be_read_by_number_is_refused(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=message) as error:
        index_tars([tmp_path], "train")
    assert "a.tar" in str(error.value) or "1 tar" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_key_in_two_tars_is_refused(tmp_path):
    write_tar(tmp_path / "1.tar", A)
    write_tar(tmp_path / "2.tar", [*B, *A])
    with pytest.raises(InputError, match=r"a in 1\.tar and 2\.tar"):
        index_tars([tmp_path], "train")
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_and_compressed_tars_are_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [*A, *B]).read_bytes()
    starts = [i for i in range(0, len(whole), 512) if whole[i : i + 5] == b"b.jpg"]
    damaged = {
        "compressed": gzip.compress(whole),
        "cut short": whole[: starts[0]],  # between two samples: tarfile takes it for the end
        "damaged": whole[: starts[0]] + b"x" * 512 + whole[starts[0] + 512 :],
        "no tar": b"no tar at all" * 100,
    }
    for message, data in damaged.items():
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(InputError, match=message):
            index_tars([tmp_path], "train")
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match="compressed"):
        index_tars([tmp_path], "train")


def test_captions_that_are_no_text_are_none(tmp_path):
    """pandas writes a missing caption as NaN."""
    members = [(f"{n}.jpg", picture("JPEG", 50)) for n in range(4)]
    about = ['{"caption": NaN}', '{"captions": 5}', '{"captions": ["A cat.", null]}', '{"caption": "Half \\ud83d"}']
    members += [(f"{n}.json", text.encode()) for n, text in enumerate(about)]
    write_tar(tmp_path / "a.tar", sorted(members))
    index = index_tars([tmp_path], "train")
    assert [text.captions for text in index.texts()] == [("A cat.",), ("Half ?",)]
    assert index.document["left_out"] == {"samples without a caption": 2}


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    """Here a folder stands where the .idx is to be written."""
    write_tar(tmp_path / "a.tar", A)
    (tmp_path / "a.idx.tmp").mkdir()
    with pytest.raises(InputError, match="ln -s"):
        index_tars([tmp_path], "train")


def test_somebodys_json_is_not_overwritten(tmp_path):
    write_tar(tmp_path / "a.tar", A)
    (tmp_path / "captions.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="no shard index"):
        index_tars([tmp_path], "captions")
    assert (tmp_path / "captions.json").read_text() == '{"mine": 1}'
    with pytest.raises(InputError, match="There is no"):
        index_tars([tmp_path / "nowhere"], "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"No \.tar"):
        index_tars([tmp_path / "empty"], "train")


def with_captions(key: str, captions: dict, shade: int = 50) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture("JPEG", shade)), (f"{key}.json", json.dumps(captions).encode())]


@pytest.mark.parametrize(
    ("about", "captions"),
    [
        ({"caption": "A."}, ("A.",)),
        ({"captions": ["A.", "B."]}, ("A.", "B.")),
        ({"text": "A."}, ("A.",)),
        ({"TEXT": "A.", "URL": "x"}, ("A.",)),
        ({"sentences": [{"raw": "A.", "tokens": ["a"]}, {"raw": "B."}]}, ("A.", "B.")),
        ({"raw": ["A.", "B."]}, ("A.", "B.")),
        ({"alt": "A.", "caption": ""}, ("A.",)),
        (["A.", "B."], ("A.", "B.")),
    ],
)
def test_captions_stand_in_many_fields(tmp_path, about, captions):
    write_tar(tmp_path / "a.tar", with_captions("a", about))
    assert index_tars([tmp_path], "train").texts()[0].captions == captions


def test_numbered_texts_are_several_captions(tmp_path):
    texts = [(f"a.{n}.txt", f"Number {n}.".encode()) for n in (0, 1, 10, 2)]
    write_tar(tmp_path / "a.tar", [("a.jpg", picture("JPEG", 9)), *texts])
    index = index_tars([tmp_path], "train")
    assert index.texts()[0].captions == ("Number 0.", "Number 1.", "Number 2.", "Number 10.")
    shard_index.verify(index)


def test_a_field_may_be_named_and_what_there_is_is_shown(tmp_path):
    write_tar(tmp_path / "a.tar", with_captions("a", {"blip": "A cat.", "url": "http://127.0.0.1"}))
    with pytest.raises(InputError, match=r"(?s)a, has \.jpg, \.json and its json:.*blip: 'A cat\.'.*--caption-field"):
        index_tars([tmp_path], "train")
    index = index_tars([tmp_path], "train", options=Options(caption_field="blip"))
    assert index.texts()[0].captions == ("A cat.",)
    shard_index.verify(index)


def test_a_plain_ending_wins_and_that_is_said(tmp_path):
    mask, photo = picture("PNG", 255), picture("JPEG", 50)
    members = [("a.json", b'{"caption": "A."}'), ("a.mask.png", mask), ("a.jpg", photo)]
    write_tar(tmp_path / "a.tar", members)
    index = index_tars([tmp_path], "train")
    assert read_sample(index, 0).image_bytes == photo
    assert index.document["packing"]["remarks"] == {"samples of several images: .jpg was taken": 1}
    shard_index.verify(index)


def test_tars_one_after_another_are_read_whole(tmp_path):
    one, two = write_tar(tmp_path / "1", A), write_tar(tmp_path / "2", B)
    data = one.read_bytes() + two.read_bytes()
    (tmp_path / "a.tar").write_bytes(data)
    index = index_tars([tmp_path / "a.tar"], "train")
    assert [read_sample(index, n).key for n in range(2)] == ["a", "b"]
    assert list(index.document["packing"]["remarks"].values()) == [2]
    shard_index.verify(index)
    (tmp_path / "a.tar").write_bytes(one.read_bytes() + b"rubbish" * 200)
    with pytest.raises(InputError, match=r"is no tar, or was cut short|is damaged"):
        index_tars([tmp_path / "a.tar"], "train")


def test_a_text_of_another_encoding_costs_its_sample_alone(tmp_path):
    bad = [("b.jpg", picture("JPEG", 9)), ("b.txt", "caf\xe9".encode("latin1"))]
    write_tar(tmp_path / "a.tar", [*A, *bad, ("c.jpg", b""), ("c.json", b"{cut")])
    index = index_tars([tmp_path], "train")
    assert [text.key for text in index.texts()] == ["a"]
    assert index.document["left_out"] == {"samples whose text or json cannot be read": 2}
    shard_index.verify(index)


def test_keys_that_begin_anew_get_the_tars_name(tmp_path):
    for part, number in (("x", 0), ("x", 1), ("y", 0)):
        write_tar(
            tmp_path / part / f"0000{number}.tar", img2dataset("000", f"{part}{number}.", 40 * number + len(part))
        )
    write_tar(tmp_path / "y" / "00000.tar", img2dataset("000", "y0.", 200))
    index = index_tars([tmp_path / "x", tmp_path / "y"], "train")
    keys = ["x/00000/000", "x/00001/000", "y/00000/000"]
    assert [text.key for text in index.texts()] == [text.image_id for text in index.texts()] == keys
    assert [read_sample(index, n).key for n in range(3)] == keys
    assert [text.captions for text in index.texts()] == [("x0.",), ("x1.",), ("y0.",)]
    shard_index.verify(index)


def test_images_that_do_not_decode_are_found_when_asked_for(tmp_path):
    broken = [("b.jpg", picture("JPEG", 9)[:300]), ("b.txt", b"Broken.")]
    write_tar(tmp_path / "a.tar", [*A, *broken])
    assert len(index_tars([tmp_path], "train")) == 2
    index = index_tars([tmp_path], "train", options=Options(checkers=2))
    assert [text.key for text in index.texts()] == ["a"]
    (skipped,) = index.document["skipped"]
    assert skipped["image"] == "a.tar: b" and skipped["reason"]
    shard_index.verify(index)
