"""What is benchmarked: a captioner, its precision and its batch; and batches made of noise, ready on the device."""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from captioning.config import Config, from_dict
from captioning.data.collate import CaptionBatch, pad_captions
from captioning.distributed.ranks import init_distributed
from captioning.model.captioner import Captioner
from captioning.training.objectives import CrossEntropy
from captioning.training.train_step import TrainStep
from shards.errors import InputError

Result = TypeVar("Result")
WORDS = 10_000  # in the vocabulary, about COCO's


@dataclass(frozen=True)
class Case:
    """``ENCODER:TRAINABLE:DECODER:PRECISION``, as resnet152:none:lstm:bf16; and images a step."""

    encoder: str
    trainable: str
    decoder: str
    precision: str
    batch_size: int
    image_size: int

    def __str__(self) -> str:
        trained = "frozen" if self.trainable == "none" else f"trained from {self.trainable}"
        return f"{self.encoder} {trained}, {self.decoder}, {'fp32' if self.precision == 'no' else self.precision}"

    @property
    def config(self) -> Config:
        """The run's config: 5 captions an image, an LSTM of 512, the whole batch in one micro-batch.

        Raises:
            InputError: when the case names no encoder, stage, decoder or precision.
        """
        return from_dict(
            {
                "run": "none",
                "precision": self.precision,
                "data": {"train": "noise", "image_size": self.image_size, "resize_size": max(256, self.image_size)},
                "encoder": {"name": self.encoder, "trainable": self.trainable},
                "decoder": {"name": self.decoder, "embedding_size": 512},
                "train": {
                    "global_batch_size": self.batch_size,
                    "micro_batch_size": self.batch_size,
                    "total_steps": 1_000_000,
                },
            },
            f"--case {self}",
        )


def add_case_arguments(parser: argparse.ArgumentParser, on_gpu: list[str], on_cpu: list[str]) -> None:
    """--case, --batch-size and --image-size, with defaults by what this machine has."""
    cuda = torch.cuda.is_available()
    defaults = on_gpu if cuda else on_cpu
    parser.add_argument(
        "--case", nargs="+", default=defaults, metavar="ENCODER:TRAINABLE:DECODER:PRECISION",
        help=f"what to measure ({' '.join(defaults)})",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=128 if cuda else 16, help="images a step (128; CPU: 16)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--rounds", type=int, default=5, help="turns each runner gets (5)")


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases asked for.

    Raises:
        InputError: for one that is not of the form, or names no encoder, stage, decoder or precision.
    """
    chosen = []
    for text in arguments.case:
        parts = text.split(":")
        if len(parts) != 4:
            raise InputError(f"--case {text}: it is written ENCODER:TRAINABLE:DECODER:PRECISION.")
        encoder, trainable, decoder, precision = parts
        chosen.append(Case(encoder, trainable, decoder, precision, arguments.batch_size, arguments.image_size))
        _ = chosen[-1].config  # refused here rather than half-way
    return chosen


def noise_batch(case: Case, captions: int = 5, seed: int = 0) -> CaptionBatch:
    """A batch of noise with captions as long as COCO's: 10.5 words on average, 6 to 20."""
    generator = torch.Generator().manual_seed(seed)
    size = (case.batch_size, 3, case.image_size, case.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    lengths = (10.5 + 2.4 * torch.randn(case.batch_size, captions, generator=generator)).round().long().clamp(6, 20)
    words = [[torch.randint(4, WORDS, (n,), generator=generator).numpy() for n in row] for row in lengths.tolist()]
    keys = tuple(str(i) for i in range(case.batch_size))
    images = images.contiguous(memory_format=torch.channels_last)
    return CaptionBatch(0, 0, images, pad_captions(words), keys, ())


def train_step_of(case: Case, vocabulary_size: int = WORDS) -> TrainStep:
    """The training step of a run on this machine's device, alone."""
    torch.manual_seed(0)
    accelerator, ranks = init_distributed(case.precision)
    captioner = Captioner(case.config, vocabulary_size)
    return TrainStep(captioner, CrossEntropy(), case.config, accelerator, ranks, 1_000_000)


def alone(work: Callable[..., Result], *arguments: object) -> Result:
    """What ``work`` returns in a process of its own: Accelerate has one precision a process, the device one peak."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()
