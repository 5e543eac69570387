"""Which words a step of the search goes on with. Shapes as in search.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captioning.data.vocabulary import END, PAD
from captioning.model.draws import draw_words


@dataclass(frozen=True)
class BeamStep:
    """A step's decision, all [B, K]: each new beam's parent, word and log-probability ``total``, -inf for none;
    and the log-probability of old beams that end here, -inf for the others."""

    parents: Tensor
    words: Tensor
    total: Tensor
    ended: Tensor


def best_of_beams(total: Tensor, scores: Tensor, groups: int, diversity: float) -> BeamStep:
    """Beam search's step: ``total`` [B, K] of the beams so far, ``scores`` [B, K, V] of what follows.

    Within each group of G = K / groups beams, the G best continuations are taken: those with <end> end, and the best
    others go on in the G beams. A later group pays ``diversity`` for each earlier one that chose the same word.
    """
    images, beams, vocabulary = scores.shape
    size = beams // groups
    taken = scores.new_zeros(images, 1, vocabulary)
    parts = []
    for first in range(0, beams, size):
        of_group = slice(first, first + size)
        scored = scores[:, of_group]  # [B, G, V]
        ranked = scored - diversity * taken if groups > 1 else scored
        candidates = ranked.topk(min(size + 1, vocabulary), dim=2).indices  # of each beam: G others beside its <end>
        joint = total[:, of_group].unsqueeze(2) + scored.gather(2, candidates)
        paid = diversity * taken.expand(-1, size, -1).gather(2, candidates)
        best = (joint - paid).flatten(1).topk(2 * size, dim=1).indices  # G others beside the <end> of every beam
        parents, words = best // candidates.shape[2], candidates.flatten(1).gather(1, best)
        reached = joint.flatten(1).gather(1, best)
        ends = (words == END)[:, :size]
        ended = torch.full_like(total[:, of_group], -torch.inf)
        said = reached[:, :size].isfinite().to(taken.dtype)
        taken.scatter_add_(2, words[:, :size].unsqueeze(1), said.unsqueeze(1))
        ended.scatter_reduce_(1, parents[:, :size], reached[:, :size].masked_fill(~ends, -torch.inf), "amax")
        others = (words == END).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
        parents, words, reached = (x.gather(1, others) for x in (parents, words, reached))
        parts.append(BeamStep(parents + first, words, reached, ended))
    return BeamStep(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in BeamStep.__annotations__))


def sampled(
    total: Tensor,
    scores: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    numbers: Tensor,
) -> BeamStep:
    """Sampling's step: each caption goes on by itself with the word that its uniform number, of ``numbers`` float64
    [B, K], draws; ``total`` is of the probabilities as the model has them, before temperature and cuts."""
    images, captions, vocabulary = scores.shape
    tempered = (scores / temperature).flatten(0, 1)
    if top_k is not None and top_k < vocabulary:
        tempered = tempered.masked_fill(tempered < tempered.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = tempered.softmax(dim=1).sort(dim=1, descending=True)
        beyond = ordered.cumsum(dim=1) - ordered >= top_p  # the words before it suffice
        tempered = tempered.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    words = draw_words(tempered, numbers.flatten()).view(images, captions)
    reached = total + scores.gather(2, words.unsqueeze(2)).squeeze(2)
    ends = words == END
    parents = torch.arange(captions, device=scores.device).expand(images, captions)
    return BeamStep(parents, words, reached.masked_fill(ends, -torch.inf), reached.masked_fill(~ends, -torch.inf))


def ban_repeats(scores: Tensor, history: Tensor, n: int) -> None:
    """Set the ``scores`` [R, V] of words to -inf that would complete an n-gram of ``history`` [R, t] a second time."""
    length = history.shape[1]
    if length < n:
        return
    grams = history.unfold(1, n, 1)  # [R, t - n + 1, n]
    repeats = (grams[:, :, :-1] == history[:, length - n + 1 :].unsqueeze(1)).all(dim=2)
    # Every n-gram that begins as the caption now ends bans its last word; the others ban <pad>, which never comes.
    scores.scatter_(1, torch.where(repeats, grams[:, :, -1], PAD), -torch.inf)
