"""From models to captions, batched on the device: greedy and beam search, diverse beams, sampling, ensembles.

Shapes: B images, K captions kept of each (beams or samples), R = B * K rows image by image, P places, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captioning.config import EvaluateConfig
from captioning.data.vocabulary import END, PAD, START, UNK
from captioning.model.beam_step import BeamStep, ban_repeats, best_of_beams, sampled
from captioning.model.captioner import Captioner
from captioning.model.draws import caption_keys, uniform
from captioning.model.features import Features
from captioning.model.hypotheses import Hypothesis, Trace

_WORTH_LEAVING = 1 / 8  # images are left behind when this part of them has finished: it copies the others' state


@dataclass(frozen=True)
class SearchOptions:
    """How captions are looked for. The defaults are greedy search.

    ``beam_size`` captions are kept at every step, until as many have ended. They are ranked by log-probability divided
    by (words + 1) ** ``length_penalty``: 0 ranks by probability, which favours the short, 1 by the mean per word.
    ``beam_groups`` > 1 makes the beams of later groups pay ``diversity`` for every earlier group that chooses the same
    word at the same step (Vijayakumar et al., https://arxiv.org/abs/1610.02424). A ``temperature`` draws words rather
    than choosing the likeliest, ``beam_size`` captions an image, among the ``top_k`` likeliest words, or the fewest
    that hold ``top_p`` of the probability (Holtzman et al., https://arxiv.org/abs/1904.09751), or both.
    """

    beam_size: int = 1
    length_penalty: float = 0.0
    min_words: int = 0
    no_repeat_ngram: int = 0  # no n words in a row twice in a caption; 0: they may
    beam_groups: int = 1
    diversity: float = 0.5
    temperature: float | None = None
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.beam_groups < 1 or self.beam_size % self.beam_groups:
            raise ValueError(f"beam_size={self.beam_size} must be a multiple of beam_groups={self.beam_groups}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; leave it out for the likeliest words")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out for all words")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


def options_of(config: EvaluateConfig) -> SearchOptions:
    """The search a config asks for."""
    return SearchOptions(config.beam_size, config.length_penalty, config.min_words, config.no_repeat_ngram)


def search(
    models: Sequence[Captioner],
    inputs: Tensor,
    options: SearchOptions,
    max_words: int,
    image_numbers: Sequence[int] | None = None,
    valid: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """``search_features`` of B images: pixels or features and their ``valid`` as ``Captioner.encode`` takes them."""
    with torch.inference_mode():
        features = [model.encode(inputs, valid) for model in models]
    return search_features(models, features, options, max_words, image_numbers)


@torch.inference_mode()
def search_features(
    models: Sequence[Captioner],
    features: Sequence[Features],
    options: SearchOptions,
    max_words: int,
    image_numbers: Sequence[int] | None = None,
    best_only: bool = False,
) -> list[list[Hypothesis]]:
    """Captions of B images, whose ``features`` each model has: for each up to ``beam_size``, the best first; none of an
    image for which the models' output is not finite.

    Several models (in evaluation mode, of one vocabulary) vote by the mean of their probabilities. <pad>, <start> and
    <unk> are never chosen; a caption of ``max_words`` words ends there. Attention is the first model's. What is drawn
    for an image depends on the seed and its number of ``image_numbers`` (its place in the batch), not on the batch.
    With ``best_only`` an image's search ends when its first caption is certain: others may be missing.
    """
    device, images = features[0].device, len(features[0])
    scorer = _Scorer(models, features, options, max_words)
    trace = Trace(max_words + 1, images, options.beam_size, device)
    beams = _Beams.start(range(images) if image_numbers is None else image_numbers, options, device)
    for t in range(max_words + 1):
        scores = scorer.scores(beams.words, t)
        if options.temperature is not None:
            numbers = uniform(beams.keys, t)
            step = sampled(beams.total, scores, options.temperature, options.top_k, options.top_p, numbers)
        else:
            step = best_of_beams(beams.total, scores, options.beam_groups, options.diversity)
        new_ends = step.ended.masked_fill(beams.full, -torch.inf)
        trace.add(beams.images, step, new_ends, scorer.weights())
        if t == max_words:
            break
        beams, going = beams.after(step, new_ends, (t + 1) ** options.length_penalty), None
        if (t + 1) % words_between_asks(device) == 0:
            divisors = ((words + 1) ** options.length_penalty for words in (t + 1, max_words))
            going = beams.unfinished(max(divisors) if best_only else None)
            if not len(going):
                break
            going = going if len(going) <= (1 - _WORTH_LEAVING) * len(beams.images) else None
        beams = beams if going is None else beams.of(going)
        scorer.follow(beams, going)
    return trace.best(options.beam_groups, options.length_penalty).hypotheses()


def words_between_asks(device: torch.device) -> int:
    """How often to ask whether captions have ended. A GPU that is asked has to finish all its work before the next can
    be given to it: words said in vain cost less."""
    return 1 if device.type == "cpu" else 4


@dataclass(frozen=True)
class _Beams:
    """The captions of the I images still searched for: ``images`` int64 [I] are their places in the batch, ``keys``
    int64 [I, K] what draws go by; [I, K] too the last step's ``parents`` and ``words`` and the log-probability
    ``total``, -inf where there is none. ``ended`` int64 [I, groups]: captions of each group that have; the ``best``
    of an image's is ranked by float64 [I], -inf before one has."""

    images: Tensor
    keys: Tensor
    parents: Tensor
    words: Tensor
    total: Tensor
    ended: Tensor
    best: Tensor

    @staticmethod
    def start(numbers: Sequence[int], options: SearchOptions, device: torch.device) -> "_Beams":
        """Before the first word; ``numbers`` [B] are the images'."""
        images = torch.arange(len(numbers), device=device)
        keys = caption_keys(options.seed, numbers, options.beam_size, device)
        total = torch.zeros(keys.shape, device=device)
        if options.temperature is None:
            total.unflatten(1, (options.beam_groups, -1))[:, :, 1:] = -torch.inf  # beams begin alike: one is enough
        ended = keys.new_zeros(len(numbers), options.beam_groups)
        best = torch.full_like(images, -torch.inf, dtype=torch.float64)
        return _Beams(images, keys, torch.zeros_like(keys), torch.full_like(keys, START), total, ended, best)

    @property
    def group_size(self) -> int:
        return self.words.shape[1] // self.ended.shape[1]

    @property
    def full(self) -> Tensor:
        """bool [I, K]: beams of groups of which enough captions have ended."""
        return (self.ended >= self.group_size).repeat_interleave(self.group_size, dim=1)

    def after(self, step: BeamStep, ends: Tensor, divisor: float) -> "_Beams":
        """After a step that ended captions with log-probability ``ends`` [I, K], by whose ``divisor`` they rank."""
        ended = self.ended + ends.isfinite().unflatten(1, (-1, self.group_size)).sum(dim=2)
        best = torch.maximum(self.best, ends.double().amax(dim=1) / divisor)
        return replace(self, parents=step.parents, words=step.words, total=step.total, ended=ended, best=best)

    def unfinished(self, divisor: float | None) -> Tensor:
        """Which images have a caption still to end, int64 [J]; given a ``divisor``, the largest of a caption to come,
        those that may yet have a better one than their best: log-probabilities only fall. Waits for the device."""
        over = (self.full | self.total.isneginf()).all(dim=1)
        if divisor is not None:
            over = over | (self.best >= self.total.double().amax(dim=1) / divisor)
        return (~over).nonzero().squeeze(1)

    def of(self, going: Tensor) -> "_Beams":
        """Those of images ``going`` [J]."""
        return _Beams(*(value[going] for value in vars(self).values()))


class _Scorer:
    """The models' states, and what they say of the next word under the search's rules."""

    def __init__(
        self, models: Sequence[Captioner], features: Sequence[Features], options: SearchOptions, max_words: int
    ):
        self.decoders: list[Any] = [model.decoder for model in models]
        self.states: list[Any] = [
            model.decoder.start(of_model) for model, of_model in zip(models, features, strict=True)
        ]
        self.options, self.max_words = options, max_words
        # An image's captions begin alike: before the first word it has one row, then K.
        self.rows_per_image = 1
        device = features[0].device
        self.history = torch.empty(len(features[0]), 0, dtype=torch.int64, device=device)  # words of each row
        self.never = torch.tensor([PAD, START, UNK], device=device)

    def scores(self, words: Tensor, t: int) -> Tensor:
        """Log-probabilities [I, K, V] of what follows ``words`` [I, K] as word ``t``; -inf for what may not."""
        said, options = [], self.options
        rows = words[:, : self.rows_per_image].flatten()
        for i, decoder in enumerate(self.decoders):
            logits, self.states[i] = decoder.step(self.states[i], rows)
            said.append(logits.float().log_softmax(dim=-1))
        scores = said[0] if len(said) == 1 else torch.stack(said).logsumexp(dim=0) - math.log(len(said))
        end = scores[:, END].clone()
        scores.index_fill_(1, self.never, -torch.inf)
        if t < options.min_words:
            scores[:, END] = -torch.inf
        if options.no_repeat_ngram:
            ban_repeats(scores, self.history, options.no_repeat_ngram)
        if t == self.max_words:
            scores.fill_(-torch.inf)
        if t == self.max_words or t < options.min_words:  # a caption that nothing may follow ends
            scores[:, END] = torch.where(scores.amax(dim=1).isneginf(), end, scores[:, END])
        return scores.unflatten(0, (len(words), -1)).expand(-1, words.shape[1], -1)

    def weights(self) -> Tensor | None:
        """Where the first model looked for the words just scored: [I, K, P]."""
        weights = self.states[0].weights
        if weights is None:
            return None
        return weights.unflatten(0, (-1, self.rows_per_image)).expand(-1, self.options.beam_size, -1)

    def follow(self, beams: _Beams, images: Tensor | None) -> None:
        """Go on with ``beams``; of those before they are ``images`` [J], None: all."""
        going = torch.arange(len(beams.images), device=beams.words.device) if images is None else images
        parents = beams.parents.clamp(max=self.rows_per_image - 1)
        rows = (going.unsqueeze(1) * self.rows_per_image + parents).flatten()
        stay = images is None and self.rows_per_image == self.options.beam_size
        if not stay or (self.options.beam_size > 1 and self.options.temperature is None):
            self.states = [state.select(rows, images) for state in self.states]
            self.history = self.history[rows]
        self.rows_per_image = self.options.beam_size
        if self.options.no_repeat_ngram:
            self.history = torch.cat([self.history, beams.words.flatten().unsqueeze(1)], dim=1)
