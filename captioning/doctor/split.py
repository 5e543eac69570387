"""What a split holds, how fast this storage gives it, and how a number of processes would be fed."""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from captioning.config import Config, DataConfig
from captioning.data import vocabulary as vocab
from captioning.data.inputs import inputs_for
from captioning.data.tokenizer import Characters, Words
from captioning.data.transforms import preprocessing_of
from captioning.doctor.checks import Check, look, size
from shards.dataset import EpochSample
from shards.index import Index
from shards.order import EpochOrder, micro_batches, rank_part, steps_per_epoch
from shards.reader import Sample, UnreadableSample, read_sample
from shards.scripts import is_spaceless, scripts_of

THRESHOLDS = (1, 2, 4, 5, 8)  # how often a word must occur to be in the vocabulary
READ_FOR_S = 3.0  # longest time spent on each of the two speeds
WELL_COVERED = 0.9  # with less of the text in the vocabulary, most captions of ten words hold an <unk>
STEPS_LOOKED_AT = 20  # of an epoch, to count the shards a rank reads from


def contents(index: Index) -> list[Check]:
    """Shards and their sizes, and whether every file is there as the index says."""
    sizes = [shard.filesize for shard in index.shards]
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in index.document.get("left_out", {}).items())
    return [
        look("files", lambda: _files(index)),
        Check("shards", f"{len(sizes):,}, {size(sum(sizes))} in all, {size(max(sizes))} the largest"),
        Check("samples", f"{len(index):,}"),
        Check("fingerprint", index.fingerprint[:16]),
        Check("packing", ", ".join(f"{key} {value}" for key, value in index.document.get("packing", {}).items())),
        Check("left out in packing", left_out or "nothing"),
        Check("skipped in packing", f"{len(index.document.get('skipped', [])):,} images"),
    ]


def _files(index: Index) -> Check:
    index.check_files()
    return Check("files", "all there, of the right sizes", True)


def captions(index: Index, on_progress: Callable[[int, int], None]) -> list[Check]:
    """How many captions, how long, what they are written in, how many words are frequent enough for a vocabulary, and
    which tokenizer suits them."""
    per_image: list[int] = []
    lengths: list[int] = []
    counts: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    every = [caption for text in index.texts() for caption in text.captions]
    what, tokenizer = ("characters", Characters()) if is_spaceless(every) else ("words", Words())
    for number, text in enumerate(index.texts(), start=1):
        words = [tokenizer.tokenize(caption) for caption in text.captions]
        per_image.append(len(words))
        lengths += map(len, words)
        for of_caption in words:
            counts.update(of_caption)
        labels.update([] if text.label is None else [text.label])
        on_progress(number, len(index))
    checks = [
        Check("captions", f"{len(lengths):,}"),
        Check("captions an image", f"{min(per_image)} to {max(per_image)}, mean {np.mean(per_image):.2f}"),
        Check(
            "scripts", ", ".join(f"{name} {share:.1%}" for name, share in list(scripts_of(every).items())[:4]) or "none"
        ),
        Check(f"{what} a caption", _distribution(lengths)),
        Check(f"{what} in all", f"{counts.total():,}, {len(counts):,} different"),
    ]
    for threshold in THRESHOLDS:
        vocabulary = vocab.build(counts, threshold)
        seen = f"{len(vocabulary):,} {what}, {vocabulary.coverage(counts):.2%} of the text"
        checks.append(Check(f"vocabulary, {threshold}+ times", seen))
    checks.append(Check("suggested", _suggestion(what, counts, lengths)))
    if labels:
        checks.append(
            Check("labels", f"{len(labels):,}, of {min(labels.values()):,} to {max(labels.values()):,} images")
        )
    return checks


def _suggestion(what: str, counts: Counter[str], lengths: list[int]) -> str:
    """Settings for these captions, and why."""
    data = DataConfig()
    covered = vocab.build(counts, data.min_word_freq).coverage(counts)
    if what == "characters":
        said = "data.tokenizer=characters: no spaces between words; scores are by characters too"
    elif covered < WELL_COVERED:
        often = f"words seen {data.min_word_freq}+ times are {covered:.0%} of the text"
        said = f"data.tokenizer=bpe: {often}, and parts of words make the others"
    else:
        said = "data.tokenizer=words"
    longest = int(np.percentile(lengths, 99)) if lengths else 0
    if what == "words" and covered < WELL_COVERED:
        longest = 2 * longest  # parts of words, not yet counted
    return said if longest <= data.max_words else f"{said}; data.max_words={longest} keeps 99 % of them whole"


