"""Shards on other machines: from whatever serves them the stream is the disk's, or samples are reported unreadable."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from captioning.config import from_dict
from captioning.data import captions as encoded
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import train_dataset
from captioning.data.splits import open_split
from captioning.data.transforms import Preprocessing
from shards import index as shard_index
from shards import reader, storage
from shards.errors import InputError
from shards.index import Index
from shards.reader import UnreadableSample, read_samples
from shards.sources import scenes
from shards.storage import cache, outages, streams
from shards.storage import http_ranges as ranges
from shards.storage.cache import Cache
from shards.storage.urls import Url, place_of, sibling
from tests.conftest import module, run_command, settings, train_command
from tests.distributed.test_training import assert_each_image_of_each_epoch_once
from tests.servers import Misbehaving, misbehaving, nginx
from tests.system.test_pack import pack_small


@pytest.fixture(scope="module")
def server(scene_shards, tmp_path_factory):
    with nginx(scene_shards, tmp_path_factory.mktemp("nginx") / "home") as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing remembered from another test, and no long waits."""
    monkeypatch.setattr(outages, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(outages, "_patience", 0.5)
    monkeypatch.setattr(ranges, "_seconds", lambda retry_after: 0.0)
    monkeypatch.setattr(storage, "_without_ranges", set())
    monkeypatch.setattr(cache, "_mended", {})
    monkeypatch.setattr(cache, "_failed", {})
    shard_index.read_extents.cache_clear()


@pytest.fixture(scope="module")
def stream_of(scene_shards, tmp_path_factory):
    """Index -> all micro-batches of an epoch and a half, as rank 1 of 2 gets them."""
    folder = tmp_path_factory.mktemp("encoded")
    encoded.encode(shard_index.load(scene_shards / "train.json"), folder, threshold=1, max_words=20)

    def stream(index: Index, workers: int = 0):
        sizes = {"global_batch_size": 8, "micro_batch_size": 3, "rank": 1, "world_size": 2, "num_workers": workers}
        batches = train_dataset(index, EncodedCaptions(folder), Preprocessing(40, 32, True), 5, **sizes)
        return [batch for step in batches.steps(0, 9) for batch in step]

    return stream


def assert_same_stream(a, b):
    assert [x.keys for x in a] == [x.keys for x in b]
    for x, y in zip(a, b, strict=True):
        assert not x.unreadable and not y.unreadable
        assert torch.equal(x.inputs, y.inputs)
        ours, theirs = x.captions, y.captions
        assert torch.equal(ours.token_ids, theirs.token_ids) and torch.equal(ours.image_index, theirs.image_index)


@pytest.mark.parametrize(("path", "workers"), [("split", 0), ("split", 2), ("moved", 0), ("whole", 2)])
def test_the_stream_over_http_is_the_local_one(server, scene_shards, stream_of, tmp_path, path, workers):
    local = shard_index.load(scene_shards / "train.json")
    remote = shard_index.load(f"{server.url}/{path}/train.json", Cache(tmp_path))
    remote.check_files()
    before = len(server.requests())
    assert_same_stream(stream_of(remote, workers), stream_of(local))
    tars = [line for line in server.requests()[before:] if line[1] == f"/{path}/train-000000.tar"]
    if path == "split":
        assert {status for _, _, status, *_ in tars} == {"206"} and not list(tmp_path.iterdir())
        assert len({connection for *_, connection in tars}) <= reader._REQUESTS * max(1, workers), "kept alive"
    if path == "whole":
        assert sum(asked == "-" for _, _, _, asked, _ in tars) == 1, "both loaders wait for one download"
        assert [file.name for file in Cache(tmp_path).home.glob("*.tar")] == [f"{local.shards[0].sha256}.tar"]


def test_near_neighbours_come_in_one_request(server, scene_shards):
    remote = shard_index.load(f"{server.url}/split/train.json")
    local = shard_index.load(scene_shards / "train.json")
    before = len(server.requests(".tar"))
    numbers = [5, 40, 4, 6, 5, 0, *range(10, 30)]
    read = list(read_samples(remote, numbers))
    assert [s.image_bytes for s in read] == [s.image_bytes for s in read_samples(local, numbers)]
    assert [s.captions for s in read] == [s.captions for s in read_samples(local, numbers)]
    assert len(server.requests(".tar")) - before == 1, "44 scenes lie within 64 kB of each other"


@pytest.mark.parametrize(
    "fault", ["busy", "drops", "short", "shifted", "no content range", "ignores ranges", "hangs", "page"]
)
def test_passing_faults_change_nothing(scene_shards, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(ranges, "TIMEOUT", 0.3)
    local = shard_index.load(scene_shards / "train.json")
    with misbehaving(scene_shards, fault) as url:
        remote = shard_index.load(f"{url}/train.json", Cache(tmp_path))
        for part in (range(3), [40, 7, 9]):
            assert [s.image_bytes for s in read_samples(remote, part)] == [
                s.image_bytes for s in read_samples(local, part)
            ]
    assert not storage._without_ranges, "one whole file is no reason to fetch whole files"


@pytest.mark.parametrize("fault", ["busy", "drops", "short", "shifted", "no content range", "page"])
def test_storage_that_never_answers_ends_the_run_and_loses_no_image(scene_shards, fault):
    with misbehaving(scene_shards, fault, always=True) as url:
        remote = shard_index.load(f"{url}/train.json")
        with pytest.raises(InputError, match=r"train-000000\.tar(.|\n)*storage_patience_seconds"):
            list(read_samples(remote, [3, 30]))


def test_bytes_that_are_wrong_once_are_asked_for_again(scene_shards):
    local = shard_index.load(scene_shards / "train.json")
    with misbehaving(scene_shards, "flips") as url:
        remote = shard_index.load(f"{url}/train.json")
        assert [read.image_bytes for read in read_samples(remote, [3])] == [next(read_samples(local, [3])).image_bytes]


def test_bytes_that_are_wrong_twice_are_told_with_shard_offset_and_key(scene_shards):
    extents = shard_index.read_extents(shard_index.load(scene_shards / "train.json").shards[0])
    with misbehaving(scene_shards, "flips", always=True) as url:
        unreadable, read = read_samples(shard_index.load(f"{url}/train.json"), [3, 5])
    assert isinstance(unreadable, UnreadableSample) and "not those that were packed" in unreadable.reason
    where = (unreadable.shard, unreadable.offset, unreadable.key)
    assert where == ("train-000000.tar", extents[3].offset, extents[3].key)
    assert not isinstance(read, UnreadableSample)  # both came in one request, of which the first byte is wrong


def test_an_outage_is_waited_for_and_told_once(scene_shards, monkeypatch, caplog):
    """Two requests at once meet it, twenty times in all; said once, and that it answers again."""
    monkeypatch.setattr(outages, "TELL_AFTER", 0.0)
    monkeypatch.setattr(outages, "_patience", 60.0)
    monkeypatch.setattr(outages, "_shared", [0.0, 0.0])
    local = shard_index.load(scene_shards / "train.json")
    with misbehaving(scene_shards, "drops", always=True) as url:
        remote = shard_index.load(f"{url}/train.json")
        waits = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 20:
                for handler in Misbehaving.__subclasses__():
                    handler.fault = "none"

        monkeypatch.setattr(outages, "_sleep", sleep)
        read = list(read_samples(remote, [3, 30]))
    assert [s.image_bytes for s in read] == [s.image_bytes for s in read_samples(local, [3, 30])]
    assert min(waits) == 0.01 and max(waits) >= 1.0 and 20 <= len(waits) <= 22, "longer and longer"
    assert caplog.text.count("does not answer") == 1 and caplog.text.count("answers again") == 1


def test_retry_after_is_obeyed(scene_shards, monkeypatch):
    monkeypatch.undo()
    waits = []
    monkeypatch.setattr(outages, "_patience", 60.0)
    monkeypatch.setattr(outages, "_sleep", waits.append)
    with misbehaving(scene_shards, "busy") as url:
        assert not isinstance(next(read_samples(shard_index.load(f"{url}/train.json"), [3])), UnreadableSample)
    assert waits == [7.0]
    assert ranges._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and ranges._seconds("soon") == 0.0
    assert ranges._seconds("Fri, 31 Dec 9999 23:59:59 GMT") > 1e9


def test_a_rank_sees_that_its_loaders_wait_for_storage(scene_shards, stream_of):
    before = outages.last_wait()
    with misbehaving(scene_shards, "busy") as url:
        stream_of(shard_index.load(f"{url}/train.json"), workers=2)
    assert outages.last_wait() > before


def test_whole_files_again_and_again_change_the_way_of_reading_and_that_is_told(scene_shards, tmp_path, caplog):
    with misbehaving(scene_shards, "ignores ranges", always=True) as url:
        remote = shard_index.load(f"{url}/train.json", Cache(tmp_path))
        assert not any(isinstance(read, UnreadableSample) for read in read_samples(remote, [3, 30]))
    assert "the server ignores Range" in caplog.text and storage._without_ranges


def test_verify_sees_a_damaged_cached_shard_and_training_mends_it(scene_shards, tmp_path):
    local = shard_index.load(scene_shards / "train.json")
    remote = shard_index.load(f"pipe:cat {scene_shards}/train.json", Cache(tmp_path))
    whole = [sample.image_bytes for sample in read_samples(local, range(44))]
    list(read_samples(remote, [0]))
    shard_index.verify(remote)
    extent = shard_index.read_extents(local.shards[0])[7]
    (copy,) = remote.cache.home.glob("*.tar")
    with copy.open("r+b") as file:
        file.seek(extent.offset + 9)
        file.write(b"damage")
    with pytest.raises(InputError, match=copy.name):
        shard_index.verify(remote)
    assert [sample.image_bytes for sample in read_samples(remote, range(44))] == whole
    shard_index.verify(remote)


def test_what_sizes_tell_is_told_before_step_0(server, scene_shards, tmp_path):
    shutil.copytree(scene_shards, tmp_path / "copy")
    tar = tmp_path / "copy" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with nginx(tmp_path / "copy", tmp_path / "home") as other:
        with pytest.raises(InputError, match=r"train-000000\.tar has"):
            shard_index.load(f"{other.url}/split/train.json").check_files()
        tar.unlink()
        with pytest.raises(InputError, match=r"train-000000\.tar is missing"):
            shard_index.load(f"{other.url}/split/train.json").check_files()
    with pytest.raises(InputError, match=r"There is no shard index http.*nowhere\.json"):
        shard_index.load(f"{server.url}/split/nowhere.json")
    with pytest.raises(InputError, match="cannot be read"):
        shard_index.load("http://127.0.0.1:9/train.json")


def test_a_shard_cut_or_replaced_under_the_run_is_unreadable_where_it_differs(scene_shards, tmp_path):
    """Cut behind sample 20: with the total in Content-Range the shard is known to be another one."""
    shutil.copytree(scene_shards, tmp_path / "copy")
    tar = tmp_path / "copy" / "train-000000.tar"
    with nginx(tmp_path / "copy", tmp_path / "home") as other:
        remote = shard_index.load(f"{other.url}/split/train.json")
        whole = list(read_samples(remote, range(44)))
        tar.write_bytes(tar.read_bytes() + bytes(512))
        assert all("was replaced" in sample.reason for sample in read_samples(remote, range(44)))
        assert [sample.key for sample in read_samples(remote, range(44))] == [sample.key for sample in whole]


@pytest.mark.parametrize("source", ["pipe", "memory"])
def test_commands_and_fsspec_give_the_local_stream(scene_shards, stream_of, tmp_path, source):
    local = shard_index.load(scene_shards / "train.json")
    if source == "pipe":
        place = f"pipe:cat {scene_shards}/train.json"
    else:
        import fsspec

        fsspec.filesystem("memory").put(str(scene_shards), "/bucket", recursive=True)
        place = "memory://bucket/train.json"
    remote = shard_index.load(place, Cache(tmp_path))
    remote.check_files()
    assert_same_stream(stream_of(remote), stream_of(local))
    assert [file.stat().st_size for file in Cache(tmp_path).home.glob("*.tar")] == [local.shards[0].filesize]


def test_commands_run_only_where_the_user_gave_them(scene_shards, tmp_path):
    document = json.loads((scene_shards / "train.json").read_text())
    for name in (f"pipe:touch {tmp_path}/ran", "x.tar; touch ran"):
        document["shardlist"][0]["url"] = name
        (tmp_path / "train.json").write_text(json.dumps(document))
        place = tmp_path / "train.json" if name.startswith("pipe:") else f"pipe:cat {tmp_path}/train.json"
        with pytest.raises(InputError, match=r"Commands are run only|letters, digits"):
            shard_index.load(place)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pipe:cat nothing", r"must name the split's NAME\.json"),
        ("pipe:false train.json", "ended with status 1"),
        ("s3://bucket/train.json", "s3fs"),
        ("nosuch://bucket/train.json", "nosuch"),
    ],
)
def test_what_cannot_be_opened_is_said(place, message):
    if place.startswith("s3"):
        pytest.importorskip("fsspec")
        try:
            import s3fs  # noqa: F401

            pytest.skip("s3fs is installed")
        except ImportError:
            pass
    with pytest.raises(InputError, match=message):
        shard_index.load(place)


