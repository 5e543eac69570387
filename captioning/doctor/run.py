"""A run: whether its data can be read, its checkpoint can be continued, and the disk has room for what is to come."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from captioning.config import Config
from captioning.data import vocabulary as vocab
from captioning.data.dataset import EvaluationBatches
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.splits import open_split, saved_split
from captioning.data.transforms import preprocessing_of
from captioning.doctor.checks import Check, look, size
from captioning.model.captioner import Captioner
from captioning.model.losses import token_loss
from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder

READ_AT, READ_TOGETHER = 16, 4  # places in each split, and images there, that are read and decoded
MOST_IMAGES = 4096  # where the search for the largest micro-batch ends


def run_checks(run: Path, config: Config) -> list[Check]:
    """Data, status, checkpoint and disk of a run. Rank 0's work."""
    data = [look("data.train", lambda: _data("data.train", config.data.train, config))]
    if val := config.data.val:
        data.append(look("data.val", lambda: _data("data.val", val, config)))
    return [
        Check("status", " · ".join(filter(None, RunFolder(run).status())) or "never started"),
        *data,
        look("newest checkpoint", lambda: _checkpoint(run)),
        look("disk", lambda: _disk(run, config)),
    ]


def _data(name: str, path: str, config: Config) -> Check:
    index = open_split(saved_split(path) or path, config)
    batches = EvaluationBatches(index, preprocessing_of(config))
    parts = pairwise(i * len(index) // READ_AT for i in range(READ_AT + 1))
    read = [batches[(start, min(stop, start + READ_TOGETHER))] for start, stop in parts]
    count = sum(len(batch.samples) + len(batch.unreadable) for batch in read)
    unreadable = [sample for batch in read for sample in batch.unreadable]
    if unreadable:
        return Check(name, f"{len(unreadable)} of {count} images cannot be read, the first: {unreadable[0]}", False)
    return Check(name, f"{len(index):,} images in {len(index.shards)} shard(s), {count} of them read", True)


def _checkpoint(run: Path) -> Check:
    steps = checkpoint.steps(run)
    if not steps:
        return Check("newest checkpoint", "none yet")
    damage = checkpoint.damage(_folder(run, steps[-1]))
    others = f", {len(steps) - 1} older" if len(steps) > 1 else ""
    return Check("newest checkpoint", f"step {steps[-1]}: {damage or 'verifies'}{others}", damage is None)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _disk(run: Path, config: Config) -> Check:
    """A new checkpoint is written before an old one is removed, and the best is kept besides."""
    steps = checkpoint.steps(run)
    each = _size_of(_folder(run, steps[-1])) if steps else _expected_size(run, config)
    wanted = max(1, config.checkpoint.keep + 2 - len(steps)) * each
    free = shutil.disk_usage(run).free
    seen = f"{size(free)} free, {size(wanted)} wanted for checkpoints of {size(each)}"
    return Check("disk", seen if free > wanted else f"{seen}: make room, or lower checkpoint.keep", free > wanted)


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _expected_size(run: Path, config: Config) -> int:
    """Parameters, and Adam's two moments of those that are trained, 4 bytes each."""
    model = Captioner(config, vocabulary_size(run))
    return sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())


def vocabulary_size(run: Path) -> int:
    """Of the run's vocabulary; 10,000 (about COCO's) before there is one."""
    path = run / "vocabulary.json"
    return len(vocab.from_json(path.read_text(encoding="utf-8"), str(path))) if path.is_file() else 10_000


def largest_micro_batch(config: Config, words: int, device: torch.device) -> Check:
    """The most images that go forwards and backwards at once, to a power of two; tried on a GPU only, since a CPU's
    memory has no end that can be met without harm."""
    what = "largest micro-batch"
    if device.type != "cuda":
        return Check(what, "tried on a GPU only")
    fits = 0
    for images in _doubling(MOST_IMAGES):
        try:
            try_micro_batch(config, words, images, device)
        except torch.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        fits = images
    if not fits:
        return Check(what, "not even one image fits: a smaller model, or encoder.gradient_checkpointing=true", False)
    wanted = config.train.micro_batch_size
    hint = "" if wanted <= fits else f", and train.micro_batch_size={wanted} is more: it would run out of memory"
    return Check(what, f"{fits} images of {config.data.image_size} pixels{hint}", wanted <= fits)


def _doubling(most: int) -> Iterator[int]:
    images = 1
    while images <= most:
        yield images
        images *= 2


def try_micro_batch(config: Config, words: int, images: int, device: torch.device) -> None:
    """One forward and backward pass of ``images`` with the longest captions, and room for Adam's moments."""
    model = Captioner(config, words).to(device).train()
    moments = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
    captions = images * config.data.captions_per_image
    length = config.data.max_words + 1
    pixels = torch.zeros(images, 3, config.data.image_size, config.data.image_size, dtype=torch.uint8, device=device)
    image_index = torch.arange(images).repeat_interleave(config.data.captions_per_image)
    said = PaddedCaptions.of(torch.full((captions, length), vocab.END), torch.full((captions,), length), image_index)
    said = said.each(lambda tensor: tensor.to(device))
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.autocast(device.type, kinds.get(config.precision), enabled=config.precision in kinds):
        logits, penalty = model(pixels, said)
    loss, _ = token_loss(logits, said.targets, len(said.targets), 1)
    (loss + penalty).backward()
    del moments