def _distribution(lengths: list[int]) -> str:
    low, median, high, highest = np.percentile(lengths, [5, 50, 95, 99])
    return f"5 % {low:.0f}, median {median:.0f}, 95 % {high:.0f}, 99 % {highest:.0f}, longest {max(lengths)}"


def speed(index: Index, config: Config) -> list[Check]:
    """Images a second of one process in the order of an epoch: read only, and read and made ready for training."""
    return [
        look("reading", lambda: _reading("reading", index, config, lambda sample, number: None)),
        look("reading and decoding", lambda: _reading("reading and decoding", index, config, _decoder(index, config))),
    ]


def _decoder(index: Index, config: Config) -> Callable[[Sample, int], object]:
    inputs = inputs_for(index, preprocessing_of(config))
    return lambda sample, number: inputs.for_training(
        EpochSample(**vars(sample), place=number, epoch=0, run_seed=config.seed)
    )


def _reading(what: str, index: Index, config: Config, use: Callable[[Sample, int], object]) -> Check:
    images, read_bytes, unreadable = 0, 0, []
    started = time.perf_counter()
    for number in _in_training_order(index, config.train.global_batch_size):
        sample = read_sample(index, number)
        if isinstance(sample, UnreadableSample):
            unreadable.append(str(sample))
        else:
            use(sample, number)
            read_bytes += len(sample.image_bytes)
        images += 1
        elapsed = time.perf_counter() - started
        if elapsed > READ_FOR_S:
            break
    if unreadable:
        return Check(what, f"{len(unreadable):,} of {images:,} could not be read, the first: {unreadable[0]}", False)
    rates = f"{images / elapsed:,.0f} images/s, {size(read_bytes / elapsed)}/s"
    return Check(what, f"{rates} in one process ({images:,} images; the system may have had them in memory)", True)


def _in_training_order(index: Index, global_batch: int) -> Iterator[int]:
    order = EpochOrder(len(index), index.order_key, 0, 0, global_batch)
    for start in range(0, len(index), global_batch):
        yield from order.samples(start, min(len(index), start + global_batch)).tolist()


def feeding(index: Index, world_size: int, global_batch: int, micro_batch: int) -> list[Check]:
    """How the ranks' parts of a step come out, and how many shards a rank reads from."""
    steps = steps_per_epoch(len(index), global_batch)
    last = len(index) - (steps - 1) * global_batch
    too_few = "" if global_batch >= world_size else ": some ranks never get an image, raise the global batch"
    checks = [
        Check("processes", f"{world_size}{too_few}", not too_few),
        Check("steps an epoch", f"{steps:,} of {global_batch} images"),
        Check("a step", _parts(min(global_batch, len(index)), world_size, micro_batch)),
    ]
    if last < global_batch:
        checks.append(Check("the last step", f"{last} images: {_parts(last, world_size, micro_batch)}"))
    order = EpochOrder(len(index), index.order_key, 0, 0, global_batch)
    ranks = sorted({0, world_size // 2, world_size - 1})
    in_one, in_many = zip(*[_shards_read(index, order, rank, world_size) for rank in ranks], strict=True)
    what = f"{max(in_one)} in a step, {max(in_many)} in {min(steps, STEPS_LOOKED_AT)} steps, of {len(index.shards)}"
    return [*checks, Check("shards a rank reads", what)]


def _parts(images: int, world_size: int, micro_batch: int) -> str:
    parts = [stop - start for start, stop in (rank_part(0, images, rank, world_size) for rank in range(world_size))]
    each = f"{min(parts)} to {max(parts)}" if min(parts) != max(parts) else f"{parts[0]}"
    count = micro_batches(images, world_size, micro_batch)
    idle = f", {parts.count(0)} ranks without any" if 0 in parts else ""
    return f"{each} images a rank{idle}, in {count} micro-batch{'es' if count > 1 else ''} of at most {micro_batch}"


def _shards_read(index: Index, order: EpochOrder, rank: int, world_size: int) -> tuple[int, int]:
    """The most shards a rank reads from in one step, and in all steps looked at."""
    every: set[str] = set()
    most = 0
    for start in range(0, len(index), order.global_batch_size)[:STEPS_LOOKED_AT]:
        stop = min(len(index), start + order.global_batch_size)
        samples = order.samples(*rank_part(start, stop, rank, world_size)).tolist()
        shards = {str(index.locate(sample)[0].path) for sample in samples}
        most = max(most, len(shards))
        every |= shards
    return most, len(every)
