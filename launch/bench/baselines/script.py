"""The data side of the field's usual captioning scripts, written plainly as it is, for comparison only.

One caption is one sample: its image is opened with PIL, resized, cropped, flipped, made a float tensor and normalised,
and its words are tokenized, each time it is asked for, five times an epoch for an image with five captions.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from captioning.data.tokenizer import Words
from captioning.data.vocabulary import END, START, UNK

Batch = tuple[Tensor, Tensor, list[int]]  # images, captions sorted by length, lengths: see baseline_models


class BaselineCaptions(Dataset):
    """Caption ``i`` and its image: (float32 [3, S, S], int64 [T] with <start> and <end>)."""

    def __init__(self, captions: list[tuple[Path, str]], ids: dict[str, int], resize_size: int, image_size: int):
        self.captions, self.ids = captions, ids
        self.transform = transforms.Compose(
            [
                transforms.Resize(resize_size),
                transforms.RandomCrop(image_size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        path, caption = self.captions[number]
        with Image.open(path) as opened:
            image = self.transform(opened.convert("RGB"))
        words = [self.ids.get(word, UNK) for word in Words().tokenize(caption)]
        return image, torch.tensor([START, *words, END])


def baseline_collate(samples: list[tuple[Tensor, Tensor]]) -> Batch:
    """Stack images, pad captions; longest first, for packing."""
    samples = sorted(samples, key=lambda sample: len(sample[1]), reverse=True)
    lengths = [len(caption) for _, caption in samples]
    captions = torch.zeros(len(samples), max(lengths), dtype=torch.int64)
    for row, (_, caption) in zip(captions, samples, strict=True):
        row[: len(caption)] = caption
    return torch.stack([image for image, _ in samples]), captions, lengths
