"""Other loaders, as their documentation shows them, from the images in our shards to training batches.

Each builder writes its own format where it has one, and gives an endless iterator of how many images a batch holds.
The data libraries are imported where they are used: those that are not installed are left out.
"""

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from captioning.data import vocabulary as vocab
from captioning.data.tokenizer import Words
from shards import index as shard_index
from shards.reader import Sample, read_samples

BATCH, CROP = 64, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Transform:
    """An image and its captions as a training sample: float and normalised or uint8, tokenizing or not."""

    def __init__(self, ids: dict[str, int], floats: bool, tokenize: bool):
        to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)] if floats else [transforms.PILToTensor()]
        steps = [transforms.Resize(256), transforms.RandomCrop(CROP), transforms.RandomHorizontalFlip(), *to_tensor]
        self.image, self.ids, self.tokenize = transforms.Compose(steps), ids, tokenize

    def __call__(self, image: Image.Image, captions: list[str]):
        words = [self._words(caption) for caption in captions] if self.tokenize else captions
        return self.image(image.convert("RGB")), words

    def _words(self, caption: str) -> torch.Tensor:
        ids = [self.ids.get(word, vocab.UNK) for word in Words().tokenize(caption)]
        return torch.tensor([vocab.START, *ids, vocab.END])


def collate(samples):
    images, captions = zip(*samples, strict=True)
    return torch.stack(images), captions


def endless(loader) -> Iterator[int]:
    while True:
        for batch in loader:
            yield len(batch[0])


def stored(shards: Path) -> list[Sample]:
    """All samples of a split."""
    index = shard_index.load(shards)
    return [sample for sample in read_samples(index, range(len(index))) if isinstance(sample, Sample)]


def webdataset(shards: Path, workers: int, ids: dict[str, int], floats: bool, tokenize: bool) -> Iterator[int]:
    """The stock library: shuffled shards, a shuffle buffer, Pillow, map, batched."""
    import webdataset as wds

    transform = Transform(ids, floats, tokenize)
    urls = [str(shard.path) for shard in shard_index.load(shards).shards]
    pipeline = (
        wds.WebDataset(urls, shardshuffle=100, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map(lambda sample: transform(sample[0], sample[1]["captions"]))
        .batched(BATCH, collation_fn=collate)
    )
    return endless(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))


def mosaic(shards: Path, work: Path, workers: int, ids: dict[str, int], tokenize: bool) -> Iterator[int]:
    """MosaicML streaming from its own MDS files."""
    from streaming import MDSWriter, StreamingDataset

    if not (work / "index.json").exists():
        with MDSWriter(out=str(work), columns={"jpg": "bytes", "captions": "str"}) as writer:
            for sample in stored(shards):
                writer.write({"jpg": sample.image_bytes, "captions": json.dumps(sample.captions)})
    transform = Transform(ids, False, tokenize)

    class Dataset(StreamingDataset):
        def __getitem__(self, at):
            sample = super().__getitem__(at)
            return transform(Image.open(io.BytesIO(sample["jpg"])), json.loads(sample["captions"]))

    dataset = Dataset(local=str(work), shuffle=True, batch_size=BATCH)
    return endless(DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate))


def litdata(shards: Path, work: Path, workers: int, ids: dict[str, int], tokenize: bool) -> Iterator[int]:
    """LitData from its own chunks."""
    import litdata as lit
    from litdata.streaming.writer import BinaryWriter

    if not (work / "index.json").exists():
        writer = BinaryWriter(str(work), chunk_bytes="64MB")
        for number, sample in enumerate(stored(shards)):
            writer[number] = {"jpg": sample.image_bytes, "captions": json.dumps(sample.captions)}
        writer.done()
        writer.merge()
    transform = Transform(ids, False, tokenize)

    class Dataset(lit.StreamingDataset):
        def __getitem__(self, at):
            sample = super().__getitem__(at)
            return transform(Image.open(io.BytesIO(sample["jpg"])), json.loads(sample["captions"]))

    dataset = Dataset(str(work), shuffle=True)
    return endless(lit.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate))


def ffcv(shards: Path, work: Path, workers: int) -> Iterator[int]:
    """FFCV from its own .beton of the same JPEG bytes: a random crop of what is stored, flip, uint8; no captions."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    path = work / "set.beton"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        images = [(np.asarray(Image.open(io.BytesIO(s.image_bytes))), n) for n, s in enumerate(stored(shards))]
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "number": IntField()}
        DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(images)
    decoder = RandomResizedCropRGBImageDecoder((CROP, CROP), scale=(0.6, 0.8), ratio=(1.0, 1.0))
    pipelines = {
        "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
        "number": [IntDecoder(), ToTensor()],
    }
    loader = Loader(str(path), BATCH, max(1, workers), order=OrderOption.RANDOM, drop_last=False, pipelines=pipelines)
    return endless(loader)


def dali(shards: Path, workers: int) -> Iterator[int]:
    """NVIDIA DALI's CPU path over our tars and .idx files: decode, random crop, flip, uint8; captions as raw json."""
    from nvidia.dali import fn, pipeline_def, types

    tars = [shard.path for shard in shard_index.load(shards).shards]

    @pipeline_def(batch_size=BATCH, num_threads=max(1, workers), device_id=None)
    def pipeline():
        jpegs, captions = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg", "json"],
            random_shuffle=True,
            initial_fill=1000,
            missing_component_behavior="error",
        )
        images = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB)
        x, y = fn.random.uniform(range=(0.0, 1.0)), fn.random.uniform(range=(0.0, 1.0))
        # Of an image that is smaller in one direction the crop's edge stays black.
        crop = {"crop": (CROP, CROP), "crop_pos_x": x, "crop_pos_y": y, "out_of_bounds_policy": "pad"}
        images = fn.crop(images, **crop, dtype=types.UINT8)
        return fn.flip(images, horizontal=fn.random.coin_flip()), captions

    built = pipeline()
    built.build()

    def batches():
        while True:
            images, captions = built.run()
            torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            [bytes(np.asarray(text)) for text in captions]
            yield len(images)

    return batches()


def bare_decoding(shards: Path, workers: int) -> Iterator[int]:
    """The JPEG library alone, from bytes in memory: the most that any loader of these images can do."""
    from captioning.data.transforms import decode

    images = [sample.image_bytes for sample in stored(shards)]
    if not workers:
        for image in itertools.cycle(images):
            decode(image)
            yield 1
    decoding = _Decoding(images)
    while True:
        for heights in DataLoader(decoding, batch_size=BATCH, num_workers=workers):
            yield len(heights)


class _Decoding(torch.utils.data.Dataset):
    def __init__(self, images: list[bytes]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images) * 100

    def __getitem__(self, number: int) -> int:
        from captioning.data.transforms import decode

        return decode(self.images[number % len(self.images)]).shape[0]


def vocabulary_of(shards: Path) -> dict[str, int]:
    """Words of a split's captions -> ids."""
    words = {w for text in shard_index.load(shards).texts() for c in text.captions for w in Words().tokenize(c)}
    return {word: number for number, word in enumerate([*vocab.SPECIAL, *sorted(words)])}
