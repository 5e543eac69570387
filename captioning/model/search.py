"""From models to captions, batched on the device: greedy and beam search, diverse beams, sampling, ensembles.

Shapes: B images, K captions kept of each (beams or samples), R = B * K rows image by image, P places, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captioning.config import EvaluateConfig
from captioning.data.vocabulary import END, PAD, START, UNK
from captioning.model.beam_step import banned_repeats, best_of_beams, sampled
from captioning.model.captioner import Captioner
from captioning.model.draws import caption_keys, uniform


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


@dataclass(frozen=True)
class Hypothesis:
    """A caption: word ids without <end>, and the natural logarithm of its probability, <end> counted in.

    ``attention`` float32 [len(ids), P] says where the model looked for each word; None where it does not look.
    """

    ids: tuple[int, ...]
    log_probability: float
    attention: Tensor | None = None


def options_of(config: EvaluateConfig) -> SearchOptions:
    """The search a config asks for."""
    return SearchOptions(config.beam_size, config.length_penalty, config.min_words, config.no_repeat_ngram)


@torch.inference_mode()
def search(
    models: Sequence[Captioner],
    inputs: Tensor,
    options: SearchOptions,
    max_words: int,
    image_numbers: Sequence[int] | None = None,
    valid: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Captions of B images, pixels or features and their ``valid`` as ``Captioner.encode`` takes them: for each up to
    ``beam_size``, the best first; none of an image for which the models' output is not finite.

    Several models (in evaluation mode, of one vocabulary) vote by the mean of their probabilities. <pad>, <start> and
    <unk> are never chosen; a caption of ``max_words`` words ends there. Attention is the first model's. What is drawn
    for an image depends on the seed and its number of ``image_numbers`` (its place in the batch), not on the batch.
    """
    scorer = _Scorer(models, inputs, valid, options, max_words)
    device, shape = inputs.device, (len(inputs), options.beam_size)
    keys = caption_keys(options.seed, range(len(inputs)) if image_numbers is None else image_numbers, shape[1], device)
    words = torch.full((len(inputs) * options.beam_size,), START, device=device)
    group_size = options.beam_size // options.beam_groups
    total = torch.zeros(shape, device=device)  # log-probability of each caption so far; -inf: there is none
    if options.temperature is None:
        total.unflatten(1, (-1, group_size))[:, :, 1:] = -torch.inf  # a group's beams begin alike: one is enough
    ended = torch.zeros(shape[0], options.beam_groups, dtype=torch.int64, device=device)  # captions of each group
    trace: list[_Step] = []
    for t in range(max_words + 1):
        scores = scorer.scores(words, t).unflatten(0, shape)  # [B, K, V]
        if options.temperature is not None:
            chosen = sampled(total, scores, options.temperature, options.top_k, options.top_p, uniform(keys, t))
        else:
            chosen = best_of_beams(total, scores, options.beam_groups, options.diversity)
        finals = chosen.ended.masked_fill((ended >= group_size).repeat_interleave(group_size, dim=1), -torch.inf)
        trace.append(_Step(chosen.parents, chosen.words, finals, scorer.weights(shape)))
        ended = ended + finals.isfinite().unflatten(1, (-1, group_size)).sum(dim=2)
        none_left = chosen.total.isneginf().unflatten(1, (-1, group_size)).all(dim=2)
        if t == max_words or bool(((ended >= group_size) | none_left).all()):
            break
        total = chosen.total
        rows = (torch.arange(shape[0], device=device).unsqueeze(1) * shape[1] + chosen.parents).flatten()
        words = chosen.words.flatten()
        scorer.reorder(rows, words)
    return _read_back([step.to_cpu() for step in trace], options)