def test_a_command_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(streams, "PIPE_TIMEOUT", 0.2)
    with pytest.raises(InputError, match="gave no byte"):
        shard_index.load(f"pipe:sleep 300.{os.getpid()} # train.json")
    assert f"sleep 300.{os.getpid()}" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("text", "tar", "shown"),
    [
        ("https://h/a/train.json?t=secret", "https://h/a/train-0.tar?t=secret", "https://h/a/train-0.tar"),
        ("http://me:word@h/train.json", "http://me:word@h/train-0.tar", "http://***@h/train-0.tar"),
        ("s3://b/k/train.json", "s3://b/k/train-0.tar", "s3://b/k/train-0.tar"),
        ("pipe:ssh h 'cat /d/train.json'", "pipe:ssh h 'cat /d/train-0.tar'", "pipe:ssh h 'cat /d/train-0.tar'"),
        ("pipe:aws s3 cp s3://b/train.json -", "pipe:aws s3 cp s3://b/train-0.tar -", None),
    ],
)
def test_neighbours_of_a_url(text, tar, shown):
    place = sibling(place_of(text), "train-0.tar")
    assert isinstance(place, Url) and place.text == tar and str(place) == (shown or tar)
    assert place.with_suffix(".idx").text == tar.replace("train-0.tar", "train-0.idx")
    assert sibling(place_of(text), "https://other/x.tar", trust_urls=True) == place_of("https://other/x.tar")


