"""Samples of captions for self-critical training: all of a batch at once, on the device, from features already there.

Shapes as in search.py. The policy: <pad>, <start> and <unk> are never said, so their probability is shared out among
the other words; a caption of ``max_words`` words stops there, without an <end> that nobody drew.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import END, PAD, START, UNK
from captioning.model.draws import draw_words, uniform
from captioning.model.features import Features
from captioning.model.search import words_between_asks

_NEVER = (PAD, START, UNK)


def policy(logits: Tensor) -> Tensor:
    """Log-probabilities float32 [..., V] of the words a caption may go on with; -inf for those it may not."""
    never = torch.tensor(_NEVER, device=logits.device)
    return F.log_softmax(logits.float().index_fill(-1, never, -torch.inf), dim=-1)


@dataclass(frozen=True)
class Samples:
    """K captions of each of B images: ``token_ids`` int64 [B, K, T], padded with <pad>, <end> not among them, and
    ``lengths`` int64 [B, K]. A caption shorter than ``max_words`` ended by itself. T may be more than the longest."""

    token_ids: Tensor
    lengths: Tensor
    max_words: int

    @property
    def ended(self) -> Tensor:
        """bool [B, K]: captions whose <end> was drawn."""
        return self.lengths < self.max_words

    def cpu(self) -> "Samples":
        return Samples(self.token_ids.cpu(), self.lengths.cpu(), self.max_words)

    def first(self, captions: int) -> "Samples":
        """The first captions of every image."""
        return Samples(self.token_ids[:, :captions], self.lengths[:, :captions], self.max_words)

    def padded(self) -> PaddedCaptions:
        """As targets of teacher forcing, image by image, with the <end> of those that ended; from samples on the CPU.
        A caption without <end> has none to answer for: it was cut, with certainty."""
        images, captions, longest = self.token_ids.shape
        lengths = self.lengths.flatten()
        words = F.pad(self.token_ids.flatten(0, 1), (0, 1), value=PAD)  # room for <end>
        ended = self.ended.flatten()
        words[ended, lengths[ended]] = END
        targets = lengths + ended
        words = words[:, : int(targets.max()) if len(targets) else longest]
        return PaddedCaptions.of(words, targets, torch.arange(images).repeat_interleave(captions))


@torch.no_grad()
def sample(decoder: Any, features: Features, keys: Tensor, with_greedy: bool, max_words: int) -> Samples:
    """Captions drawn for the features of B images by ``keys`` int64 [B, K] (draws.py), and ``with_greedy`` as one more
    of each image the one of the likeliest words. The decoder samples without dropout."""
    images, captions = keys.shape
    rows = torch.arange(images, device=keys.device).repeat_interleave(captions + with_greedy)
    shape = (images, captions + with_greedy)
    training = decoder.training
    decoder.eval()
    try:
        state = decoder.start(features).select(rows)
        words = torch.full(shape, START, device=keys.device)
        running, said = torch.ones_like(words, dtype=torch.bool), []
        for t in range(max_words):
            logits, state = decoder.step(state, words.flatten())
            scores = policy(logits).unflatten(0, shape)
            words = draw_words(scores[:, :captions], uniform(keys, t))
            if with_greedy:
                words = torch.cat([words, scores[:, captions:].argmax(dim=2)], dim=1)
            running = running & (words != END)
            said.append(torch.where(running, words, PAD))
            if (t + 1) % words_between_asks(keys.device) == 0 and not bool(running.any()):
                break
    finally:
        decoder.train(training)
    token_ids = torch.stack(said, dim=2)
    return Samples(token_ids, (token_ids != PAD).sum(dim=2), max_words)
