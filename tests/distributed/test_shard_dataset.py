"""ShardDataset in loops of any kind: each sample once an epoch, the same global batches whoever reads them."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import shards
from shards import ShardDataset
from shards import index as shard_index
from shards.dataset import Part
from shards.errors import InputError
from shards.packing.index_tars import Options, index_tars
from tests.conftest import ROOT, free_ports, run_command, with_one_broken_image


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> shard_index.Index:
    """37 samples that are no images and have no captions: KEY.bin, a number, and KEY.cls, its parity; in 3 tars."""
    folder = tmp_path_factory.mktemp("numbers")
    for tar in range(3):
        members = []
        for number in range(tar, 37, 3):
            members += [(f"n{number:02}.bin", b"%d" % number), (f"n{number:02}.cls", b"%d" % (number % 2))]
        write_tar(folder / f"numbers-{tar}.tar", members)
    return index_tars([folder], "numbers", options=Options(any_sample=True))


def decode(sample) -> dict[str, int]:
    return {"number": int(sample.read("bin")), "parity": int(sample.read("cls")), "crop": sample.seed % 1000}


def dataset(split, **changes) -> ShardDataset:
    arguments = {"global_batch_size": 5, "decode": decode, "rank": 0, "world_size": 1} | changes
    return ShardDataset(split, **arguments)


def rows(batches) -> list[tuple[str, int, int]]:
    """(key, number, crop) of the rows that count."""
    batches = batches if isinstance(batches, list) else [batches]
    return [
        (key, int(number), int(crop))
        for b in batches
        for key, number, crop, weight in zip(b.keys, b.data["number"], b.data["crop"], b.weights, strict=True)
        if weight
    ]


def global_batches(split, world_size, count=None, state=None, **changes) -> tuple[list, list[dict]]:
    """Steps of all ranks put together, and the states of the ranks when they had ``count`` steps."""
    steps, states = [], []
    for rank in range(world_size):
        mine = dataset(split, rank=rank, world_size=world_size, **changes)
        if state is not None:
            mine.load_state_dict(state)
        for number, (_, batches) in enumerate(zip(range(10**9 if count is None else count), mine, strict=False)):
            steps += [[]] if number == len(steps) else []
            steps[number] += rows(batches)
        states.append(mine.state_dict())
    return steps, states


cuts = st.one_of(st.none(), st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 45), cuts, st.integers(0, 3))
def test_each_sample_once_an_epoch_and_the_same_steps_for_any_number_of_processes(numbers, world, size, micro, seed):
    settings = {"epochs": 2, "global_batch_size": size, "seed": seed}
    whole, _ = global_batches(numbers, 1, **settings)
    parted, _ = global_batches(numbers, world, micro_batch_size=micro, **settings)
    assert parted == whole
    per_epoch = len(whole) // 2
    for epoch in (whole[:per_epoch], whole[per_epoch:]):
        assert Counter(number for step in epoch for _, number, _ in step) == Counter(range(37))
    assert all(len(step) == size for step in whole[: per_epoch - 1])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 20), cuts, st.integers(0, 20))
def test_another_number_of_processes_goes_on_from_a_state(numbers, before, after, size, micro, count):
    whole, _ = global_batches(numbers, 1, epochs=2, global_batch_size=size)
    done, states = global_batches(numbers, before, count, epochs=2, global_batch_size=size, micro_batch_size=micro)
    assert all(state == states[0] for state in states), "any rank's state is everybody's"
    state = json.loads(json.dumps(states[0]))
    assert state["samples_seen"] == sum(map(len, whole[:count]))
    rest, _ = global_batches(numbers, after, state=state, epochs=2, global_batch_size=size)
    assert done + rest == whole


def test_one_for_is_what_is_left_of_an_epoch_and_the_next_is_the_next(numbers):
    whole, _ = global_batches(numbers, 1, epochs=3)
    mine, seen = dataset(numbers), []
    for batch in mine:
        seen.append(rows(batch))
        if len(seen) == 2:
            break
    assert (mine.epoch, mine.steps_per_epoch) == (0, 8)
    for _ in range(2):
        seen += [rows(batch) for batch in mine]
    assert seen == whole[:16] and mine.epoch == 2
    crops = [{number: crop for step in seen[a:b] for _, number, crop in step} for a, b in ((0, 8), (8, 16))]
    assert crops[0] != crops[1], "draws differ between epochs"


def test_every_rank_runs_as_many_micro_batches_and_has_rows_in_each(numbers):
    """37 samples in steps of 9 leave one for the last step of an epoch, and so do nine processes eight empty parts."""
    of_ranks = [
        list(dataset(numbers, global_batch_size=9, micro_batch_size=2, rank=rank, world_size=4)) for rank in range(4)
    ]
    for step in zip(*of_ranks, strict=True):
        assert len({len(batches) for batches in step}) == 1
        assert all(
            len(batch.keys) >= 1 and batch.data["number"].shape == batch.weights.shape
            for batches in step
            for batch in batches
        )
        weight = sum(float(batch.weights.sum()) for batches in step for batch in batches)
        assert {batch.step_size for batches in step for batch in batches} == {int(weight)}


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(numbers, workers):
    whole, _ = global_batches(numbers, 1, epochs=2)
    ahead, states = global_batches(numbers, 2, 10, epochs=2, num_workers=workers, micro_batch_size=1)
    assert ahead == whole[:10]
    assert states[0]["samples_seen"] == 37 + 2 * 5, "what was read ahead is not counted"


STARTED = """
import multiprocessing, sys
from torch.utils.data import DataLoader
from tests.distributed.test_shard_dataset import dataset, decode, rows

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    here = [rows(batch) for batch in dataset(sys.argv[2])]
    ahead = [rows(batch) for batch in dataset(sys.argv[2], num_workers=2, decode=lambda sample: decode(sample))]
    assert ahead == here, ahead
    assert [rows(batch) for batch in DataLoader(dataset(sys.argv[2], epochs=1), None, num_workers=2)] == here
    print(len(here))
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.sweep)])
def test_however_processes_start_the_batches_are_the_same(numbers, tmp_path, method):
    """Python 3.14 starts them otherwise than 3.13. Our own readers take any decode function all the same; around a
    DataLoader of the user's it has to be one that can be imported."""
    (tmp_path / "started.py").write_text(STARTED)
    done = run_command([sys.executable, str(tmp_path / "started.py"), method, str(numbers.path)], PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stdout.split() == ["8"], done.stderr


def test_an_unreadable_sample_keeps_its_place_with_weight_0(scene_shards, tmp_path, caplog):
    index, extent = with_one_broken_image(scene_shards, tmp_path / "broken")

    def load(split, **changes):
        settings = {"global_batch_size": 8, "decode": lambda s: len(s.image_bytes), "max_unreadable_fraction": 0.1}
        return list(dataset(split, **settings, **changes))

    whole, broken = load(scene_shards / "train.json"), load(index)
    assert [batch.keys for batch in broken] == [batch.keys for batch in whole]
    lost = [(key, float(w)) for batch in broken for key, w in zip(batch.keys, batch.weights, strict=True) if w != 1]
    assert lost == [(extent.key, 0.0)]
    assert extent.key in caplog.text and f"at byte {extent.offset:,}" in caplog.text
    with pytest.raises(InputError, match=r"more than max_unreadable_fraction=0\.001 of 44"):
        list(dataset(index, global_batch_size=8, decode=lambda s: 1))


def test_what_decode_cannot_read_is_unreadable_and_what_it_gets_wrong_is_raised(numbers):
    def refuses_seven(sample):
        if sample.key == "n07":
            raise OSError("no seven")
        return int(sample.image_bytes)

    batches = list(dataset(numbers, decode=refuses_seven, max_unreadable_fraction=1))
    assert [(k, w) for b in batches for k, w in zip(b.keys, b.weights.tolist(), strict=True) if not w] == [("n07", 0)]
    with pytest.raises(InputError, match="first 5 samples of step 1 are unreadable"):
        next(iter(dataset(numbers, decode=lambda sample: int(sample.read("mp3")))))
    with pytest.raises(ZeroDivisionError):
        next(iter(dataset(numbers, decode=lambda sample: 1 // 0)))


def test_a_sample_gives_all_its_files(scene_shards, numbers):
    seen = []

    def look(sample):
        picture = Image.open(io.BytesIO(sample.read("jpg")))
        about = json.loads(sample.read("json"))
        seen.append((picture.size, sample.files, about["captions"] == list(sample.captions)))
        return 0

    next(iter(dataset(scene_shards / "train.json", decode=look)))
    assert len(seen) == 5 and {(files, same) for _, files, same in seen} == {(("jpg", "json"), True)}
    shard_index.verify(numbers)


def test_a_collate_of_ones_own_gets_the_part(numbers):
    def collate(part: Part):
        return part.step, part.step_size, [key for key, _ in part]

    first = next(iter(dataset(numbers, collate=collate, world_size=2)))
    assert first[:2] == (0, 5) and len(first[2]) == 2


def test_another_runs_state_is_refused_by_name(numbers, scene_shards):
    state = dataset(numbers, seed=3).state_dict()
    with pytest.raises(InputError, match="seed: 3 there, 4 here"):
        dataset(numbers, seed=4).load_state_dict(state)
    with pytest.raises(InputError, match="global_batch_size: 5 there, 6 here"):
        dataset(numbers, seed=3, global_batch_size=6).load_state_dict(state)
    with pytest.raises(InputError, match="fingerprint"):
        dataset(scene_shards / "train.json", seed=3).load_state_dict(state)
    for nonsense in (7, -5, "5", None):
        with pytest.raises(InputError, match="not between two steps"):
            dataset(numbers, seed=3).load_state_dict(state | {"samples_seen": nonsense})


def test_rank_and_world_size_come_from_the_environment(numbers, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    mine = ShardDataset(numbers, global_batch_size=5, decode=decode)
    assert (mine.rank, mine.world_size) == (2, 3)
    for wrong in ({"rank": 1}, {"rank": 3, "world_size": 3}, {"global_batch_size": 0}, {"micro_batch_size": 0}):
        with pytest.raises(InputError):
            ShardDataset(numbers, **{"global_batch_size": 5, "decode": decode} | wrong)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK=first"):
        ShardDataset(numbers, global_batch_size=5, decode=decode)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_own_loader_around_it_gives_the_same(numbers, workers):
    whole, _ = global_batches(numbers, 1, epochs=2)
    assert [rows(batch) for batch in DataLoader(dataset(numbers, epochs=2), None, num_workers=workers)] == whole
    if workers:
        with pytest.raises(InputError, match=r"give the dataset epochs=\.\.\."):
            next(iter(DataLoader(dataset(numbers), None, num_workers=workers)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_torchdatas_stateful_loader_goes_on_where_it_was(numbers, workers, count):
    loaders = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def loader(rank, world_size):
        mine = dataset(numbers, epochs=2, rank=rank, world_size=world_size, micro_batch_size=2)
        return loaders.StatefulDataLoader(mine, batch_size=None, num_workers=workers)

    whole, _ = global_batches(numbers, 1, epochs=2)
    first = loader(0, 1)
    seen = [rows(batches) for _, batches in zip(range(count), first, strict=False)]
    rest = [[] for _ in whole[count:]]
    for rank in range(2):
        again = loader(rank, 2)
        again.load_state_dict(first.state_dict())
        for number, batches in enumerate(again):
            rest[number] += rows(batches)
    assert seen + rest == whole


LOOP = """
import sys, torch, torch.distributed as dist
from shards import ShardDataset

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), 1e-4)
decode = lambda sample: (torch.tensor([float(sample.read("bin"))]), float(sample.read("cls")))
dataset = ShardDataset(sys.argv[1], global_batch_size=9, decode=decode, epochs=2, num_workers=1)
for batch in dataset:
    error = (model(batch.data[0]).squeeze(1) - batch.data[1].float()) ** 2
    loss = (error * batch.weights).sum() * dataset.world_size / batch.step_size
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    print("RESULT", *(p.item() for p in model.parameters()), dataset.state_dict()["samples_seen"])
dist.destroy_process_group()
"""


def test_a_plain_loop_trains_the_same_model_with_two_processes_as_with_one(numbers, tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    results = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]):
        port = str(free_ports(1)[0])
        there = ["--master-addr", "127.0.0.1", "--master-port", port] if launcher else []
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, *launcher, *there, str(script), str(numbers.path)]
        ended = run_command(command, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **({} if launcher else alone))
        assert ended.returncode == 0, ended.stderr
        line = next(line for line in ended.stdout.splitlines() if line.startswith("RESULT"))
        results.append([float(value) for value in line.split()[1:]])
    assert results[0] == pytest.approx(results[1], rel=1e-5) and results[0][2] == 74


def test_importing_shards_imports_no_torch():
    program = "import sys, shards; assert 'torch' not in sys.modules; assert shards.ShardDataset.__iter__"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=os.environ)
    with pytest.raises(AttributeError):
        _ = shards.ShardDatasets
