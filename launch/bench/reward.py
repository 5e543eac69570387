"""The rewards of self-critical training: captions a second on one core beside pycocoevalcap's CIDEr, and the share of
a training step that is spent on them.

Samples are references in which a quarter of the words were exchanged, five an image; "from ids" adds to the counting of
n-grams what finds the words of token ids. Without --captions the references are those of drawn scenes, whose few words
make n-grams that most images share.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from captioning.data import vocabulary as vocab
from captioning.data.tokenizer import TOKENIZERS
from captioning.data.vocabulary import SPECIAL
from captioning.distributed.ranks import init_distributed
from captioning.evaluation.results import read_references
from captioning.metrics import references as counted
from captioning.metrics.ngrams import Integers
from captioning.metrics.ptb import CHARACTERS, CUTS, tokenizer_for
from captioning.metrics.references import END_WORD, References
from captioning.metrics.reward import Reward, Words, token_words
from captioning.model.captioner import Captioner
from captioning.training.objectives import SelfCritical, scope_alone
from captioning.training.objectives.self_critical import sample_words
from captioning.training.train_step import TrainStep
from launch.bench.cases import Case, add_case_arguments, alone, cases, noise_batch
from launch.bench.table import Cell, Table
from launch.bench.timing import side_by_side
from shards.sources import scenes

ON_GPU = ["resnet101:none:attention:bf16", "resnet101:none:transformer:bf16"]
ON_CPU = ["resnet18:none:attention:no", "resnet18:none:transformer:no"]
SAMPLES, IMAGES = 5, 64  # captions an image, images rewarded at once
FROM_IDS = ["words", "bpe", "characters"]  # of these tokenizers


def arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, ON_GPU, ON_CPU)
    parser.add_argument("--captions", type=Path, metavar="FILE", help="references: COCO's captions_*.json (scenes)")
    parser.add_argument("--images", type=int, default=5000, help="images whose references are taken (5000)")


def measure(arguments: argparse.Namespace) -> list[Table]:
    texts = _texts(arguments.captions, arguments.images)
    by = tokenizer_for(caption for captions in texts for caption in captions)
    words = [[CUTS[by](caption) for caption in captions] for captions in texts]
    references = counted.count(words)
    shown = arguments.captions or "drawn scenes"
    step = Table(f"Self-critical step, {arguments.batch_size} images, {SAMPLES} captions each", STEP_COLUMNS)
    step.rows = [alone(_share, case, references, arguments.rounds) for case in cases(arguments)]
    step.notes = ["rewards: words looked up, n-grams counted, CIDEr, and the signs of degenerate captions"]
    return [_rates(words, references, by, f"{shown}, {len(words):,} images", arguments.rounds), step]


def _texts(path: Path | None, images: int) -> list[tuple[str, ...]]:
    if path is None:
        return [tuple(scenes.captions(scenes.scene(0, "train", i))) for i in range(images)]
    return [reference.captions for reference in list(read_references(path).values())[:images]]


def _rates(words: list[list[list[str]]], references: References, by: str, title: str, rounds: int) -> Table:
    samples = _samples(words)
    numbers = {word: number for number, word in enumerate(references.words)}
    batches = []
    for first in range(0, len(words), IMAGES):
        of_batch = samples[first : first + IMAGES]
        captions = [[*(numbers[word] for word in caption), END_WORD] for drawn in of_batch for caption in drawn]
        flat, lengths = np.array([n for caption in captions for n in caption]), np.array(list(map(len, captions)))
        batches.append((Words(flat, lengths), np.repeat(np.arange(first, first + len(of_batch)), SAMPLES)))
    torch.set_num_threads(1)

    def ours(reward: Reward) -> Callable[[], int]:
        return lambda: sum(len(reward.of(*batch)) for batch in batches)

    runners = {"ours, CIDEr": ours(Reward(references)), "ours, CIDEr and BLEU-4": ours(Reward(references, 1.0, 1.0))}
    spoken = [("" if by == CHARACTERS else " ").join(caption) for drawn in samples for caption in drawn]
    for name in FROM_IDS:
        runners[f"ours, CIDEr, from ids of {name}"] = _from_ids(name, spoken, references, by)
    theirs = _pycocoevalcap(samples, words)
    if theirs is not None:
        runners["pycocoevalcap, CIDEr"] = theirs
    speeds = side_by_side(runners, rounds)
    last = speeds.get("pycocoevalcap, CIDEr")
    rows: list[list[Cell]] = [
        [name, speed.median, speed.over(last) if last else None, speed.spread] for name, speed in speeds.items()
    ]
    note = "pycocoevalcap: its n-grams and document frequencies were counted before; a caption an image at a time"
    return Table(f"Rewards on one core, {title}", RATE_COLUMNS, rows, [note])


def _from_ids(name: str, spoken: list[str], references: References, by: str) -> Callable[[], int]:
    tokenizer = TOKENIZERS[name].train(spoken, None, 1)
    tokens = [tokenizer.tokenize(caption) for caption in spoken]
    vocabulary = vocab.build(Counter(token for caption in tokens for token in caption), 1, None, tokenizer)
    found, reward, batches = sample_words(vocabulary, references, CUTS[by]), Reward(references), []
    for first in range(0, len(tokens), IMAGES * SAMPLES):
        of_batch = tokens[first : first + IMAGES * SAMPLES]
        lengths = np.array(list(map(len, of_batch)))
        ids = np.zeros((len(of_batch), lengths.max()), dtype=np.int64)
        for row, caption in zip(ids, of_batch, strict=True):
            row[: len(caption)] = [vocabulary.ids[token] for token in caption]
        batches.append((ids, lengths, np.arange(first, first + len(of_batch)) // SAMPLES))

    def rewarded(ids: Integers, lengths: Integers, images: Integers) -> int:
        words = found.of(ids, lengths).with_end(np.ones(len(images), dtype=bool))
        return len(reward.of(words, images))

    return lambda: sum(rewarded(*batch) for batch in batches)


def _samples(words: list[list[list[str]]]) -> list[list[list[str]]]:
    """Of each image SAMPLES captions."""
    chance = random.Random(0)
    pool = [word for captions in words for caption in captions for word in caption]

    def garbled(caption: list[str]) -> list[str]:
        return [word if chance.random() < 0.75 else chance.choice(pool) for word in caption]

    return [[garbled(chance.choice(captions)) for _ in range(SAMPLES)] for captions in words]


def _pycocoevalcap(samples: list[list[list[str]]], words: list[list[list[str]]]) -> Callable[[], int] | None:
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError:
        return None
    scorer = CiderScorer()
    for drawn, captions in zip(samples, words, strict=True):
        scorer += (" ".join([*drawn[0], "<end>"]), [" ".join([*caption, "<end>"]) for caption in captions])
    scorer.compute_doc_freq()
    return lambda: len(scorer.compute_cider())


RATE_COLUMNS = ["", "captions/s", "times pycocoevalcap", "slowest-fastest round"]
STEP_COLUMNS = ["", "ms a step", "ms of it for rewards", "share"]


@dataclass(frozen=True)
class _Timed(SelfCritical):
    """With the seconds that rewards took."""

    seconds: list[float] = field(default_factory=list)

    def _rewards(self, *arguments):
        start = time.perf_counter()
        rewards = super()._rewards(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return rewards


def _share(case: Case, references: References, rounds: int) -> list[Cell]:
    """A random model, which draws words at random and seldom ends: its captions are as long as captions get."""
    torch.manual_seed(0)
    accelerator, ranks = init_distributed(case.precision)
    vocabulary = (*SPECIAL, *references.words[1:])
    objective = _Timed(Reward(references), token_words(vocabulary, references, len(SPECIAL)), 0, 20, SAMPLES)
    captioner = Captioner(case.config, len(vocabulary))
    train_step = TrainStep(captioner, objective, case.config, accelerator, ranks, 1_000_000)
    batch = replace(noise_batch(case), samples=tuple(range(case.batch_size)))
    spent = []
    for step in range(rounds + 1):
        start = time.perf_counter()
        float(train_step.step(scope_alone(step, [batch]), [batch]).sums["reward"])
        spent.append(time.perf_counter() - start)
    whole, rewards = sum(spent[1:]) / rounds, sum(objective.seconds[1:]) / rounds  # the first one warms up
    return [str(case), 1e3 * whole, 1e3 * rewards, f"{rewards / whole:.1%}"]
