"""From positions to tensors: the same images and words for every world size, worker count and micro-batch size."""

import io
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.config import Config, DataConfig, TrainConfig
from captioning.data import captions as encoded
from captioning.data import loader
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import EvaluationBatches, train_dataset
from captioning.data.loader import evaluation_loader
from captioning.data.transforms import Preprocessing, decode
from shards import index as shard_index
from shards import storage
from shards.dataset import ShardDataset
from shards.errors import InputError
from shards.images import UnreadableImageError, open_rgb
from shards.order import step_range
from tests.conftest import ROOT, with_one_broken_image


@pytest.fixture(scope="module")
def dataset_of(scene_shards, tmp_path_factory):
    """Settings -> the training dataset of 44 scenes, of the shards themselves or a copy."""
    scenes = shard_index.load(scene_shards / "train.json")
    folder = tmp_path_factory.mktemp("encoded")
    encoded.encode(scenes, folder, threshold=1, max_words=20)

    def dataset(index=scenes, **settings) -> ShardDataset:
        settings = {"global_batch_size": 8, "micro_batch_size": 3, "rank": 0, "world_size": 1} | settings
        return train_dataset(index, EncodedCaptions(folder), Preprocessing(40, 32, True), 5, **settings)

    return dataset


def global_steps(dataset_of, world_size, workers=0, micro=3, first=0, last=11, **settings):
    """Each global step's (key, image, captions) over all ranks, in order, and the number of micro-batches each ran."""
    settings |= {"world_size": world_size, "micro_batch_size": micro, "num_workers": workers}
    steps = [[] for _ in range(first, last)]
    counts = []
    for rank in range(world_size):
        for number, step in enumerate(dataset_of(rank=rank, **settings).steps(first, last)):
            counts.append(len(step))
            for batch in step:
                assert len(batch.keys) <= micro
                for row, key in enumerate(batch.keys):
                    words = batch.captions.token_ids[batch.captions.image_index == row].tolist()
                    steps[number].append((key, batch.inputs[row], [[w for w in caption if w] for caption in words]))
    per_step = [counts[number :: last - first] for number in range(last - first)]
    return steps, per_step


def assert_same(a, b):
    for ours, theirs in zip(a, b, strict=True):
        assert [(key, words) for key, _, words in ours] == [(key, words) for key, _, words in theirs]
        assert all(torch.equal(x[1], y[1]) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("world_size", "workers", "micro"), [(2, 0, 3), (3, 2, 1), (5, 0, 8), (8, 1, 2), (16, 0, 3)])
def test_global_batches_do_not_depend_on_who_reads_them(dataset_of, world_size, workers, micro):
    whole, _ = global_steps(dataset_of, 1)
    parted, micro_batches = global_steps(dataset_of, world_size, workers, micro)
    assert_same(whole, parted)
    assert all(len(set(counts)) == 1 for counts in micro_batches), "ranks must run as many micro-batches as each other"


def test_each_image_once_an_epoch(dataset_of):
    steps, _ = global_steps(dataset_of, 3, last=12)
    per_epoch = [[], []]
    for number, step in enumerate(steps):
        per_epoch[step_range(number, 44, 8)[0]] += [key for key, _, _ in step]
    keys = {text.key for text in dataset_of().index.texts()}
    assert [Counter(epoch) for epoch in per_epoch] == [Counter(keys), Counter(keys)]


def test_resuming_at_every_step_gives_what_remains(dataset_of):
    whole, _ = global_steps(dataset_of, 2)
    for first in range(12):
        rest, _ = global_steps(dataset_of, 3, first=first)
        assert_same(whole[first:], rest)


def test_resuming_twice_in_an_epoch_with_loader_processes(dataset_of):
    whole, _ = global_steps(dataset_of, 1)
    pieces = [(2, 2, 0, 2), (3, 1, 2, 4), (1, 4, 4, 11)]  # world size, loader processes, from step, to step
    resumed = [s for w, n, first, last in pieces for s in global_steps(dataset_of, w, n, first=first, last=last)[0]]
    assert_same(whole, resumed)


@pytest.mark.parametrize(("world_size", "batch"), [(3, 100), (16, 8), (16, 44), (2, 1)])
def test_sets_smaller_than_the_batch_and_batches_smaller_than_the_processes(dataset_of, world_size, batch):
    per_epoch = -(-44 // batch)
    whole, _ = global_steps(dataset_of, 1, last=per_epoch, global_batch_size=batch)
    parted, _ = global_steps(dataset_of, world_size, last=per_epoch, global_batch_size=batch)
    assert_same(whole, parted)
    assert len({key for step in parted for key, *_ in step}) == 44


def test_many_micro_batches_hold_no_files_open(dataset_of):
    """A tensor shared with a loader process is an open file, and a process may have 1,024."""
    steps = dataset_of(global_batch_size=44, micro_batch_size=1, num_workers=1).steps(0, 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    (micro_batches,) = steps
    assert len(micro_batches) == 44
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 44


def test_crops_differ_between_epochs_and_not_between_runs(dataset_of):
    preprocessing = Preprocessing(64, 32, True)
    index = dataset_of().index
    data = index.shards[0].path.read_bytes()
    extent = shard_index.read_extents(index.shards[0])[0]
    jpeg = data[extent.offset : extent.offset + extent.size]
    first, again, later = (preprocessing.for_training(jpeg, 0, epoch, 0) for epoch in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, later.pixels)


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (31, 77), (500, 37), (37, 500), (1, 1), (641, 480)])
def test_every_size_of_image_gives_the_crop(size):
    preprocessing = Preprocessing(40, 32, True)
    image = preprocessing.for_evaluation(Image.new("RGB", size, (10, 20, 30))).pixels
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert image.flatten(1).tolist() == [[v] * 1024 for v in (10, 20, 30)]


