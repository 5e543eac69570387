"""A packing shared by several machines, killed or not, is the very bytes that one machine would have made."""

import io
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

from shards import sources
from shards.errors import InputError
from shards.packing.merge import merge, splits_in
from shards.packing.packer import pack, pack_part
from shards.packing.plan import Part, Settings
from shards.sources import scenes
from tests.conftest import ROOT, module, write_coco
from tests.system.test_pack import files_of, jpeg


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    images, captions = scenes.write(tmp_path_factory.mktemp("drawn"), "train", 60, seed=1)
    (sorted(images.iterdir())[5]).write_bytes(b"no picture")
    return sources.coco(images, captions)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("shards.packing.plan.TAR_OVERHEAD", 16_000_000)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.packing.plan.TAR_OVERHEAD", 16_000_000)
        pack(source, "train", out := tmp_path_factory.mktemp("whole"), Settings())
    return files_of(out)


def test_parts_in_one_folder_at_the_same_time(source, whole, tmp_path):
    parts = [Part(number, 3) for number in (1, 2, 3)]
    with ThreadPoolExecutor() as threads:
        made = list(threads.map(lambda part: pack_part(source, "train", tmp_path / "out", Settings(), part, 1), parts))
    assert sorted(p.name for part in made for p in part) == [name for name in whole if name.endswith(".tar")]
    assert not (tmp_path / "out" / "train.json").exists()
    index = merge("train", tmp_path / "out")
    assert files_of(tmp_path / "out") == whole
    assert len(index.document["skipped"]) == 1
    merge("train", tmp_path / "out")  # again is nothing to do
    assert files_of(tmp_path / "out") == whole


def test_parts_in_folders_of_their_own(source, whole, tmp_path):
    folders = [tmp_path / str(number) for number in range(7)]  # more parts than shards: some have nothing to do
    for number, folder in enumerate(folders, start=1):
        pack_part(source, "train", folder, Settings(), Part(number, 7), workers=2)
    assert splits_in(folders) == ["train"]
    with pytest.raises(InputError, match=r"shards are missing:\n  train-000000\.tar"):
        merge("train", tmp_path / "out", folders[1:])
    assert not (tmp_path / "out").exists()
    merge("train", tmp_path / "out", folders)
    assert files_of(tmp_path / "out") == whole


def test_parts_of_other_data_or_settings_are_not_joined(source, tmp_path):
    pack_part(source, "train", tmp_path / "1", Settings(), Part(1, 2))
    pack_part(source, "train", tmp_path / "2", Settings(quality=50), Part(2, 2))
    with pytest.raises(InputError, match="other images, captions or settings"):
        merge("train", tmp_path / "out", [tmp_path / "1", tmp_path / "2"])
    with pytest.raises(InputError, match="No packed shard"):
        merge("val", tmp_path / "out", [tmp_path / "1"])
    pack_part(source, "train", tmp_path / "3", Settings(), Part(2, 2))
    tar = next((tmp_path / "3").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=f"{tar.name} is damaged"):
        merge("train", tmp_path / "out", [tmp_path / "1", tmp_path / "3"])


def test_another_shuffle_seed_packs_the_same_images_in_another_order(source, tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    first, again, other = (
        pack(source, "train", tmp_path / name, Settings(shuffle_seed=seed)) for name, seed in seeds.items()
    )
    keys = [[text.key for text in index.texts()] for index in (first, again, other)]
    assert keys[0] == keys[1] != keys[2]
    assert sorted(keys[0]) == sorted(keys[2]) != keys[0]
    assert other.document["packing"]["shuffle_seed"] == 1


def test_a_mended_image_does_not_change_where_shards_are_cut(tmp_path, monkeypatch):
    """The estimate of how many images fit a shard is made once, even if it was made without an image mended since."""
    monkeypatch.setattr("shards.packing.plan.TAR_OVERHEAD", 300_000)
    images, captions = write_coco(tmp_path / "coco", {f"{n}.jpg": [f"Picture {n}."] for n in range(8)}, jpeg())
    (images / "3.jpg").write_bytes(b"no picture")
    source = sources.coco(images, captions)
    first = pack(source, "train", tmp_path / "out", Settings(short_side=0, shard_mb=1))
    assert [shard.nsamples for shard in first.shards] in ([3, 3, 1], [3, 2, 2], [2, 3, 2])
    (images / "3.jpg").write_bytes(jpeg((2000, 2000), quality=95) + b"\0" * 3_000_000)  # would make shards of one image
    settings = Settings(short_side=0, shard_mb=1)
    assert len(pack(source, "train", tmp_path / "out", settings)) == 7, "a finished shard stays unless asked for"
    assert len(pack(source, "train", tmp_path / "out", settings, retry_skipped=True)) == 8


def test_a_killed_part_leaves_no_process_and_is_finished_by_the_same_command(tmp_path, monkeypatch):
    """SIGKILL to the packing process alone: its workers end with it; the same command and merge make the same bytes."""
    monkeypatch.undo()
    noise = io.BytesIO()
    Image.effect_noise((400, 400), 90).convert("RGB").save(noise, "JPEG", quality=95)
    many = {f"{number:04d}.jpg": ["Noise."] for number in range(80)}
    images, captions = write_coco(tmp_path / "coco", many, noise.getvalue())
    command = ["coco", "--images", images, "--captions", captions, "--split", "train"]
    out = tmp_path / "out"
    part = module("launch.pack", *command, "--shard-mb", 1, "--workers", 2, "--out", out, "--part", "1/2")
    process = subprocess.Popen(part, cwd=ROOT)
    while not list(out.glob("*.tar*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert children and not alive
    subprocess.run(part, cwd=ROOT, check=True)
    source, settings = sources.coco([images], captions), Settings(shard_mb=1)
    pack_part(source, "train", out, settings, Part(2, 2), workers=2)
    merge("train", out)
    pack(source, "train", tmp_path / "whole", settings, workers=2)
    assert files_of(out) == files_of(tmp_path / "whole")
