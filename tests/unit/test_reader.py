"""Reading by number: the sample, or an unreadable sample that keeps its place."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from shards import index as shard_index
from shards import storage
from shards.errors import InputError
from shards.images import open_rgb
from shards.reader import UnreadableSample, read_sample
from shards.storage import outages


@pytest.fixture
def copy(scene_shards, tmp_path):
    """A copy of the shards to damage; nothing of it was read before."""
    shutil.copytree(scene_shards, tmp_path / "shards")
    return tmp_path / "shards"


def test_a_missing_or_cut_shard_is_told_before_anything_is_read(copy):
    index = shard_index.load(copy / "train.json")
    index.check_files()
    tar = index.shards[0].path
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train-000000\.tar has"):
        index.check_files()
    tar.unlink()
    with pytest.raises(InputError, match="is missing"):
        index.check_files()


def test_what_cannot_be_read_keeps_its_place(copy):
    index = shard_index.load(copy / "train.json")
    whole = [read_sample(index, number) for number in range(len(index))]
    tar = index.shards[0].path
    extents = shard_index.read_extents(index.shards[0])
    tar.write_bytes(tar.read_bytes()[: extents[30].offset + 10])
    storage.close_files()
    cut = [read_sample(index, number) for number in range(len(index))]
    assert cut[:30] == whole[:30]
    assert all(isinstance(sample, UnreadableSample) for sample in cut[30:])
    assert cut[30].key == whole[30].key
    assert cut[30].offset == extents[30].offset
    assert tar.name in str(cut[30]) and "ends after" in str(cut[30])


@pytest.mark.parametrize("content", ["", "{}", '{"__kind__": "other", "shardlist": []}', "[1]"])
def test_what_is_no_index_is_refused(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(InputError, match="not a shard index"):
        shard_index.load(path)
    with pytest.raises(InputError, match=r"captioning pack"):
        shard_index.load(tmp_path / "nowhere.json")


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_MOST_OPEN", 3)
    storage.close_files()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(20):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 9)
        assert storage.read_file(path, 2, 3) == bytes([number]) * 3
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    assert storage.read_file(tmp_path / "0", 0, 9) == bytes(9)


def test_an_idx_of_another_tar_is_refused(copy):
    index = shard_index.load(copy / "train.json")
    idx = index.shards[0].path.with_suffix(".idx")
    idx.write_text("\n".join(idx.read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match="Copy them again"):
        read_sample(index, 0)


@pytest.mark.parametrize("line", ["nonsense", "jpg x 7 key.jpg", "jpg 0 key.jpg", ""])
def test_an_idx_of_nonsense_is_refused(copy, line):
    index = shard_index.load(copy / "train.json")
    idx = index.shards[0].path.with_suffix(".idx")
    idx.write_text("\n".join([line if i == 3 else old for i, old in enumerate(idx.read_text().split("\n"))]))
    with pytest.raises(InputError, match=r"train-000000\.idx"):
        read_sample(index, 2)


def test_a_flipped_bit_is_found_also_where_the_image_still_decodes(copy):
    index = shard_index.load(copy / "train.json")
    extent = shard_index.read_extents(index.shards[0])[5]
    data = bytearray(index.shards[0].path.read_bytes())
    data[extent.offset + extent.size - 40] ^= 1
    open_rgb(bytes(data[extent.offset : extent.offset + extent.size]))  # no complaint
    index.shards[0].path.write_bytes(data)
    read = [read_sample(index, number) for number in range(len(index))]
    assert [number for number, sample in enumerate(read) if isinstance(sample, UnreadableSample)] == [5]
    assert (read[5].key, read[5].offset) == (extent.key, extent.offset) and "not those that were packed" in str(read[5])


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EIO])
def test_a_network_file_system_that_forgot_a_file_is_asked_again(copy, monkeypatch, number):
    """The descriptor is of no use any more: the file must be opened again."""
    monkeypatch.setattr(outages, "FIRST_WAIT", 0.001)
    index = shard_index.load(copy / "train.json")
    whole = [read_sample(index, n) for n in range(3)]
    stale = storage._descriptor(index.shards[0].local)
    calls = []

    def pread(file: int, size: int, offset: int, real=os.pread) -> bytes:
        calls.append(file)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        return real(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert [read_sample(index, n) for n in range(3)] == whole
    assert calls[0] == stale and len(calls) == 4


def test_a_disk_that_is_unmounted_is_waited_for_and_loses_no_image(copy, monkeypatch):
    monkeypatch.setattr(outages, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(outages, "_patience", 0.05)
    index = shard_index.load(copy / "train.json")
    whole = read_sample(index, 5)
    storage.close_files()
    away = copy.rename(copy.with_name("away"))
    with pytest.raises(InputError, match="storage_patience_seconds"):
        read_sample(index, 5)
    copy.mkdir()  # as a mount point is while nothing is mounted
    monkeypatch.setattr(outages, "_sleep", lambda _: copy.is_dir() and (copy.rmdir(), away.rename(copy)))
    monkeypatch.setattr(outages, "_patience", 60.0)
    assert read_sample(index, 5) == whole


def test_a_shard_that_somebody_deleted_is_unreadable_samples(copy):
    index = shard_index.load(copy / "train.json")
    read_sample(index, 5)
    storage.close_files()
    index.shards[0].local.unlink()
    unreadable = read_sample(index, 5)
    assert isinstance(unreadable, UnreadableSample) and "No such file" in unreadable.reason
