"""Packing: the same bytes however it was done, nothing half-written, and shards that others read."""

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import webdataset
from PIL import Image

from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.files import sha256_of
from shards.packing.packer import Settings, pack
from shards.reader import read_sample
from shards.sources import scenes
from tests.conftest import ROOT, module, write_coco


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return scenes.write(tmp_path_factory.mktemp("drawn"), "train", 60, seed=1)


def jpeg(size=(40, 30), mode="RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 90).save(out, "JPEG", **options)
    return out.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pack_small(drawn, out, workers=1, **options):
    return pack(sources.coco(*drawn), "train", out, Settings(short_side=0), workers, **options)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Several shards from a few scenes: a shard is at least a megabyte, so let each sample seem large."""
    monkeypatch.setattr("shards.packing.plan.TAR_OVERHEAD", 16_000_000)


def test_any_number_of_workers_makes_the_same_bytes(drawn, tmp_path):
    index = pack_small(drawn, tmp_path / "one", workers=1)
    pack_small(drawn, tmp_path / "three", workers=3)
    assert len(index.shards) > 2
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


def test_the_stock_library_reads_the_same_keys_and_captions(drawn, tmp_path):
    index = pack_small(drawn, tmp_path / "out")
    urls = [str(shard.path) for shard in index.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    ours = [read_sample(index, number) for number in range(len(index))]
    texts = index.texts()
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in ours] == [text.key for text in texts]
    assert [tuple(sample["json"]["captions"]) for sample in theirs] == [sample.captions for sample in ours]
    assert [text.captions for text in texts] == [sample.captions for sample in ours]
    assert all(sample["jpg"].size == (scenes.SIZE, scenes.SIZE) for sample in theirs)
    assert {sample.image_id for sample in ours} == set(range(60))


def test_the_idx_points_at_the_bytes(drawn, tmp_path):
    shard = pack_small(drawn, tmp_path / "out").shards[0]
    header, *lines = shard.path.with_suffix(".idx").read_text().splitlines()
    assert header == f"v1.2 {shard.nsamples}"
    data = shard.path.read_bytes()
    with tarfile.open(shard.path) as archive:
        for line in lines:
            fields = line.split(" ")
            for ext, offset, size, name in zip(*[iter(fields)] * 4, strict=True):
                assert name.endswith(f".{ext}")
                assert data[int(offset) : int(offset) + int(size)] == archive.extractfile(name).read()


def test_the_index_is_wids_and_knows_its_bytes(drawn, tmp_path):
    index = pack_small(drawn, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "train.json").read_text())
    assert document["__kind__"] == "wids-shard-index-v1"
    for entry in document["shardlist"]:
        path = tmp_path / "out" / entry["url"]
        assert entry["filesize"] == path.stat().st_size
        assert entry["sha256"] == sha256_of(path)
    assert sum(entry["nsamples"] for entry in document["shardlist"]) == len(index) == 60
    shard_index.verify(index)


def test_a_killed_packing_is_finished_by_the_same_command(tmp_path, monkeypatch):
    """SIGKILL in the middle of many images; the same command again makes the very bytes of one that was not killed."""
    monkeypatch.undo()
    noise = io.BytesIO()
    Image.effect_noise((500, 500), 90).convert("RGB").save(noise, "JPEG", quality=95)
    many = {f"{number:04d}.jpg": ["Noise."] for number in range(200)}
    images, captions = write_coco(tmp_path / "coco", many, noise.getvalue())
    command = ["coco", "--images", images, "--captions", captions, "--split", "train", "--shard-mb", 1, "--workers", 2]
    killed = tmp_path / "killed"
    command = module("launch.pack", *command, "--out", killed)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not list(killed.glob("*.tar")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "train.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.tar")}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    pack(sources.coco([images], captions), "train", tmp_path / "whole", Settings(shard_mb=1), workers=2)
    assert files_of(killed) == files_of(tmp_path / "whole")
    assert finished == {name: (killed / name).stat().st_mtime_ns for name in finished}, (
        "a finished shard was made again"
    )


def test_unreadable_images_are_listed_and_skipped(tmp_path):
    images, captions = write_coco(tmp_path / "coco", {f"{n}.jpg": [f"Picture {n}."] for n in range(8)}, jpeg())
    (images / "2.jpg").write_bytes(b"this is no picture")
    (images / "5.jpg").write_bytes(jpeg((300, 300), quality=95)[:2000])
    (images / "7.jpg").unlink()
    index = pack(sources.coco(images, captions), "train", tmp_path / "out", Settings())
    assert len(index) == 5
    reasons = {entry["image"]: entry["reason"] for entry in index.document["skipped"]}
    assert set(reasons) == {"2.jpg", "5.jpg", "7.jpg"}
    assert reasons["7.jpg"] == "file not found"
    assert "truncated" in reasons["5.jpg"]


def test_strict_refuses_them_and_leaves_nothing(tmp_path):
    images, captions = write_coco(tmp_path / "coco", {f"{n}.jpg": [f"Picture {n}."] for n in range(8)}, jpeg())
    (images / "3.jpg").write_bytes(b"this is no picture")
    with pytest.raises(InputError, match=r"3\.jpg"):
        pack(sources.coco(images, captions), "train", tmp_path / "out", Settings(), strict=True)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_or_a_lost_worker_loses_no_finished_shard(drawn, tmp_path):
    """Here a folder stands where the second shard is to be written, or a worker dies in the middle of it."""
    pack_small(drawn, tmp_path / "whole")
    out = tmp_path / "out"
    (out / "train-000001.tar.tmp").mkdir(parents=True)
    with pytest.raises(InputError, match="the same command makes the rest"):
        pack_small(drawn, out)
    (out / "train-000001.tar.tmp").rmdir()
    assert (out / "train-000000.tar").exists() and not (out / "train-000001.tar").exists()

    def lose_a_worker(done: int, total: int) -> None:
        if done == 26:
            me = psutil.Process()
            for worker in set(me.children(recursive=True)) - set(me.children()):  # children of the fork server
                worker.kill()

    with pytest.raises(InputError, match="fewer --workers"):
        pack_small(drawn, out, on_progress=lose_a_worker)
    assert not list(out.glob("*.tmp"))
    pack_small(drawn, out)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_no_readable_image_leaves_nothing(tmp_path):
    images, captions = write_coco(tmp_path / "coco", {"1.jpg": ["x"], "2.jpg": ["y"]}, b"no picture")
    with pytest.raises(InputError, match="None of the 2 images"):
        pack(sources.coco(images, captions), "train", tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


def test_another_packing_in_the_folder_is_not_overwritten(drawn, tmp_path):
    pack_small(drawn, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(InputError, match="already holds split 'train'"):
        pack(sources.coco(*drawn), "train", tmp_path / "out", Settings(quality=50))
    assert files_of(tmp_path / "out") == before
    pack_small(drawn, tmp_path / "out")  # the same one again is nothing to do
    assert files_of(tmp_path / "out") == before


def test_tars_of_others_are_neither_overwritten_nor_deleted(drawn, tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    for strict in (False, True):
        with pytest.raises(InputError, match=r"train-000000\.tar"):
            pack_small(drawn, tmp_path, strict=strict)
    assert files_of(tmp_path) == {"train-000000.tar": b"precious"}


def test_somebodys_json_is_not_overwritten(drawn, tmp_path):
    """Captions are often called train.json themselves."""
    precious = {"train.json": Path(drawn[1]).read_bytes()}
    (tmp_path / "train.json").write_bytes(precious["train.json"])
    with pytest.raises(InputError, match="no shard index"):
        pack_small(drawn, tmp_path)
    assert files_of(tmp_path) == precious


def test_the_same_command_twice_at_once_is_refused_and_harms_nothing(drawn, tmp_path):
    pack_small(drawn, tmp_path / "whole")
    refused = []

    def start_another(done: int, total: int) -> None:
        if done == 26:  # in the middle of a shard
            with pytest.raises(InputError, match="being written by another packing"):
                pack_small(drawn, tmp_path / "out")
            refused.append(done)

    pack_small(drawn, tmp_path / "out", on_progress=start_another)
    assert refused and files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_strict_keeps_finished_shards(drawn, tmp_path):
    images, captions = write_coco(tmp_path / "coco", {f"{n}.jpg": [f"Picture {n}."] for n in range(60)}, jpeg())
    source, out = sources.coco(images, captions), tmp_path / "out"
    pack(source, "train", tmp_path / "whole", Settings())
    last = read_sample(shard_index.load(tmp_path / "whole" / "train.json"), 59).key
    (images / f"{last}.jpg").write_bytes(b"this is no picture")
    with pytest.raises(InputError, match=rf"{last}\.jpg"):
        pack(source, "train", out, Settings(), strict=True)
    assert (out / "train-000000.tar").exists()
    (images / f"{last}.jpg").write_bytes(jpeg())
    pack(source, "train", out, Settings(), strict=True)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_mended_images_are_taken_up_and_strict_looks_again(tmp_path):
    images, captions = write_coco(tmp_path / "coco", {f"{n}.jpg": [f"Picture {n}."] for n in range(8)}, jpeg())
    (images / "3.jpg").write_bytes(b"this is no picture")
    source = sources.coco(images, captions)
    first = pack(source, "train", tmp_path / "out", Settings())
    assert first.document["skipped"] == [{"image": "3.jpg", "reason": "not an image of a known format"}]
    with pytest.raises(InputError, match=r"3\.jpg"):
        pack(source, "train", tmp_path / "out", Settings(), strict=True)
    shard_index.verify(first)  # what was there before is still there
    (images / "3.jpg").write_bytes(jpeg())
    assert len(pack(source, "train", tmp_path / "out", Settings(), strict=True)) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "idx", "no idx", "crc32", "captions", "a caption"])
def test_verify_finds_every_damage(drawn, tmp_path, damage):
    index = pack_small(drawn, tmp_path / "out")
    tar = index.shards[1].path
    match damage:
        case "flip":
            data = bytearray(tar.read_bytes())
            data[len(data) // 2] ^= 1
            tar.write_bytes(data)
        case "cut":
            tar.write_bytes(tar.read_bytes()[:-512])
        case "remove":
            tar.unlink()
        case "idx":
            path = tar.with_suffix(".idx")
            path.write_text(path.read_text().replace(" 512 ", " 513 ", 1))
        case "no idx":
            tar.with_suffix(".idx").unlink()
        case "crc32":
            path = tar.with_suffix(".crc32")
            path.write_bytes(b"\0" + path.read_bytes()[1:])
        case "a caption":
            path = shard_index.captions_path(tar)
            path.write_text(path.read_text().replace("There is a", "There was a", 1))
        case "captions":
            shard_index.captions_path(tar).write_text("{}")
    shard_index.read_extents.cache_clear()
    with pytest.raises(InputError, match=tar.stem):
        shard_index.verify(shard_index.load(index.path))


def test_the_longer_side_is_a_packing_of_its_own(drawn, tmp_path):
    """Recorded in place of the shorter one; the same again changes nothing, another is refused."""
    source, long_side = sources.coco(*drawn), Settings(long_side=48)
    index = pack(source, "train", tmp_path, long_side)
    assert index.document["packing"]["long_side"] == 48 and "short_side" not in index.document["packing"]
    sizes = {Image.open(io.BytesIO(read_sample(index, n).image_bytes)).size for n in range(len(index))}
    assert {max(size) for size in sizes} == {48}
    shard_index.verify(index)
    before = files_of(tmp_path)
    pack(source, "train", tmp_path, long_side)
    with pytest.raises(InputError, match="already holds split 'train'"):
        pack(source, "train", tmp_path, Settings(long_side=40))
    assert files_of(tmp_path) == before


def test_an_older_packing_by_the_shorter_side_is_the_same_as_ever(drawn, tmp_path):
    """What NAME.json says of it has not changed, so packings that earlier versions began go on."""
    pack_small(drawn, tmp_path)
    beside = json.loads((tmp_path / "train-000000.captions.json").read_text())
    assert beside["made_by"]["packing"] == {"short_side": 0, "quality": 90, "shard_mb": 256, "shuffle_seed": 0}