def test_a_broken_image_is_left_out_and_shifts_nothing(dataset_of, scene_shards, tmp_path):
    """One sample's bytes are overwritten: its place is empty, every other image is where it was."""
    whole, _ = global_steps(dataset_of, 2)
    index, extent = with_one_broken_image(scene_shards, tmp_path / "shards")
    storage.close_files()
    broken, _ = global_steps(dataset_of, 2, index=index)
    expected = [[sample for sample in step if sample[0] != extent.key] for step in whole]
    assert_same(expected, broken)
    assert sum(map(len, whole)) - sum(map(len, broken)) == 2, "11 steps are two epochs"


def test_evaluation_reads_each_image_once_whatever_the_batch(scene_shards):
    index = shard_index.load(scene_shards / "val.json")
    dataset = EvaluationBatches(index, Preprocessing(32, 32, False))
    for batch_size in (1, 3, 64):
        loaded = list(evaluation_loader(dataset, 0, len(index), batch_size, workers=0))
        assert [s for batch in loaded for s in batch.samples] == list(range(len(index)))


HOLDING = """
import multiprocessing
from captioning.data.loader import evaluation_loader
from tests.unit.test_batches import Noise

def hold_loaders():
    global batches
    batches = evaluation_loader(Noise(), 0, 100, 1, 2)
    next(batches)

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=hold_loaders)
    child.start()
    child.join()
    hold_loaders()
    raise RuntimeError("an error while the loaders live")
"""


class Noise:
    def __getitem__(self, part):
        return torch.zeros(3)


@pytest.mark.slow
def test_a_process_that_has_loaders_ends():
    ended = subprocess.run([sys.executable, "-c", HOLDING], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("RuntimeError: an error while the loaders live")


def test_decoding_gives_pillows_pixels_and_refuses_what_pillow_refuses():
    """Of every kind of JPEG: gray, CMYK, progressive, subsampled, rotated, odd-sized, cut short, garbage."""
    grain = np.random.default_rng(0).integers(0, 255, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(np.asarray(Image.fromarray(grain).resize((61, 45))))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 30}, {"exif": exif}]
    coded = [(image, options) for options in kinds] + [(image.convert(mode), {}) for mode in ("L", "CMYK")]
    for picture, options in coded:
        out = io.BytesIO()
        picture.save(out, "JPEG", **options)
        data = out.getvalue()
        assert np.abs(decode(data).numpy().astype(int) - np.asarray(open_rgb(data)).astype(int)).max() <= 1, options
        for cut in (len(data) // 2, 200, 3):
            with pytest.raises(UnreadableImageError):
                open_rgb(data[:cut])
            with pytest.raises(UnreadableImageError):
                decode(data[:cut])
    with pytest.raises(UnreadableImageError):
        decode(b"\xff\xd8\xff" + bytes(500))


def test_a_small_file_that_promises_too_many_pixels_is_refused():
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    data = bytearray(out.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(UnreadableImageError):
        decode(bytes(data))


def test_an_error_of_a_loader_process_says_what_it_says_in_this_one(dataset_of, scene_shards, tmp_path):
    shutil.copytree(scene_shards, tmp_path / "shards")
    index = shard_index.load(tmp_path / "shards" / "train.json")
    index.shards[0].path.with_suffix(".idx").write_text("v1.2 44\n" + "jpg 0 1\n" * 44)
    said = []
    for workers in (0, 1):
        with pytest.raises(InputError) as error:
            next(dataset_of(index=index, num_workers=workers).steps(0, 1))
        said.append(str(error.value))
    assert said[0] == said[1] and "Copy them again, with their tar." in said[0]


@pytest.mark.parametrize(
    "cores, ranks, free_mb, workers",
    [(64, 1, 10**6, 63), (64, 4, 10**6, 15), (2, 1, 10**6, 1), (2, 2, 10**6, 0), (64, 1, 64, 2), (64, 4, 64, 0)],
)
def test_loader_workers_follow_the_cores_of_a_rank(monkeypatch, cores, ranks, free_mb, workers):
    """As many as it has cores but one, and as shared memory takes: 2 batches of each worker, of 6 MB, in half of it."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(loader, "free_shared_memory", lambda: free_mb * 1_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    config = Config(data=DataConfig(image_size=250), train=TrainConfig(micro_batch_size=32))
    assert loader.loader_workers(config) == workers
    assert loader.loader_workers(replace(config, data=replace(config.data, num_workers=5))) == 5