def test_local_places():
    assert place_of("file:///a%20b/train.json") == Path("/a b/train.json")
    assert place_of("data/train.json") == Path("data/train.json")


def test_verify_reads_every_byte_over_http(server, scene_shards, tmp_path):
    done = run_command(module("launch.pack", "verify", f"{server.url}/split/train.json"))
    assert done.returncode == 0 and "44 samples" in done.stdout, done.stderr
    index = shard_index.load(f"{server.url}/split/train.json")
    other = replace(index, shards=(replace(index.shards[0], sha256="0" * 64),))
    with pytest.raises(InputError, match="not those that were packed"):
        shard_index.verify(other)


def test_spaces_and_other_letters_in_urls(scene_shards, tmp_path):
    shutil.copytree(scene_shards, tmp_path / "é b")
    with misbehaving(tmp_path, "none") as url:
        index = shard_index.load(f"{url}/é b/train.json")
        shard_index.verify(index)
        assert not any(isinstance(read, UnreadableSample) for read in read_samples(index, range(len(index))))
        assert len(shard_index.load(f"{url}/%C3%A9%20b/train.json")) == len(index)


def test_verify_tells_every_shard_that_cannot_be_read(scene_shards):
    index = shard_index.load(scene_shards / "train.json")
    gone = [replace(index.shards[0], path=Url("pipe:false ", f"gone-{n}.tar")) for n in range(2)]
    with pytest.raises(InputError, match=r"(?s)gone-0\.tar.*gone-1\.tar"):
        shard_index.verify(replace(index, shards=tuple(gone)))


