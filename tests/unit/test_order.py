"""The order of an epoch: each sample once, known from its arguments alone, and well mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.hashing import uniform, uniforms
from shards.order import EpochOrder, Locality, rank_part, step_range

sizes = st.integers(1, 700)
batches = st.integers(1, 300)
localities = st.builds(Locality, st.integers(1, 70), st.integers(1, 40), st.integers(1, 90))


@settings(max_examples=150, deadline=None)
@given(sizes, batches, localities, st.integers(0, 5))
def test_an_epoch_is_a_permutation(size, batch, locality, epoch):
    order = EpochOrder(size, "data", 0, epoch, batch, locality)
    assert sorted(order.samples(0, size)) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(sizes, batches, localities, st.data())
def test_any_stretch_is_what_the_whole_epoch_has_there(size, batch, locality, data):
    order = EpochOrder(size, "data", 3, 1, batch, locality)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert order.samples(start, stop).tolist() == order.samples(0, size)[start:stop].tolist()


@settings(max_examples=100, deadline=None)
@given(sizes, batches, st.integers(1, 16))
def test_ranks_share_every_global_step(size, batch, world_size):
    for step in range(-(-size // batch)):
        _, start, stop = step_range(step, size, batch)
        parts = [rank_part(start, stop, rank, world_size) for rank in range(world_size)]
        assert [p for a, b in parts for p in range(a, b)] == list(range(start, stop))
        assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


def test_every_argument_changes_the_order():
    base = {"size": 500, "fingerprint": "a", "seed": 0, "epoch": 0, "global_batch_size": 32}
    orders = [
        base,
        base | {"fingerprint": "b"},
        base | {"seed": 1},
        base | {"epoch": 1},
        base | {"global_batch_size": 33},
    ]
    assert len({tuple(EpochOrder(**arguments).samples(0, 500).tolist()) for arguments in orders}) == len(orders)


def test_the_order_is_the_same_for_ever():
    # A change here would make every resumed run continue in another order: never change these numbers.
    assert EpochOrder(20, "fingerprint", 7, 2, 6).samples(0, 20).tolist() == GOLDEN


GOLDEN = [3, 6, 7, 13, 15, 18, 0, 5, 8, 11, 16, 17, 1, 4, 9, 10, 14, 19, 2, 12]


def test_class_sorted_data_comes_mixed():
    """Dispersion: the chi-square of a batch's classes over its degrees of freedom; 1 is a uniform shuffle."""
    size, classes, batch = 50_000, 80, 256
    order = EpochOrder(size, "sorted", 0, 0, batch).samples(0, size)
    labels = order * classes // size
    expected = batch / classes
    steps = [labels[t * batch : (t + 1) * batch] for t in range(size // batch)]
    counts = np.array([np.bincount(step, minlength=classes) for step in steps])
    dispersion = ((counts - expected) ** 2 / expected).sum(axis=1) / (classes - 1)
    assert 0.9 < dispersion.mean() < 1.15


def test_a_rank_reads_few_blocks():
    """Locality is real: of 8 ranks each touches about an eighth of a 64-lane epoch's blocks, not all of them."""
    size, batch = 65_536, 256
    order = EpochOrder(size, "local", 0, 0, batch)
    first_rank = np.concatenate([order.samples(*rank_part(t * batch, (t + 1) * batch, 0, 8)) for t in range(256)])
    assert len(np.unique(first_rank // 32)) < 0.15 * size / 32


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 20))
def test_steps_tile_the_epochs(size, batch, epochs):
    """The last step of an epoch is short: never padded with repeats, never dropped."""
    ranges = [step_range(step, size, batch) for step in range(epochs * -(-size // batch))]
    assert [(e, p) for e, a, b in ranges for p in range(a, b)] == [(e, p) for e in range(epochs) for p in range(size)]
    assert all(0 < b - a <= batch for _, a, b in ranges)


def test_an_empty_split_is_refused():
    with pytest.raises(InputError, match="0 samples"):
        EpochOrder(0, "data", 0, 0, 8)


# The whole contract on pure functions: who reads which sample in which step, for any way to share the work.


def delivered(size, batch, world_size, step, micro_batch=None):
    """Each rank's samples of a global step, in rank order, as its micro-batches hold them."""
    epoch, start, stop = step_range(step, size, batch)
    order = EpochOrder(size, "data", 0, epoch, batch)
    parts = [rank_part(start, stop, rank, world_size) for rank in range(world_size)]
    micro = -(-max(b - a for a, b in parts) // (micro_batch or batch))
    return [[order.samples(*rank_part(a, b, number, micro)).tolist() for number in range(micro)] for a, b in parts]


def flat(of_ranks):
    return [sample for rank in of_ranks for micro in rank for sample in micro]


tiny = st.integers(1, 60)
worlds = st.integers(1, 16)


@settings(max_examples=60, deadline=None)
@given(tiny, st.integers(1, 70), worlds, st.integers(1, 9))
def test_the_union_over_ranks_is_the_split_each_epoch(size, batch, world_size, micro_batch):
    """Also for fewer samples than the global batch, or than processes: 1 sample, 16 processes."""
    per_epoch = -(-size // batch)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        read = [s for step in steps for s in flat(delivered(size, batch, world_size, step, micro_batch))]
        assert sorted(read) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(tiny, st.integers(1, 70), worlds, st.integers(1, 9), st.integers(0, 200))
def test_global_batches_are_the_same_for_every_way_to_share_them(size, batch, world_size, micro_batch, step):
    assert flat(delivered(size, batch, world_size, step, micro_batch)) == flat(delivered(size, batch, 1, step))


@settings(max_examples=60, deadline=None)
@given(tiny, st.integers(1, 70), worlds, st.integers(1, 9), st.integers(0, 200))
def test_all_ranks_run_the_same_number_of_micro_batches(size, batch, world_size, micro_batch, step):
    of_ranks = delivered(size, batch, world_size, step, micro_batch)
    assert len({len(rank) for rank in of_ranks}) == 1
    assert all(len(micro) <= micro_batch for rank in of_ranks for micro in rank)


@settings(max_examples=40, deadline=None)
@given(tiny, st.integers(1, 20), st.lists(worlds, min_size=3, max_size=3), st.data())
def test_resuming_at_every_step_and_twice_gives_what_remains(size, batch, world_sizes, data):
    """A run of three pieces, cut at any two steps, each with another number of processes, is the uninterrupted run."""
    total = 2 * -(-size // batch) + 1
    first = data.draw(st.integers(0, total))
    second = data.draw(st.integers(first, total))
    whole = [flat(delivered(size, batch, 1, step)) for step in range(total)]
    pieces = [(0, first), (first, second), (second, total)]
    resumed = [
        flat(delivered(size, batch, world_size, step))
        for (start, stop), world_size in zip(pieces, world_sizes, strict=True)
        for step in range(start, stop)
    ]
    assert resumed == whole


@given(st.integers(0, 2**64 - 1))
def test_few_random_numbers_are_those_of_the_arrays(key):
    assert uniforms(key, 5) == uniform(key, np.arange(5)).tolist()


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_step_by_step_from_anywhere_is_the_whole_epoch(batch):
    """A lane is computed in stretches that are kept from batch to batch: over their ends, and after going back."""
    size, locality = 6000, Locality(2, 8, 50)
    whole = EpochOrder(size, "data", 0, 0, batch, locality).samples(0, size).tolist()
    order = EpochOrder(size, "data", 0, 0, batch, locality)
    for first in (4000, 0, 2100):
        places = [(p, min(size, p + batch)) for p in range(first, size, batch)]
        assert [s for start, stop in places for s in order.samples(start, stop).tolist()] == whole[first:]
