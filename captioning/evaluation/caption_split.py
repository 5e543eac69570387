"""Exact evaluation by any number of processes: every image captioned once, scored once, together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from captioning.config import Config
from captioning.data.batches import EvaluationBatches, ImageBatch, error_message, evaluation_loader
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.distributed.ranks import Ranks
from captioning.evaluation.results import Reference, ScoredCaptions
from captioning.evaluation.scores import evaluate
from captioning.model.captioner import Captioner
from captioning.model.search import options_of, search
from shards.errors import InputError
from shards.index import Index
from shards.order import rank_part


@dataclass(frozen=True)
class Captions:
    """Generated captions of a split by sample number, and the images that could not be read."""

    of_sample: dict[int, str]
    holes: list[str]

    def match_references(self, index: Index) -> ScoredCaptions:
        """The captions beside the split's references, in its order; missing: holes and images without references.

        Raises:
            InputError: when no captioned image has a reference.
        """
        texts = index.texts()
        captioned = [(texts[sample], caption) for sample, caption in sorted(self.of_sample.items())]
        known = [(text, caption) for text, caption in captioned if text.captions]
        if not known:
            raise InputError(f"No image of {index.path} has a caption to compare with: there is nothing to score.")
        return ScoredCaptions(
            tuple(text.image_id for text, _ in known),
            tuple(caption for _, caption in known),
            tuple(Reference(text.captions, text.label) for text, _ in known),
            (*self.holes, *(f"{text.key}: it has no references" for text, _ in captioned if not text.captions)),
        )

    def results(self, index: Index) -> list[dict[str, object]]:
        """COCO results format; see ``ScoredCaptions.results``."""
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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    between_batches: Callable[[], None] = lambda: None,
    also: Callable[[Tensor, tuple[int, ...]], None] = lambda images, samples: None,
) -> Captions:
    """Caption every image of a split, searched for as ``config.evaluate`` says; each rank takes a contiguous part, all
    get the whole.

    Ranks take whole batches of the split's order, so that the batches an image is in are the same for any number of
    ranks, and with them its caption.

    The model's BatchNorm buffers must be alike on all ranks. It is left in the mode it came in. ``between_batches`` is
    called equally often on every rank, so that they can agree in it to give up: what it raises ends the work.
    ``also`` gets every batch too: uint8 [B, 3, S, S] on the device, and the images' numbers in the split.

    Raises:
        InputError: on every rank, when one cannot read its samples, or none of them any image.
    """
    size = config.evaluate.batch_size
    batches_of_split = -(-len(index) // size)
    first, last = rank_part(0, batches_of_split, ranks.rank, ranks.world_size)
    start, stop = first * size, min(last * size, len(index))
    training = model.training
    model.eval()
    captions: dict[int, str] = {}
    holes: list[str] = []
    batches = EvaluationBatches(index, preprocessing_of(config))
    loader: Iterator[ImageBatch] = iter(evaluation_loader(batches, start, stop, size, workers))
    options = options_of(config.evaluate)
    objection: str | None = None
    try:
        for _ in range(-(-batches_of_split // ranks.world_size)):
            between_batches()
            try:
                read = list(islice(loader, 1))  # none, where this rank's part is a batch shorter
            except InputError as error:
                objection, read, loader = error_message(error), [], iter(())
            for batch in read:
                holes += map(str, batch.holes)
                if batch.samples:
                    images = batch.images.to(device)
                    found = search([model], images, options, config.data.max_words)
                    also(images, batch.samples)
                    captions |= {
                        s: vocabulary.decode(best[0].ids if best else ())  # none: the output was not finite
                        for s, best in zip(batch.samples, found, strict=True)
                    }
                on_progress(len(captions) + len(holes), stop - start)
    finally:
        model.train(training)
    if objections := [each for each in ranks.all_gather(objection) if each]:
        raise InputError(objections[0])
    parts = ranks.all_gather((captions, holes))
    if not any(part for part, _ in parts):
        raise InputError(f"No image of {index.path} could be read: there is nothing to score.")
    return Captions({s: c for part, _ in parts for s, c in part.items()}, [h for _, part in parts for h in part])


def score_captions(captions: Captions, index: Index) -> dict[str, float]:
    """Scores of generated captions against the split's references, by name; see ``captioning.evaluation.scores``."""
    return evaluate(captions.match_references(index)).scores
