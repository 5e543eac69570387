"""Exact evaluation by any number of processes: every image captioned once, scored once, together."""

from dataclasses import dataclass
from itertools import islice

import torch

from captioning.config import Config
from captioning.data.batches import EvaluationBatches, evaluation_loader
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.model.captioner import Captioner
from captioning.model.search import options_of, search
from captioning.ranks import Ranks
from captioning.scoring.metrics import cider, mean_of, measure
from captioning.scoring.ngrams import corpus
from captioning.scoring.ptb import words_for_scoring
from shards.errors import InputError
from shards.index import Index
from shards.order import rank_part


@dataclass(frozen=True)
class Captions:
    """Generated captions of a split by sample number, and the images that could not be read."""

    of_sample: dict[int, str]
    holes: list[str]

    def results(self, index: Index) -> list[dict[str, object]]:
        """COCO results format (https://cocodataset.org/#format-results): a list of image_id and caption."""
        texts = index.texts()
        return [{"image_id": texts[s].image_id, "caption": caption} for s, caption in sorted(self.of_sample.items())]


def caption_split(
    model: Captioner,
    vocabulary: Vocabulary,
    index: Index,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    workers: int,
    on_progress=lambda done, total: None,
    between_batches=lambda: None,
) -> Captions:
    """Caption every image of a split, searched for as ``config.evaluate`` says; each rank takes a contiguous part, all
    get the whole.

    The model's BatchNorm buffers must be alike on all ranks. It is left in the mode it came in. ``between_batches`` is
    called equally often on every rank, so that they can agree in it to give up: what it raises ends the work.

    Raises:
        InputError: on every rank, when no image of the split could be read.
    """
    start, stop = rank_part(0, len(index), ranks.rank, ranks.world_size)
    training = model.training
    model.eval()
    captions: dict[int, str] = {}
    holes: list[str] = []
    batches = EvaluationBatches(index, preprocessing_of(config))
    loader = iter(evaluation_loader(batches, start, stop, config.evaluate.batch_size, workers))
    largest_part = -(-len(index) // ranks.world_size)
    options = options_of(config.evaluate)
    try:
        for _ in range(0, largest_part, config.evaluate.batch_size):
            between_batches()
            for batch in islice(loader, 1):  # none, where this rank's part is a batch shorter
                holes += map(str, batch.holes)
                if batch.samples:
                    found = search([model], batch.images.to(device), options, config.data.max_words)
                    captions |= {
                        s: vocabulary.decode(best[0].ids) for s, best in zip(batch.samples, found, strict=True)
                    }
                on_progress(len(captions) + len(holes), stop - start)
    finally:
        model.train(training)
    parts = ranks.gathered((captions, holes))
    if not any(part for part, _ in parts):
        raise InputError(f"No image of {index.path} could be read: there is nothing to score.")
    return Captions({s: c for part, _ in parts for s, c in part.items()}, [h for _, part in parts for h in part])


def score_captions(captions: Captions, index: Index) -> dict[str, float]:
    """Metrics of generated captions against the split's references.

    ``CIDEr-D, wrong images`` scores the same captions against each next image's references: what a model gets that
    writes plausible captions without looking. A model that looks scores well above it.
    """
    texts = index.texts()
    samples = sorted(captions.of_sample)
    candidates = [words_for_scoring(captions.of_sample[s]) for s in samples]
    references = [[words_for_scoring(c) for c in texts[s].captions] for s in samples]
    wrong = mean_of("CIDEr-D, wrong images", cider(corpus(candidates, references[1:] + references[:1], 4), True))
    return {metric.name: metric.value for metric in [*measure(candidates, references), wrong]}
