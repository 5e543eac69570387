"""NAME.json from anybody: what cannot be is refused, and what training trusts is bound to its tar."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captioning.data import captions as encoded
from captioning.data.captions import EncodedCaptions
from shards import index as shard_index
from shards.errors import InputError
from shards.files import sha256_of
from shards.packing.index_tars import index_tars
from shards.reader import read_sample
from shards.storage.urls import place_of, sibling
from tests.conftest import module, run_command, settings, train_command
from tests.unit.test_index_tars import img2dataset, write_tar


@pytest.fixture
def copy(scene_shards, tmp_path) -> Path:
    shutil.copytree(scene_shards, tmp_path / "shards")
    return tmp_path / "shards" / "train.json"


@pytest.fixture
def two_tars(tmp_path) -> Path:
    """A split of two tars of two samples each; every caption names its sample."""
    for number in range(2):
        samples = [file for n in range(2) for file in img2dataset(f"{number}{n}", f"Picture {number} {n}.", 50 * n)]
        write_tar(tmp_path / "tars" / f"{number}.tar", samples)
    index_tars([tmp_path / "tars"], "train")
    return tmp_path / "tars" / "train.json"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def in_shard(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["shardlist"][0].update(fields)


IMPOSSIBLE = {
    "name of a path": lambda document: document.update(name="../train"),
    "name with a slash": lambda document: document.update(name="a/b"),
    "name missing": lambda document: document.pop("name"),
    "shardlist no list": lambda document: document.update(shardlist={"0": 1}),
    "shard no object": lambda document: document.update(shardlist=["train-000000.tar"]),
    "shard twice": lambda document: document.update(shardlist=document["shardlist"] * 2),
    "url a number": in_shard(url=7),
    "url above": in_shard(url="../train-000000.tar"),
    "url above, further on": in_shard(url="a/../../train-000000.tar"),
    "url absolute": in_shard(url="/etc/passwd"),
    "url elsewhere": in_shard(url="http://169.254.169.254/latest/meta-data"),
    "url of a file": in_shard(url="file:///etc/passwd"),
    "url with a NUL": in_shard(url="train\0.tar"),
    "url empty": in_shard(url=""),
    "nsamples negative": in_shard(nsamples=-1),
    "nsamples a float": in_shard(nsamples=44.0),
    "nsamples true": in_shard(nsamples=True),
    "nsamples a text": in_shard(nsamples="44"),
    "nsamples more than bytes": in_shard(nsamples=10**6),
    "nsamples of 20 digits": in_shard(nsamples=10**20, filesize=10**20),
    "filesize infinite": in_shard(filesize=float("inf")),
    "filesize huge": in_shard(filesize=10**15),
    "sha256 a path": in_shard(sha256="../../victim"),
    "sha256 short": in_shard(sha256="ab"),
    "sha256 missing": lambda document: document["shardlist"][0].pop("sha256"),
    "sidecars no object": in_shard(sidecars="abc"),
    "sidecars lacking": in_shard(sidecars={".idx": "0" * 64}),
    "left_out a list": lambda document: document.update(left_out=[1]),
    "skipped a text": lambda document: document.update(skipped=["a.jpg"]),
    "packing a list": lambda document: document.update(packing=[]),
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_a_field_that_cannot_be_is_refused(copy, field):
    edit(copy, IMPOSSIBLE[field])
    with pytest.raises(InputError, match=re.escape(str(copy))) as error:
        shard_index.load(copy)
    assert len(str(error.value).splitlines()) < 10


def test_json_too_deep_is_refused(copy):
    copy.write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not a shard index"):
        shard_index.load(copy)


def test_an_index_of_before_sidecars_had_hashes_says_what_to_do(copy):
    """And doing so gives the same data."""
    before = shard_index.load(copy)
    texts = before.texts()
    edit(copy, lambda document: document["shardlist"][0].pop("sidecars"))
    with pytest.raises(InputError, match=r"captioning pack index"):
        shard_index.load(copy)
    tar = copy.with_name("train-000000.tar")
    done = run_command(module("launch.pack", "index", tar, "--split", "train"))
    assert done.returncode == 0, done.stderr
    after = shard_index.load(copy)
    assert after.fingerprint == before.fingerprint and after.texts() == texts


def test_files_elsewhere_need_trust():
    index = place_of("https://host/coco/train.json")
    for name in ("https://other/x.tar", "s3://bucket/x.tar"):
        with pytest.raises(InputError, match=r"data\.trust_urls"):
            sibling(index, name)
        assert sibling(index, name, trust_urls=True) == place_of(name)
    for name in ("file:///etc/passwd", "zip://x.tar::https://host/a.zip", "memory://x.tar", "/x.tar", "%2e%2e/x.tar"):
        with pytest.raises(InputError, match="names a shard"):
            sibling(index, name, trust_urls=True)
    assert sibling(Path("/data/train.json"), "/other/x.tar", trust_urls=True) == Path("/other/x.tar")


def test_a_reordered_shard_list_is_other_data_with_its_own_captions(two_tars, tmp_path):
    """Its fingerprint is worked out anew, so that nothing encoded for the other order is used for it."""
    index = shard_index.load(two_tars)
    vocabulary = encoded.encode(index, tmp_path / "encoded", 1, 20)
    edit(two_tars, lambda document: document["shardlist"].reverse())
    swapped = shard_index.load(two_tars)
    assert swapped.fingerprint != index.fingerprint
    encoded.encode(swapped, tmp_path / "encoded", 1, 20, vocabulary)
    for number in range(4):
        words = [vocabulary.words[n] for n in EncodedCaptions(tmp_path / "encoded").of(number)[0]]
        assert words[:3] == read_sample(swapped, number).captions[0].lower().replace(".", " .").split()[:3]


def test_a_run_does_not_go_on_with_a_reordered_shard_list(two_tars, tmp_path, empty_config):
    overrides = [*settings(two_tars.parent, tmp_path / "run"), "train.global_batch_size=2", "train.micro_batch_size=2"]
    overrides += ["checkpoint.every_steps=1"]
    done = run_command(train_command(1, [*overrides, "train.total_steps=1"], empty_config))
    assert done.returncode == 0, done.stderr
    edit(two_tars, lambda document: document["shardlist"].reverse())
    done = run_command(train_command(1, [*overrides, "train.total_steps=2"], empty_config))
    assert done.returncode == 2 and "was trained on other data" in done.stderr, done.stderr


@pytest.mark.parametrize("suffix", [".idx", ".crc32", ".captions.json"])
def test_a_sidecar_of_another_tar_is_refused(two_tars, suffix):
    """Both tars have two samples: only the hash tells."""
    index = shard_index.load(two_tars)
    first, second = (shard.local.with_suffix(suffix) for shard in index.shards)
    if suffix == ".captions.json":
        first.write_text(second.read_text())
    else:
        data = first.read_bytes()
        first.write_bytes(data.replace(b" 512 ", b" 513 ") if suffix == ".idx" else data[4:] + data[:4])
    shard_index.read_extents.cache_clear()
    with pytest.raises(InputError, match=r"not those that the index was written with.*Cop"):
        index.texts() if suffix == ".captions.json" else read_sample(index, 0)
    done = run_command(module("launch.pack", "verify", two_tars))
    assert done.returncode == 2 and first.name in done.stderr


def test_an_offset_outside_the_tar_is_refused_though_the_hashes_fit(two_tars):
    idx = two_tars.with_name("0.idx")
    lines = idx.read_text().split("\n")
    lines[1] = lines[1].replace("jpg 512 ", f"jpg {10**18} ")
    idx.write_text("\n".join(lines))
    sha256 = sha256_of(idx)
    edit(two_tars, lambda document: document["shardlist"][0]["sidecars"].update({".idx": sha256}))
    with pytest.raises(InputError, match="outside its tar"):
        read_sample(shard_index.load(two_tars), 0)


@pytest.mark.parametrize("array", ["ids", "caption_starts", "sample_starts"])
def test_encoded_captions_that_were_changed_are_made_again(two_tars, tmp_path, array):
    index = shard_index.load(two_tars)
    vocabulary = encoded.encode(index, tmp_path / "encoded", 1, 20)
    path = tmp_path / "encoded" / f"{array}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    encoded.encode(index, tmp_path / "encoded", 1, 20, vocabulary)
    assert path.read_bytes() == whole