class _Scorer:
    """The models' states, and what they say of the next word under the search's rules."""

    def __init__(
        self,
        models: Sequence[Captioner],
        inputs: Tensor,
        valid: Tensor | None,
        options: SearchOptions,
        max_words: int,
    ):
        rows = torch.arange(len(inputs), device=inputs.device).repeat_interleave(options.beam_size)
        self.decoders: list[Any] = [model.decoder for model in models]
        self.states: list[Any] = [model.decoder.start(model.encode(inputs, valid)).select(rows) for model in models]
        self.options, self.max_words = options, max_words
        self.history = torch.empty(len(rows), 0, dtype=torch.int64, device=inputs.device)  # words of each row

    def scores(self, words: Tensor, t: int) -> Tensor:
        """Log-probabilities [R, V] of what follows ``words`` [R] as word ``t``; -inf for what may not."""
        said = []
        for i, decoder in enumerate(self.decoders):
            logits, self.states[i] = decoder.step(self.states[i], words)
            said.append(logits.float().log_softmax(dim=-1))
        scores = said[0] if len(said) == 1 else torch.stack(said).logsumexp(dim=0) - math.log(len(said))
        end = scores[:, END].clone()
        for never in (PAD, START, UNK):
            scores[:, never] = -torch.inf
        if t < self.options.min_words:
            scores[:, END] = -torch.inf
        if self.options.no_repeat_ngram:
            scores = scores.masked_fill(
                banned_repeats(self.history, self.options.no_repeat_ngram, scores.shape[1]), -torch.inf
            )
        if t == self.max_words:
            scores = torch.full_like(scores, -torch.inf)
        # A caption that nothing may follow ends.
        scores[:, END] = torch.where(scores.isneginf().all(dim=1), end, scores[:, END])
        return scores

    def weights(self, shape: tuple[int, int]) -> Tensor | None:
        """Where the first model looked for the words just scored: [B, K, P]."""
        weights = self.states[0].weights
        return None if weights is None else weights.unflatten(0, shape)

    def reorder(self, rows: Tensor, words: Tensor) -> None:
        """Go on from ``rows`` [R], each followed by its word of ``words`` [R]."""
        self.states = [state.select(rows) for state in self.states]
        self.history = torch.cat([self.history[rows], words.unsqueeze(1)], dim=1)


@dataclass(frozen=True)
class _Step:
    """What a step decided, all [B, K]: the beam that goes on as this one and with which word; and, of the beams
    before it, the log-probability of those that ended here (-inf for the others) and where they looked [B, K, P]."""

    parents: Tensor
    words: Tensor
    ended: Tensor
    weights: Tensor | None

    def to_cpu(self) -> "_Step":
        weights = None if self.weights is None else self.weights.cpu()
        return _Step(self.parents.cpu(), self.words.cpu(), self.ended.cpu(), weights)


def _read_back(trace: list[_Step], options: SearchOptions) -> list[list[Hypothesis]]:
    """The ended captions of each image, the best first: of every group as many as it has beams."""
    size, hypotheses = options.beam_size // options.beam_groups, []
    for image in range(len(trace[0].words)):
        ends: list[list[tuple[float, int, int, float]]] = [[] for _ in range(options.beam_groups)]
        for t, step in enumerate(trace):
            for beam, log_probability in enumerate(step.ended[image].tolist()):
                if log_probability > -math.inf:
                    rank = -log_probability / (t + 1) ** options.length_penalty
                    ends[beam // size].append((rank, t, beam, log_probability))
        kept = sorted(end for group in ends for end in sorted(group)[:size])
        hypotheses.append([_backtrack(trace, image, t, beam, total) for _, t, beam, total in kept])
    return hypotheses


def _backtrack(trace: list[_Step], image: int, t: int, beam: int, log_probability: float) -> Hypothesis:
    """The caption that ended at step ``t`` in ``beam``, followed back to its start."""
    ids, looks = [], []
    for step in reversed(trace[:t]):
        ids.append(int(step.words[image, beam]))
        beam = int(step.parents[image, beam])
        if step.weights is not None:
            looks.append(step.weights[image, beam])
    attention = None
    if trace[0].weights is not None:
        attention = torch.stack(looks[::-1]) if looks else trace[0].weights.new_zeros(0, trace[0].weights.shape[2])
    return Hypothesis(tuple(ids[::-1]), log_probability, attention)