def test_two_processes_train_from_a_url(server, scene_shards, empty_config, tmp_path):
    overrides = [
        item.replace(str(scene_shards), f"{server.url}/split")
        for item in settings(scene_shards, tmp_path / "run", train__epochs=1, data__num_workers=1)
    ]
    assert any("http://" in item for item in overrides)
    done = run_command(train_command(2, overrides, empty_config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_each_image_of_each_epoch_once(tmp_path / "run", scene_shards, epochs=1)


def test_many_shards_through_a_cache_of_two(tmp_path, monkeypatch):
    """The bound holds also where a step reads more shards than fit."""
    monkeypatch.setattr(
        "shards.packing.plan.TAR_OVERHEAD", 80_000_000
    )  # a shard is at least a megabyte: let samples seem large
    index = pack_small(scenes.write(tmp_path / "drawn", "train", 12, seed=1), tmp_path / "out")
    assert len(index.shards) > 3
    sizes = [shard.filesize for shard in index.shards]
    bounded = Cache(tmp_path / "cache", sum(sorted(sizes)[-2:]))
    remote = shard_index.load(f"pipe:cat {index.path}", bounded)
    for _ in range(2):
        read = list(read_samples(remote, range(len(index))))
        assert [s.image_bytes for s in read] == [s.image_bytes for s in read_samples(index, range(len(index)))]
        assert sum(file.stat().st_size for file in bounded.home.glob("*[0-9a-f].*")) <= bounded.limit


def test_a_cache_that_cannot_hold_the_set_is_told_before_it_crawls(scene_shards, tmp_path, caplog):
    for gb, warned in ((1.0, False), (1e-6, True)):
        config = from_dict(
            {
                "run": "r",
                "train": {"epochs": 1},
                "data": {"train": "t", "cache_gb": gb, "cache_dir": str(tmp_path)},
            },
            "",
        )
        open_split(f"pipe:cat {scene_shards}/train.json", config)
        assert ("fetched again and again" in caplog.text) == warned
