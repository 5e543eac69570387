"""Exact evaluation by any number of processes: every image captioned once, scored once, together."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from captioning.config import Config
from captioning.data.collate import ImageBatch
from captioning.data.dataset import EvaluationBatches
from captioning.data.loader import evaluation_loader, loader_workers
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.distributed.ranks import Ranks
from captioning.evaluation.results import Reference, ScoredCaptions
from captioning.evaluation.scores import evaluate
from captioning.model.captioner import Captioner
from captioning.model.features import Features
from captioning.model.search import SearchOptions, options_of, search_features
from shards.errors import InputError
from shards.index import Index
from shards.order import rank_part


@dataclass(frozen=True)
class Captions:
    """Generated captions of a split by sample number, and the images that could not be read."""

    of_sample: dict[int, str]
    unreadable: list[str]

    def match_references(self, index: Index) -> ScoredCaptions:
        """The captions and their references, in its order; missing: unreadable images, those without references.

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
            (*self.unreadable, *(f"{text.key}: it has no references" for text, _ in captioned if not text.captions)),
        )

    def results(self, index: Index) -> list[dict[str, object]]:
        """COCO results format; see ``ScoredCaptions.results``."""
        texts = index.texts()
        return [{"image_id": texts[s].image_id, "caption": caption} for s, caption in sorted(self.of_sample.items())]


@dataclass(frozen=True)
class EncodedImages:
    """Images just captioned: their numbers in the split, and on the device their features, for what else is asked of
    them."""

    samples: tuple[int, ...]
    features: Features


class CaptionSplit:
    """Captions every image of a split, searched for as ``config.evaluate`` or ``options`` say; each rank takes a
    contiguous part.

    Iterating does the work, a batch at a time and equally often on every rank: a round yields the images just
    captioned, or None where a rank has none left. So the ranks can agree between two rounds to give up. ``gather`` then
    has the captions of all ranks.

    Ranks take whole batches of the split's order: the batches an image is in are the same for any number of ranks, and
    with them its caption. The model's BatchNorm buffers must be alike on all ranks; it is left in the mode it came in.
    """

    def __init__(
        self,
        model: Captioner,
        vocabulary: Vocabulary,
        index: Index,
        config: Config,
        ranks: Ranks,
        device: torch.device,
        options: SearchOptions | None = None,
    ):
        self.options = options or options_of(config.evaluate)
        self.model, self.vocabulary, self.index, self.config = model, vocabulary, index, config
        self.ranks, self.device = ranks, device
        size = config.evaluate.batch_size
        self._batches_of_split = -(-len(index) // size)
        first, last = rank_part(0, self._batches_of_split, ranks.rank, ranks.world_size)
        self.start, self.stop = first * size, min(last * size, len(index))  # this rank's part
        self.done = 0  # images of it
        self._captions: dict[int, str] = {}
        self._unreadable: list[str] = []
        self._error: str | None = None

    def __iter__(self) -> Iterator[EncodedImages | None]:
        batches = EvaluationBatches(self.index, preprocessing_of(self.config))
        size, workers = self.config.evaluate.batch_size, loader_workers(self.config)
        pin_memory = self.device.type == "cuda"
        loader = evaluation_loader(batches, self.start, self.stop, size, workers, pin_memory)
        training = self.model.training
        self.model.eval()
        try:
            for _ in range(-(-self._batches_of_split // self.ranks.world_size)):
                try:
                    batch = next(loader, None)  # None where this rank's part is a batch shorter
                except InputError as error:  # told to all ranks by ``gather``
                    self._error, batch, loader = str(error), None, iter(())
                yield None if batch is None else self._caption(batch)
        finally:
            self.model.train(training)

    @torch.inference_mode()
    def _caption(self, batch: ImageBatch) -> EncodedImages | None:
        self._unreadable += map(str, batch.unreadable)
        self.done += len(batch.samples) + len(batch.unreadable)
        if not batch.samples:
            return None
        batch = batch.to(self.device)
        features = self.model.encode(batch.inputs, batch.valid)
        max_words = self.config.data.max_words
        results = search_features([self.model], [features], self.options, max_words, batch.samples, best_only=True)
        for sample, best in zip(batch.samples, results, strict=True):
            self._captions[sample] = self.vocabulary.decode(best[0].ids if best else ())  # none: output not finite
        return EncodedImages(batch.samples, features)

    def gather(self) -> Captions:
        """All ranks' captions, on every rank.

        Raises:
            InputError: on every rank, when one could not read its samples, or none of them any image.
        """
        if errors := [error for error in self.ranks.all_gather(self._error) if error]:
            raise InputError(errors[0])
        parts = self.ranks.all_gather((self._captions, self._unreadable))
        if not any(captions for captions, _ in parts):
            raise InputError(f"No image of {self.index.path} could be read: there is nothing to score.")
        return Captions(
            {sample: caption for captions, _ in parts for sample, caption in captions.items()},
            [line for _, unreadable in parts for line in unreadable],
        )


def score_captions(captions: Captions, index: Index) -> dict[str, float]:
    """Scores of generated captions against the split's references, by name; see ``captioning.evaluation.scores``."""
    return evaluate(captions.match_references(index)).scores
